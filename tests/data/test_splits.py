"""Splits by identity: stable, reproducible, never impossible in silence."""

import json

import pytest
import torch

from understudy.data.splits import SPLIT_NAMES, Splits, assign_splits, spread
from understudy.errors import DataError

FRACTIONS = {"validation": 0.1, "calibration": 0.05, "test": 0.2}


def identities(num, start=0):
    return [f"{number:032x}" for number in range(start, start + num)]


def places(splits, sample_ids):
    return {
        sample_ids[index]: name for name in SPLIT_NAMES for index in getattr(splits, name).tolist()
    }


def test_every_sample_has_one_split_of_about_the_asked_size():
    splits = assign_splits(identities(20_000), ["train"] * 20_000, fractions=FRACTIONS, seed=1)
    parts = [getattr(splits, name) for name in SPLIT_NAMES]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(20_000))
    assert all(torch.equal(part, part.sort().values) for part in parts)
    assert len(splits.test) / 20_000 == pytest.approx(0.2, abs=0.01)
    rest = 20_000 - len(splits.test)
    assert len(splits.validation) / rest == pytest.approx(0.1, abs=0.01)
    assert len(splits.calibration) / rest == pytest.approx(0.05, abs=0.01)


def test_added_samples_and_another_order_move_nothing():
    few, many = identities(500), identities(800, start=-0)[::-1]
    one = places(assign_splits(few, ["train"] * 500, fractions=FRACTIONS, seed=3), few)
    other = places(assign_splits(many, ["train"] * 800, fractions=FRACTIONS, seed=3), many)
    assert all(other[sample] == place for sample, place in one.items())


def test_another_test_fraction_moves_nothing_between_the_others():
    ids = identities(2000)
    one = places(assign_splits(ids, ["train"] * 2000, fractions=FRACTIONS, seed=3), ids)
    fractions = {**FRACTIONS, "test": 0.4}
    other = places(assign_splits(ids, ["train"] * 2000, fractions=fractions, seed=3), ids)
    assert all(other[sample] in (place, "test") for sample, place in one.items())


def test_another_seed_splits_otherwise():
    ids = identities(500)
    one, same, other = (
        assign_splits(ids, ["train"] * 500, fractions=FRACTIONS, seed=seed).to_json()
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_equal_images_are_in_one_split():
    ids = identities(300)
    splits = assign_splits(ids + ids, ["train"] * 600, fractions=FRACTIONS, seed=0)
    for name in SPLIT_NAMES:
        indices = getattr(splits, name)
        assert set((indices % 300).tolist()) == set(indices[indices < 300].tolist())


def test_given_splits_are_kept():
    given = ["train"] * 300 + ["validation"] * 50 + ["test"] * 70
    splits = assign_splits(identities(420), given, fractions=FRACTIONS, seed=0)
    assert splits.validation.tolist() == list(range(300, 350))
    assert splits.test.tolist() == list(range(350, 420))
    assert set(splits.calibration.tolist()) | set(splits.train.tolist()) == set(range(300))
    only_test = ["train"] * 350 + ["test"] * 70
    splits = assign_splits(identities(420), only_test, fractions=FRACTIONS, seed=0)
    assert splits.test.tolist() == list(range(350, 420))
    assert 0 < len(splits.validation) < 70


def test_splits_go_through_json():
    splits = assign_splits(identities(99), ["train"] * 99, fractions={"test": 0.5}, seed=0)
    again = Splits.from_json(json.loads(json.dumps(splits.to_json())))
    assert again.to_json() == splits.to_json()
    assert again.calibration.dtype == torch.int64
    assert len(again.calibration) == 0


def test_a_part_of_a_split_is_spread_evenly_over_it():
    indices_N = torch.arange(100, 1100)
    assert torch.equal(spread(indices_N, 1000), indices_N)
    assert spread(indices_N, 4).tolist() == [100, 350, 600, 850]
    some_N = spread(indices_N, 300)
    assert len(some_N.unique()) == 300
    assert torch.equal(some_N.sort().values, some_N)
    assert torch.bincount((some_N - 100) // 100).tolist() == [30] * 10
    assert len(spread(indices_N[:0], 3)) == 0


def test_impossible_fractions_are_listed_together():
    fractions = {"validation": 0.7, "calibration": 0.4, "test": 1.5, "train": 0.1}
    with pytest.raises(DataError) as caught:
        assign_splits(identities(10), ["train"] * 10, fractions=fractions, seed=0)
    first, second, third = caught.value.problems
    assert "a fraction for 'train'" in first
    assert "the test fraction is 1.5" in second
    assert "together take 1.1" in third


def test_empty_splits_are_errors():
    with pytest.raises(DataError) as caught:
        assign_splits(identities(3), ["test"] * 3, fractions=FRACTIONS, seed=0)
    assert [text.split(" (")[0] for text in caught.value.problems] == [
        "the calibration split is empty",
        "the validation split is empty",
        "the train split is empty",
    ]
    assert "no training rows" in caught.value.problems[-1]


def test_a_class_without_training_rows_is_an_error():
    labels_N = torch.tensor([0] * 50 + [1])
    ids = identities(51)
    for seed in range(50):
        plain = assign_splits(ids, ["train"] * 51, fractions={"test": 0.5}, seed=seed)
        if 50 in plain.test.tolist():
            break
    with pytest.raises(DataError, match="class 'rare' has no sample in the train split"):
        assign_splits(
            ids,
            ["train"] * 51,
            fractions={"test": 0.5},
            seed=seed,
            labels_N=labels_N,
            class_names=("usual", "rare"),
        )


def test_equal_images_in_different_given_splits_are_an_error():
    with pytest.raises(DataError, match="equal images are given in different splits"):
        assign_splits(["a", "b", "a"], ["train", "train", "test"], fractions={}, seed=0)
