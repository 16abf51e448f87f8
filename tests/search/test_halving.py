"""Successive halving, fronts and drawn networks against plain references."""

import itertools

import pytest

from understudy.errors import InputError
from understudy.models.catalog import check_catalog_model
from understudy.search.architectures import FAMILIES, SMALLEST_SIDE, drawn_architectures
from understudy.search.halving import Rung, halve, pareto, plan_rungs


def test_rounds_keep_a_third():
    assert plan_rungs(18, epochs=(1, 3, 9)) == [Rung(18, 1), Rung(6, 3), Rung(2, 9)]
    assert plan_rungs(2, epochs=(1, 2)) == [Rung(2, 1), Rung(1, 2)]
    assert plan_rungs(8, epochs=(2, 4), factor=2) == [Rung(8, 2), Rung(4, 4)]


@pytest.mark.parametrize(
    ("num", "epochs"), [(0, (1,)), (3, ()), (3, (3, 1)), (3, (1, 1)), (3, (0,))]
)
def test_rounds_that_make_no_sense_are_refused(num, epochs):
    with pytest.raises(InputError, match="epochs that grow"):
        plan_rungs(num, epochs=epochs)


def test_the_best_go_on_and_each_keeps_its_last_score():
    quality = {5: 0.1, 6: 0.9, 7: 0.5, 8: 0.7}
    trained = []

    def train(candidate, rung):
        trained.append((candidate, rung.num_epochs))
        return quality[candidate] + rung.num_epochs / 100

    scores = halve([5, 6, 7, 8], plan_rungs(4, epochs=(1, 2, 4), factor=2), train)
    assert trained == [(5, 1), (6, 1), (7, 1), (8, 1), (6, 2), (8, 2), (6, 4)]
    assert [(s.candidate, s.rung) for s in scores] == [(6, 2), (8, 1), (7, 0), (5, 0)]
    assert scores[0].accuracy == pytest.approx(0.94)


def test_of_equal_candidates_the_earlier_goes_on():
    scores = halve([3, 1, 2], plan_rungs(3, epochs=(1, 2)), lambda *_: 0.5)
    assert scores[0].candidate == 3


def test_a_candidate_whose_training_fails_is_out_and_the_others_go_on():
    quality = {5: 0.9, 6: 0.8, 7: 0.7, 8: 0.6}

    def train(candidate, rung):
        fails = candidate == 6 or (candidate == 5 and rung.num_epochs > 1)
        return None if fails else quality[candidate]

    scores = halve([5, 6, 7, 8], plan_rungs(4, epochs=(1, 2), factor=2), train)
    assert [(s.candidate, s.rung) for s in scores] == [(7, 1), (8, 0)]
    assert halve([5, 6], plan_rungs(2, epochs=(1, 2)), lambda *_: None) == []


def test_a_front_is_what_comparing_all_pairs_gives():
    points = [(x, (7 * x) % 5) for x in range(10)] + [(9, 3)]
    slow = [
        k
        for k, p in enumerate(points)
        if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points) and p not in points[:k]
    ]
    assert pareto(points) == slow


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_networks_are_valid_and_reproducible(family):
    drawn = list(itertools.islice(drawn_architectures((family,), seed=0, side=32), 60))
    again = list(itertools.islice(drawn_architectures((family,), seed=0, side=32), 60))
    other = list(itertools.islice(drawn_architectures((family,), seed=1, side=32), 60))
    assert drawn == again != other
    for name, arguments in drawn:
        assert check_catalog_model(name, arguments) == []
        strides = [row[1] for row in arguments.get("stages", []) or arguments.get("blocks", [])]
        shrunk = 2 ** sum(stride == 2 for stride in strides)
        assert 32 / shrunk >= SMALLEST_SIDE


def test_small_pictures_are_not_shrunk_to_nothing():
    for _, arguments in itertools.islice(drawn_architectures(("separable",), seed=0, side=8), 50):
        assert sum(stride == 2 for _, stride in arguments["stages"]) <= 1
