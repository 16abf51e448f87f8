"""Exit policies against loops over pictures and over all thresholds."""

import itertools
import math

import pytest
import torch

from understudy.errors import InputError
from understudy.evaluate.exit_policy import (
    NEVER,
    ExitPolicy,
    ExitSearch,
    apply_policy,
    confidences,
    fit_temperature,
    leave_at,
)

COSTS = (10.0, 25.0, 60.0)


@pytest.fixture(scope="module")
def problem():
    """Three exits, each surer and more often right than the one before."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(0, 5, (400,), generator=generator)
    easiness_N = torch.rand(400, generator=generator)
    logits = []
    for strength in (2.0, 3.0, 4.5):
        logits_NK = torch.randn(400, 5, generator=generator)
        logits_NK[torch.arange(400), labels_N] += strength * easiness_N
        logits.append(logits_NK * 1.5)
    return torch.stack(logits), labels_N


def loop(policy, logits_ENK, labels_N, costs):
    """The policy picture by picture, in plain Python."""
    num_exits, num_samples, _ = logits_ENK.shape
    right, total, counts, rights = 0, 0.0, [0] * num_exits, [0] * num_exits
    for n in range(num_samples):
        for k in range(num_exits):
            scaled = [value / policy.temperatures[k] for value in logits_ENK[k, n].tolist()]
            top = max(scaled)
            confidence = 1 / sum(math.exp(value - top) for value in scaled)
            if k == num_exits - 1 or confidence >= policy.thresholds[k]:
                break
        is_right = int(logits_ENK[k, n].argmax()) == int(labels_N[n])
        right, total = right + is_right, total + costs[k]
        counts[k], rights[k] = counts[k] + 1, rights[k] + is_right
    return right / num_samples, total / num_samples, counts, rights


@pytest.mark.parametrize(
    "thresholds", [(0.6, 0.7), (0.9, 0.35), (NEVER, 0.5), (0.0, 0.5), (NEVER, NEVER)]
)
def test_an_outcome_is_that_of_a_loop_over_pictures(problem, thresholds):
    policy = ExitPolicy(thresholds, (1.5, 1.0, 0.8))
    outcome = apply_policy(policy, *problem, COSTS)
    accuracy, mean_cost, counts, rights = loop(policy, *problem, COSTS)
    assert outcome.accuracy == pytest.approx(accuracy)
    assert outcome.mean_cost == pytest.approx(mean_cost)
    assert outcome.shares == pytest.approx([count / 400 for count in counts])
    for found, count, num_right in zip(outcome.leaver_accuracies, counts, rights, strict=True):
        assert found == (pytest.approx(num_right / count) if count else None)
    assert outcome.num_samples == 400


def test_a_picture_leaves_at_the_first_exit_that_is_confident_enough():
    confidences_EN = torch.tensor(
        [[0.9, 0.4, 0.4, 0.8], [0.1, 0.7, 0.6, 0.9], [0.3, 0.3, 0.3, 0.3]]
    )
    assert leave_at(confidences_EN, (0.8, 0.7)).tolist() == [0, 1, 2, 0]


def test_the_fitted_temperature_is_the_one_that_was_applied():
    generator = torch.Generator().manual_seed(1)
    logits_NK = 2 * torch.randn(20_000, 6, generator=generator)
    labels_N = torch.multinomial(logits_NK.softmax(1), 1, generator=generator)[:, 0]
    for temperature in (0.4, 1.0, 3.0):
        found = fit_temperature(logits_NK * temperature, labels_N)
        assert found == pytest.approx(temperature, rel=0.03)


def test_the_fitted_temperature_is_the_least_of_a_scan(problem):
    logits_NK, labels_N = problem[0][0], problem[1]
    scan = torch.linspace(0.2, 5, 4801, dtype=torch.float64)
    losses = [
        torch.nn.functional.cross_entropy(logits_NK.double() / t, labels_N).item() for t in scan
    ]
    assert fit_temperature(logits_NK, labels_N) == pytest.approx(
        scan[losses.index(min(losses))].item(), abs=2e-3
    )


def all_policies(logits_ENK):
    """Every policy that decides differently, for two side exits on few pictures."""
    values = confidences(logits_ENK, (1.0, 1.0, 1.0))[:-1].double()
    limits = [[NEVER, *row.tolist()] for row in values]
    return [ExitPolicy(thresholds, (1.0, 1.0, 1.0)) for thresholds in itertools.product(*limits)]


@pytest.mark.parametrize(
    ("target", "at_most"),
    [("accuracy_drop", 0.0), ("accuracy_drop", 0.05), ("mean_macs", 20.0), ("mean_macs", 40.0)],
)
def test_the_search_is_as_good_as_trying_everything(problem, target, at_most):
    logits_ENK, labels_N = problem[0][:, :30], problem[1][:30]
    search = ExitSearch(logits_ENK, labels_N, COSTS, (1.0, 1.0, 1.0))
    found = apply_policy(search.best(target, at_most), logits_ENK, labels_N, COSTS)
    tried = [apply_policy(p, logits_ENK, labels_N, COSTS) for p in all_policies(logits_ENK)]
    if target == "accuracy_drop":
        least = search.last().accuracy - at_most - 1e-9
        assert found.accuracy >= least
        assert found.mean_cost == min(one.mean_cost for one in tried if one.accuracy >= least)
    else:
        assert found.mean_cost <= at_most
        best = max(one.accuracy for one in tried if one.mean_cost <= at_most)
        assert found.accuracy == pytest.approx(best)


def test_the_curve_is_what_no_policy_beats(problem):
    search = ExitSearch(*problem, COSTS, (1.0, 1.0, 1.0))
    curve = search.curve()
    assert 5 < len(curve) <= 40
    costs = [point.mean_cost for point in curve]
    accuracies = [point.accuracy for point in curve]
    assert costs == sorted(costs)
    assert accuracies == sorted(accuracies)
    assert costs[0] == 10  # everything at the first exit
    for point in curve:
        outcome = apply_policy(ExitPolicy(point.thresholds, (1.0, 1.0, 1.0)), *problem, COSTS)
        assert outcome.accuracy == pytest.approx(point.accuracy)
        assert outcome.mean_cost == pytest.approx(point.mean_cost)


def test_many_exits_are_searched_in_bounded_time(problem):
    logits_ENK = problem[0][[0, 0, 1, 1, 1, 2]]
    search = ExitSearch(logits_ENK, problem[1], range(1, 7), (1.0,) * 6)
    assert len(search.grid) <= 1024
    policy = search.best("accuracy_drop", 0.01)
    outcome = apply_policy(policy, logits_ENK, problem[1], range(1, 7))
    assert outcome.accuracy >= search.last().accuracy - 0.01
    assert outcome.mean_cost < 6


@pytest.mark.parametrize("target", ["mean_macs", "mean_latency_ms"])
def test_a_target_that_cannot_be_reached_says_what_can(problem, target):
    search = ExitSearch(*problem, COSTS, (1.0, 1.0, 1.0))
    with pytest.raises(InputError, match=rf"{target} of at most 9.+expected between 10 and 60"):
        search.best(target, 9)
    always = search.best(target, 10)
    assert apply_policy(always, *problem, COSTS).shares == (1.0, 0.0, 0.0)


def test_exits_that_say_nothing_are_never_left_at():
    labels_N = torch.arange(50) % 5
    right_NK = 5 * torch.nn.functional.one_hot(labels_N, 5).float()
    wrong_NK = right_NK.roll(1, dims=1)
    logits_ENK = torch.stack([wrong_NK, right_NK])
    search = ExitSearch(logits_ENK, labels_N, (1, 2), (1.0, 1.0))
    assert search.best("accuracy_drop", 0.0).thresholds == (NEVER,)


def test_shapes_that_do_not_fit_are_told(problem):
    logits_ENK, labels_N = problem
    for bad in (
        (logits_ENK[:2], labels_N, COSTS),
        (logits_ENK, labels_N[:10], COSTS),
        (logits_ENK, labels_N, COSTS[:2]),
    ):
        with pytest.raises(InputError, match="3 exits; expected logits"):
            ExitSearch(*bad, (1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="a positive temperature for each exit"):
        ExitPolicy((0.5,), (1.0, 0.0))
