"""Which sample is for training, calibration, validation and test: decided by what it is.

A hash of seed and sample identity decides, so samples that are added change the place of no other,
and equal pictures are always on the same side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from understudy.data.images import GIVEN_SPLITS
from understudy.errors import DataError, problem
from understudy.runtime import derive_seed

SPLIT_NAMES = ("train", "calibration", "validation", "test")
FRACTION_NAMES = ("calibration", "validation", "test")


@dataclass(frozen=True, eq=False)
class Splits:
    """Sample indices of each split: int64, ascending, disjoint, every sample in one of them."""

    train: Tensor
    calibration: Tensor
    validation: Tensor
    test: Tensor

    def to_json(self) -> dict[str, list[int]]:
        """Return lists of indices by split name."""
        return {name: getattr(self, name).tolist() for name in SPLIT_NAMES}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the splits that ``to_json`` wrote."""
        return cls(**{name: torch.tensor(value[name], dtype=torch.int64) for name in SPLIT_NAMES})


def assign_splits(
    sample_ids: Sequence[str],
    given_splits: Sequence[str],
    *,
    fractions: Mapping[str, float],
    seed: int,
    labels_N: Tensor | None = None,
    class_names: Sequence[str] = (),
) -> Splits:
    """Return the split of every sample.

    Rows given as test are the test split; without such rows the part ``fractions["test"]`` of all
    is. Rows given as validation are the validation split; without such rows the part
    ``fractions["validation"]`` of the other rows is. Calibration takes its part of the given
    training rows. A missing fraction is 0: that split then holds only rows given as such.

    With ``labels_N`` and ``class_names`` every class must have a training row.

    Raises DataError for impossible fractions, a split that was asked for and is empty, a class
    without training rows, or equal pictures in different given splits.
    """
    problems = _fraction_problems(fractions)
    problems += [
        problem(f"a split is named '{name}'", expected=" or ".join(GIVEN_SPLITS), mend="Rename it.")
        for name in sorted(set(given_splits) - set(GIVEN_SPLITS))
    ]
    if len(set(zip(sample_ids, given_splits, strict=True))) != len(set(sample_ids)):
        problems.append(
            problem(
                "equal images are given in different splits",
                expected="splits that share no image",
                mend="Drop one of each pair, or load the data with data.on_bad: skip.",
            )
        )
    if problems:
        raise DataError(*problems)
    has_given = {name: name in given_splits for name in GIVEN_SPLITS}
    members: dict[str, list[int]] = {name: [] for name in SPLIT_NAMES}
    for index, (sample, given) in enumerate(zip(sample_ids, given_splits, strict=True)):
        members[_place(sample, given, has_given, fractions, seed)].append(index)
    _check_members(members, has_given, fractions)
    splits = Splits.from_json(members)
    if labels_N is not None:
        _check_classes(splits, labels_N, class_names)
    return splits


def _place(
    sample: str,
    given: str,
    has_given: Mapping[str, bool],
    fractions: Mapping[str, float],
    seed: int,
) -> str:
    """Return the split of one sample."""
    if given == "test":
        return "test"
    # Two independent numbers in [0, 1): changing the test fraction moves nothing between the rest.
    digest = hashlib.sha256(f"split/{seed}/{sample}".encode()).digest()
    for_test, for_rest = (
        int.from_bytes(part, "little") / 2**64 for part in (digest[:8], digest[8:16])
    )
    if not has_given["test"] and for_test < fractions.get("test", 0.0):
        return "test"
    if given == "validation":
        return "validation"
    validation = 0.0 if has_given["validation"] else fractions.get("validation", 0.0)
    if for_rest < validation:
        return "validation"
    if for_rest < validation + fractions.get("calibration", 0.0):
        return "calibration"
    return "train"


def _fraction_problems(fractions: Mapping[str, float]) -> list[str]:
    problems = [
        problem(
            f"there is a fraction for '{name}'",
            expected=", ".join(FRACTION_NAMES),
            mend="Leave it out; training takes what remains.",
        )
        for name in sorted(set(fractions) - set(FRACTION_NAMES))
    ]
    problems += [
        problem(
            f"the {name} fraction is {fraction}",
            expected="a number from 0 to below 1",
            mend=f"Change data.{name}_fraction.",
        )
        for name, fraction in fractions.items()
        if not 0 <= fraction < 1
    ]
    held_out = fractions.get("validation", 0.0) + fractions.get("calibration", 0.0)
    if held_out >= 1:
        problems.append(
            problem(
                f"validation and calibration together take {held_out:g} of the training rows",
                expected="less than 1",
                mend="Lower data.validation_fraction or data.calibration_fraction.",
            )
        )
    return problems


def _check_members(
    members: Mapping[str, Sequence[int]],
    has_given: Mapping[str, bool],
    fractions: Mapping[str, float],
) -> None:
    """Raise DataError if a split that was asked for has no samples."""
    num_samples = sum(map(len, members.values()))
    wanted = [name for name in FRACTION_NAMES if fractions.get(name, 0.0) > 0]
    problems = [
        problem(
            f"the {name} split is empty (of {num_samples} samples, "
            f"with a fraction of {fractions[name]:g})",
            expected="at least one sample",
            mend=f"Raise data.{name}_fraction or give more data.",
        )
        for name in wanted
        if not members[name]
    ]
    if not members["train"]:
        cause = "" if has_given["train"] else "; the source has no training rows"
        problems.append(
            problem(
                f"the train split is empty (of {num_samples} samples{cause})",
                expected="at least one sample",
                mend="Give training rows, or lower the fractions of the other splits.",
            )
        )
    if problems:
        raise DataError(*problems)


def fewer_training_samples(splits: Splits, num_samples: int | None, *, seed: int) -> Splits:
    """Return the splits with so many of the training samples, drawn at random; None keeps all.

    The draw of a smaller number is part of that of a larger one. The other splits stay.

    Raises:
        DataError: there are not so many.
    """
    if num_samples is None:
        return splits
    num_there = len(splits.train)
    if num_samples > num_there:
        raise DataError(
            problem(
                f"{num_samples} training samples are asked for and the split holds {num_there}",
                expected=f"at most {num_there}",
                mend="Lower the number, or leave it out to take all.",
            )
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "fewer samples"))
    chosen = torch.randperm(num_there, generator=generator)[:num_samples].sort().values
    return replace(splits, train=splits.train[chosen])


def spread(indices_N: Tensor, at_most: int) -> Tensor:
    """Return at most so many samples of a split, evenly over it and in its order.

    The first ones would be the first classes of a folder, whose rows are sorted by class.
    """
    num_there = len(indices_N)
    if num_there <= at_most:
        return indices_N
    return indices_N[torch.arange(at_most) * num_there // at_most]


def _check_classes(splits: Splits, labels_N: Tensor, class_names: Sequence[str]) -> None:
    counts_K = torch.bincount(labels_N[splits.train], minlength=len(class_names)).tolist()
    problems = [
        problem(
            f"class '{name}' has no sample in the train split",
            expected="at least one sample of every class",
            mend="Give more samples of it, lower the other splits' fractions, or change the seed.",
        )
        for name, count in zip(class_names, counts_K, strict=True)
        if count == 0
    ]
    if problems:
        raise DataError(*problems)
