"""What a search varies: parameters of a recipe, their ranges, and ties between them.

A parameter is a path of the recipe and one of

    0.1..0.5              a number of the range; log:0.01..0.5 evenly in its logarithm
    int:1..8              a whole number; int:log:1..64 evenly in its logarithm
    1|2|4|8               one of these values (each as YAML)
    1 - other.path        a tie: computed from another parameter, not varied itself
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from understudy.errors import InputError, problem

Value = bool | int | float | str | None
EXAMPLES = "log:0.01..0.5, 0..1, int:1..8, 1|2|4|8 or 1 - OTHER"
_TIE = re.compile(r"1\s*-\s*([A-Za-z][\w.-]*)")


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def text(self) -> str:
        """Return it as it is written in a space."""
        marks = ("int:" if self.whole else "") + ("log:" if self.log else "")
        return f"{marks}{number_text(self.low)}..{number_text(self.high)}"


@dataclass(frozen=True)
class Choice:
    """One of some values; lists and mappings are kept as YAML text by the search."""

    values: tuple[Any, ...]

    def text(self) -> str:
        """Return it as it is written in a space."""
        return "|".join(yaml_text(value) for value in self.values)


@dataclass(frozen=True)
class Space:
    """The parameters that vary, and the ties: a path to the path it is one minus of."""

    parameters: Mapping[str, Range | Choice]
    ties: Mapping[str, str]

    def settings(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return every path's value, those of ties included, for drawn values."""
        return dict(drawn) | {path: 1 - drawn[other] for path, other in self.ties.items()}

    def to_json(self) -> dict[str, str]:
        """Return each path with its text."""
        return {path: parameter.text() for path, parameter in self.parameters.items()} | {
            path: f"1 - {other}" for path, other in self.ties.items()
        }

    def to_yaml(self) -> dict[str, Any]:
        """Return what ``parse_space`` makes the same space of."""
        choices = {p: list(c.values) for p, c in self.parameters.items() if isinstance(c, Choice)}
        return self.to_json() | choices

    def grid(self) -> list[dict[str, Any]]:
        """Return every combination of choices, the last path varying fastest.

        Raises:
            InputError: a range has no finite number of values.
        """
        endless = [path for path, p in self.parameters.items() if not isinstance(p, Choice)]
        if endless:
            raise InputError(
                *(
                    problem(
                        f"grid over `{path}={self.parameters[path].text()}`",
                        expected="values that can be counted",
                        mend=f"List them: {path}=1|2|4. Or choose another --sampler.",
                    )
                    for path in endless
                )
            )
        points: list[dict[str, Any]] = [{}]
        for path, parameter in self.parameters.items():
            assert isinstance(parameter, Choice)
            points = [{**point, path: value} for point in points for value in parameter.values]
        return points


def number_text(number: float) -> str:
    """Return a number's shortest text that means it exactly."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def yaml_text(value: Any) -> str:
    """Return a value as one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n...")[0].strip()


def parse_space(given: Mapping[str, Any] | Sequence[str]) -> Space:
    """Return a space from ``PATH=TEXT`` items, or from a mapping of paths to texts or lists.

    Raises:
        InputError: every problem in it.
    """
    problems: list[str] = []
    pairs: list[tuple[str, Any]] = []
    if isinstance(given, Mapping):
        pairs = [(str(path), value) for path, value in given.items()]
    else:
        for item in given:
            path, equals, text = item.partition("=")
            if not equals or not path.strip() or not text.strip():
                problems.append(
                    problem(f"--space {item}", expected="PATH=VALUES", mend=f"VALUES: {EXAMPLES}.")
                )
            pairs.append((path.strip(), text.strip()))
    parameters: dict[str, Range | Choice] = {}
    ties: dict[str, str] = {}
    for path, value in pairs if not problems else ():
        if path in parameters or path in ties:
            problems.append(problem(f"`{path}` twice", expected="it once", mend="Remove one."))
            continue
        try:
            if isinstance(value, str) and (tie := _TIE.fullmatch(value.strip())):
                ties[path] = tie[1]
            else:
                parameters[path] = parse_parameter(value)
        except (ValueError, yaml.YAMLError) as error:
            line = " ".join(str(error).split())
            problems.append(
                problem(f"`{path}`: {value!r} ({line})", expected=EXAMPLES, mend="Correct it.")
            )
    problems += tie_problems(parameters, ties)
    if not parameters and not problems:
        problems.append(problem("an empty space", expected="a parameter", mend=EXAMPLES + "."))
    if problems:
        raise InputError(*problems)
    return Space(parameters, ties)


def tie_problems(parameters: Mapping[str, Range | Choice], ties: Mapping[str, str]) -> list[str]:
    """Return what is wrong with ties: each must name a parameter of numbers."""
    found = []
    for path, other in ties.items():
        parameter = parameters.get(other)
        numbers = isinstance(parameter, Range) or (
            isinstance(parameter, Choice) and all(is_number(value) for value in parameter.values)
        )
        if not numbers:
            found.append(
                problem(
                    f"`{path}` is 1 - `{other}`",
                    expected="the path of a parameter of numbers in this space",
                    mend=f"Give `{other}` a range, or drop the tie.",
                )
            )
    return found


def parse_parameter(value: Any) -> Range | Choice:
    """Return the parameter that a text or a list of values means; ValueError says what is wrong."""
    if isinstance(value, list | tuple):
        return choice_of(list(value))
    if not isinstance(value, str):
        return choice_of([value])
    text, whole, log = value.strip(), False, False
    if text.startswith("int:"):
        text, whole = text.removeprefix("int:"), True
    if text.startswith("log:"):
        text, log = text.removeprefix("log:"), True
    if ".." in text:
        return range_of(text, log=log, whole=whole)
    if whole or log:
        raise ValueError("no LOW..HIGH")
    return choice_of([yaml.safe_load(part) for part in text.split("|")])


def range_of(text: str, *, log: bool, whole: bool) -> Range:
    """Return the range that ``LOW..HIGH`` means."""
    low_text, _, high_text = text.partition("..")
    low, high = float(low_text), float(high_text)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError("the range must be finite and its low end below its high end")
    if log and low <= 0:
        raise ValueError("a logarithmic range must be above 0")
    if whole and (low != int(low) or high != int(high)):
        raise ValueError("the ends of int: must be whole")
    return Range(low, high, log=log, whole=whole)


def choice_of(values: list[Any]) -> Choice:
    """Return the choice between values, each once."""
    texts = [yaml_text(value) for value in values]
    if not values or len(set(texts)) != len(texts):
        raise ValueError("the values must be at least one, each once")
    return Choice(tuple(values))


def is_number(value: Any) -> bool:
    """Return whether a value is a number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)
