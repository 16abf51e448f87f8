"""Which column holds the pictures and which the labels, and what labels mean as class numbers."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets

from understudy.data.locate import nearest_hint
from understudy.errors import DataError, problem

LABEL_NAMES = ("label", "labels", "class", "target", "fine_label")
BINARY_TYPES = frozenset({"binary", "large_binary", "binary_view"})
STRING_TYPES = frozenset({"string", "large_string", "string_view"})
SUITABLE = {
    "image": "encoded images",
    "label": "class labels, integers, truth values or text",
}


@dataclass(frozen=True)
class Columns:
    """Names of the picture column and the label column."""

    image: str
    label: str


@dataclass(frozen=True)
class RowFacts:
    """What is known of each row before its picture is decoded.

    Attributes:
        splits: the given split.
        labels: class number, None where missing; may be out of range.
        class_names: one name a class.
        metadata: other scalar columns; None where a split lacks the column.
    """

    splits: list[str]
    labels: list[int | None]
    class_names: list[str]
    metadata: dict[str, list[Any]]


def find_columns(
    features: Mapping[str, Mapping[str, Any]],
    *,
    image_column: str | None,
    label_column: str | None,
) -> Columns:
    """Return the columns, as named or by their types. ``features`` maps split to column types.

    Raises DataError, with the candidates, if there is none, if there are several, or if a split
    lacks the column.
    """
    _, first = next(iter(features.items()))
    problems: list[str] = []
    image = _choose("image", image_column, first, problems)
    label = _choose("label", label_column, first, problems)
    if image is None or label is None:
        raise DataError(*problems)
    for split, columns in features.items():
        problems += [
            problem(
                f"the {split} part has no column '{name}'",
                expected=f"the same columns as elsewhere; it has {_listed(columns)}",
                mend="Rename its column, or name another with data.image_column or "
                "data.label_column.",
            )
            for name in (image, label)
            if name not in columns
        ]
        problems += _differing_classes(split, columns, first, label)
    if problems:
        raise DataError(*problems)
    return Columns(image, label)


def find_image_column(features: Mapping[str, Any], image_column: str | None) -> str:
    """Return the picture column of one part alone. Raises DataError as ``find_columns`` does."""
    problems: list[str] = []
    image = _choose("image", image_column, features, problems)
    if image is None:
        raise DataError(*problems)
    return image


def _choose(
    role: Literal["image", "label"],
    named: str | None,
    features: Mapping[str, Any],
    problems: list[str],
) -> str | None:
    """Return the column of this role; if there is no clear one, add the problem and return None."""
    setting = f"data.{role}_column"
    suitable = _may_hold_images if role == "image" else _may_be_label
    candidates = _image_candidates(features) if role == "image" else _label_candidates(features)
    if named is not None and named not in features:
        problems.append(
            problem(
                f"{setting} is '{named}', which the data does not have",
                expected=f"one of its columns: {_listed(features)}",
                mend="Correct the name." + nearest_hint(named, list(features)),
            )
        )
        return None
    if named is not None and not suitable(features[named]):
        problems.append(
            problem(
                f"{setting} is '{named}', which holds {features[named]}",
                expected=SUITABLE[role],
                mend=f"Name another of {_listed(features)}.",
            )
        )
        return None
    if named is not None or len(candidates) == 1:
        return named or candidates[0]
    found = f"several columns may be the {role}: {', '.join(candidates)}"
    problems.append(
        problem(
            found if candidates else f"no column is recognised as the {role}",
            expected=f"one clear {role} column of {_listed(features)}",
            mend=f"Name it with {setting}.",
        )
    )
    return None


def _listed(features: Mapping[str, Any]) -> str:
    return ", ".join(features)


def _image_candidates(features: Mapping[str, Any]) -> list[str]:
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    # Files written without the library's feature types still show bytes for what they are.
    return images or [
        name
        for name, feature in features.items()
        if _may_hold_images(feature) and not _is_value(feature, STRING_TYPES)
    ]


def _may_hold_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Image) or _is_value(feature, BINARY_TYPES | STRING_TYPES):
        return True
    return isinstance(feature, dict) and _is_value(feature.get("bytes"), BINARY_TYPES)


def _label_candidates(features: Mapping[str, Any]) -> list[str]:
    classes = [n for n, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return classes or [
        name
        for name, feature in features.items()
        if name.lower() in LABEL_NAMES and _may_be_label(feature)
    ]


def _may_be_label(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel) or _is_value(feature, STRING_TYPES):
        return True
    return isinstance(feature, datasets.Value) and (
        feature.dtype.startswith(("int", "uint")) or feature.dtype == "bool"
    )


def _is_value(feature: Any, dtypes: frozenset[str]) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in dtypes


def _differing_classes(
    split: str, columns: Mapping[str, Any], first: Mapping[str, Any], label: str
) -> list[str]:
    names = [getattr(features.get(label), "names", None) for features in (columns, first)]
    kinds = [isinstance(features.get(label), datasets.ClassLabel) for features in (columns, first)]
    if label not in columns or (names[0] == names[1] and kinds[0] == kinds[1]):
        return []
    return [
        problem(
            f"the {split} part has the classes {names[0]}",
            expected=f"those of the other parts, in the same order: {names[1]}",
            mend="Write the parts anew with equal class names.",
        )
    ]


def encode_labels(
    raw_labels: Sequence[Any], feature: Any, *, column: str
) -> tuple[list[int | None], list[str]]:
    """Return (class number or None for each row, class names).

    Class labels keep their names and numbers; text and integers become sorted classes, named by
    the text or the number. Missing are None, empty text, and -1 where the rest is 0 to K - 1.
    """
    if isinstance(feature, datasets.ClassLabel):
        return [None if value in (None, -1) else value for value in raw_labels], feature.names
    values = {value for value in raw_labels if value is not None and value != ""}
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        raise DataError(
            problem(
                f"the column '{column}' mixes {', '.join(sorted(kind.__name__ for kind in kinds))}",
                expected="labels of one type in all parts",
                mend="Write the parts anew with equal types.",
            )
        )
    num_others = len(values) - 1
    if kinds == {int} and num_others >= 2 and values - {-1} == set(range(num_others)):
        values.discard(-1)
    ordered = sorted(values)
    numbers = {value: number for number, value in enumerate(ordered)}
    return [numbers.get(value) for value in raw_labels], [str(value) for value in ordered]


def is_scalar(feature: Any) -> bool:
    """Whether a column holds one plain value a row, and so is worth keeping as metadata."""
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype not in BINARY_TYPES


def plain_value(value: Any, feature: Any) -> Any:
    """Return a metadata value as JSON knows it: classes by name, times as ISO text, no NaN."""
    if isinstance(feature, datasets.ClassLabel):
        known = isinstance(value, int) and 0 <= value < len(feature.names)
        return feature.names[value] if known else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)
