"""The rules that rows are held to, and which rows stay when one breaks a rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from understudy.data.images import GIVEN_SPLITS, DataIssue
from understudy.errors import DataError, problem
from understudy.progress import log

MAX_LINES = 20


@dataclass(frozen=True)
class Judged:
    """The rows that stay, ascending, and what is wrong with the others and with the whole."""

    kept: list[int]
    issues: tuple[DataIssue, ...]


def judge_rows(
    *,
    splits: Sequence[str],
    labels: Sequence[int | None],
    class_names: Sequence[str],
    sample_ids: Sequence[str | None],
    broken: Mapping[int, str],
    names: Sequence[str] | None = None,
) -> Judged:
    """Return which rows can be used. ``names`` are the files' names where rows are files."""
    row_in_split = number_in_split(splits)
    split_of_id = _strictest_split(splits, sample_ids)
    issues: list[DataIssue] = []
    kept: list[int] = []

    def note(kind: str, row: int, message: str) -> None:
        named = f"{names[row]}: {message}" if names else message
        issues.append(DataIssue(kind, row_in_split[row], splits[row], named))

    for row, (split, label, identity) in enumerate(zip(splits, labels, sample_ids, strict=True)):
        good = True
        if identity is None:
            note("broken_image", row, f"broken image: {broken[row]}")
            good = False
        if label is None:
            note("missing_label", row, "the label is missing")
            good = False
        elif not 0 <= label < len(class_names):
            note(
                "label_out_of_range",
                row,
                f"label {label} is out of range, the {len(class_names)} classes being 0 to "
                f"{len(class_names) - 1}",
            )
            good = False
        if identity is not None and split_of_id[identity][0] != split:
            other = split_of_id[identity][1]
            note(
                "duplicate_across_splits",
                row,
                f"the same image as row {row_in_split[other]} of {splits[other]}",
            )
            good = False
        if good:
            kept.append(row)
    counts = Counter(labels[row] for row in kept if splits[row] == "train")
    issues += [
        DataIssue("empty_class", -1, "train", f"class {number} ('{name}') has no training rows")
        for number, name in enumerate(class_names)
        if counts[number] == 0
    ]
    return Judged(kept, tuple(issues))


def number_in_split(splits: Sequence[str]) -> list[int]:
    """Return for each row its number in its own split, from 0."""
    next_number: Counter[str] = Counter()
    numbers = []
    for split in splits:
        numbers.append(next_number[split])
        next_number[split] += 1
    return numbers


def _strictest_split(
    splits: Sequence[str], sample_ids: Sequence[str | None]
) -> dict[str, tuple[str, int]]:
    """Return for each picture the split that keeps it, and its first row there.

    Test before validation before train: a test set stays what others measure on, and what a
    student has seen in training must not be in it.
    """
    found: dict[str, tuple[str, int]] = {}
    for row, (split, identity) in enumerate(zip(splits, sample_ids, strict=True)):
        if identity is None:
            continue
        known = found.get(identity)
        if known is None or GIVEN_SPLITS.index(split) > GIVEN_SPLITS.index(known[0]):
            found[identity] = (split, row)
    return found


def refuse_bad_rows(judged: Judged, *, on_bad: str, source: str) -> None:
    """Raise DataError where the data cannot be used: any issue with "error", else the fatal ones.

    Up to 20 rows are listed; a class without training rows is an error in both cases.
    """
    fatal = [issue for issue in judged.issues if on_bad == "error" or issue.row < 0]
    if not fatal:
        if judged.issues:
            log.warning("%s: bad rows are left out (%d issues)", source, len(judged.issues))
        return
    # What is wrong with a whole split must not be cut off below hundreds of rows.
    fatal.sort(key=lambda issue: issue.row >= 0)
    can_skip = all(issue.row >= 0 for issue in fatal)
    bad = sorted(Counter(issue.kind.replace("_", " ") for issue in fatal).items())
    head = problem(
        f"{source}: " + ", ".join(f"{count} of kind '{kind}'" for kind, count in bad),
        expected="rows with a readable image and a label in range, examples of every class, and "
        "no image in two splits",
        mend="Mend the rows below"
        + (", or leave them out with data.on_bad: skip." if can_skip else "."),
    )
    lines = [str(issue) for issue in fatal[:MAX_LINES]]
    if len(fatal) > MAX_LINES:
        lines.append(f"and {len(fatal) - MAX_LINES} more")
    raise DataError(head, *lines)
