"""Every error the package raises on purpose, and the exit code it maps to.

An error says what was given, what was expected and how to mend it, and lists all problems
found at once, so that a user mends a file once and not once per mistake.
"""

from __future__ import annotations

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_BUDGET_MISSED = 3
EXIT_INTERRUPTED = 130
MAX_SHOWN_LENGTH = 4000


def problem(given: str, *, expected: str, mend: str) -> str:
    """Return one problem as a sentence in the house form: given; expected; how to mend it."""
    return f"{given}; expected {expected}. {mend}"


def printable(text: str) -> str:
    """Return a text that cannot steer a terminal: what does not print is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_problem(text: str) -> str:
    """Return a problem for the terminal, cut to a length: it may quote a file from anywhere."""
    cut = text if len(text) <= MAX_SHOWN_LENGTH else f"{text[:MAX_SHOWN_LENGTH]} ..."
    return "\n".join(map(printable, cut.split("\n")))


class UnderstudyError(Exception):
    """Base of all errors raised on purpose. ``problems`` holds one line per problem."""

    exit_code = EXIT_FAILURE

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class InputError(UnderstudyError):
    """What the user gave cannot be used as it is (exit code 2)."""

    exit_code = EXIT_BAD_INPUT


class RecipeError(InputError):
    """The recipe is wrong: unknown keys, wrong types, impossible values, missing files."""


class DataError(InputError):
    """The data is wrong: broken images, labels out of range, empty classes, duplicates."""


class ModelError(InputError):
    """A model cannot be built or does not fit the data."""


class CheckpointError(ModelError):
    """A checkpoint is unreadable, unsafe or of another architecture."""


class MissingExtraError(InputError):
    """An optional package is not installed; the message holds the exact install command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            problem(
                f"the package '{package}' is not installed",
                expected=f"the extra '{extra}'",
                mend=f'Run: pip install "understudy[{extra}]"',
            )
        )


class StoreError(UnderstudyError):
    """Stored teacher outputs are damaged or incomplete."""


class ParityError(UnderstudyError):
    """An exported file does not compute what the trained model computes."""


class TrainingError(UnderstudyError):
    """Training cannot go on, for instance because the loss stays non-finite."""
