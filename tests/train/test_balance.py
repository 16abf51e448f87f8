"""Schedules and balances of the weights, against plain arithmetic and through kills."""

import math

import numpy as np
import pytest
import torch
from process_pair import in_two_processes
from pydantic import ValidationError
from torch import nn

from understudy.data.batches import Batch
from understudy.progress import silent
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.balance import (
    GradientNormBalance,
    UncertaintyBalance,
    ValidationBalance,
    build_balance,
    gradient_norms,
    largest_weights,
)
from understudy.train.distill_settings import DistillSettings
from understudy.train.distillation import DistillObjective, recipe_weights
from understudy.train.loop import train
from understudy.train.objective import LabelObjective, value_at
from understudy.train.settings import Schedule

METHODS = {
    "validation": {"times": [0.3, 0.6, 0.9]},
    "uncertainty": {},
    "gradient_norm": {"every_steps": 4},
}


def balanced(method, **more):
    return DistillSettings.model_validate(
        {
            "kl_weight": 0.7,
            "ce_weight": 0.3,
            "losses": {"mse_logits": {"weight": 0.2}},
            "balance": {"method": method, **METHODS.get(method, {})},
            **more,
        }
    )


# Schedules


def plain_value(shape, start, end, progress):
    """The value that each shape's name promises."""
    moved = {
        "linear": progress,
        "cosine": 0.5 - 0.5 * np.cos(np.pi * progress),
        "step": np.mean([progress >= at for at in (0.25, 0.5, 1.0)]),
    }[shape]
    return (1 - moved) * start + moved * end


@pytest.mark.parametrize("shape", ["linear", "cosine", "step"])
def test_weights_and_temperature_follow_their_schedules(shape):
    def schedule(start, end):
        steps = [0.25, 0.5, 1.0] if shape == "step" else []
        return {"start": start, "end": end, "shape": shape, "steps": steps}

    settings = DistillSettings.model_validate(
        {
            "kl_weight": schedule(0.9, 0.2),
            "ce_weight": schedule(0.1, 0.8),
            "temperature": schedule(6, 2),
            "teacher_share": schedule(1, 0.25),
            "losses": {"dist": {"weight": schedule(3, 1)}, "dkd": {}},
        }
    )
    for progress in np.linspace(0, 1, 9):
        share = plain_value(shape, 1, 0.25, progress)
        hard = plain_value(shape, 0.1, 0.8, progress)
        assert recipe_weights(settings, progress) == pytest.approx(
            {
                "kl": share * plain_value(shape, 0.9, 0.2, progress),
                "ce": hard + (1 - share) * (1 - hard),
                "dist": share * plain_value(shape, 3, 1, progress),
                "dkd": share,
            }
        )
        temperature = plain_value(shape, 6, 2, progress)
        assert value_at(settings.temperature, progress) == pytest.approx(temperature)
    assert isinstance(settings.temperature, Schedule)


def test_constant_weights_stay():
    settings = DistillSettings()
    assert recipe_weights(settings, 0.0) == recipe_weights(settings, 0.77)
    assert recipe_weights(settings, 0.5) == {"kl": 0.9, "ce": 0.1}


def test_a_teacher_share_that_ends_at_0_ends_in_label_training():
    settings = DistillSettings.model_validate({"teacher_share": {"start": 1, "end": 0}})
    assert recipe_weights(settings, 0.0) == {"kl": 0.9, "ce": 0.1}
    assert recipe_weights(settings, 1.0) == {"kl": 0.0, "ce": 1.0}


class Fixed:
    """A teacher source that answers from a table."""

    def __init__(self):
        self.logits_NK = torch.randn(400, 10, generator=torch.Generator().manual_seed(0)) * 4

    def outputs(self, batch, *, view):
        return TeacherOutputs(self.logits_NK[batch.indices_N])


def test_without_a_share_the_teacher_changes_nothing(make_plan, make_network, fabric):
    settings = DistillSettings(teacher_share=0.0)
    plan = make_plan("taught", objective=DistillObjective(settings), teacher=Fixed())
    taught = train(make_network(), plan, fabric=fabric, progress=silent)
    plan = make_plan("alone", objective=LabelObjective())
    alone = train(make_network(), plan, fabric=fabric, progress=silent)
    for name, value in alone.weights.items():
        torch.testing.assert_close(taught.weights[name], value)


# By validation


def plain_climb(times, step, points):
    """The rule of the docstring with plain numbers: the soft factor after each point."""
    passed, ratio, up, last_exponent, begin = 0, 1.0, True, None, None
    ratios = []
    for progress, nll in points:
        now_passed = len([time for time in times if time <= progress])
        if now_passed > passed:
            if begin is not None:
                exponent = math.log(begin[1] / nll) / math.log(progress / begin[0])
                if last_exponent is not None and exponent < last_exponent:
                    up = not up
                last_exponent = exponent
            ratio = ratio * step if up else ratio / step
            passed, begin = now_passed, (progress, nll)
        elif begin is None:
            begin = (progress, nll)
        ratios.append(ratio)
    return ratios


@pytest.mark.parametrize("seed", range(6))
def test_validation_moves_the_ratio_as_the_plain_rule(seed):
    random = np.random.default_rng(seed)
    times = sorted(random.uniform(0, 1, 5))
    points = [((n + 1) / 20, random.uniform(0.1, 2)) for n in range(20)]
    balance = ValidationBalance(times=times[::-1], step=1.5)
    for (progress, nll), ratio in zip(points, plain_climb(times, 1.5, points), strict=True):
        balance.after_validation({"nll": nll, "accuracy": 0.5, "ece": 0.0}, progress)
        weights = balance.adjust({"kl": 0.6, "rkd": 2.0, "ce": 0.4})
        assert sum(weights.values()) == pytest.approx(3.0)
        assert weights["rkd"] / weights["kl"] == pytest.approx(2.0 / 0.6)
        assert weights["kl"] / weights["ce"] == pytest.approx(ratio * 0.6 / 0.4)


def test_validation_turns_round_only_where_the_curve_falls_less_steeply():
    balance = ValidationBalance(times=(0.2, 0.4, 0.8), step=2.0)

    def ratio_after(nll, progress):
        balance.after_validation({"nll": nll}, progress)
        weights = balance.adjust({"kl": 0.5, "ce": 0.5})
        return weights["kl"] / weights["ce"]

    assert ratio_after(1.0, 0.1) == pytest.approx(1)
    assert ratio_after(0.5, 0.2) == pytest.approx(2)  # exponent 1
    assert ratio_after(0.25, 0.4) == pytest.approx(4)  # 1 again, though half as much in NLL
    assert ratio_after(0.20, 0.6) == pytest.approx(4)  # no time has passed
    assert ratio_after(0.15, 0.8) == pytest.approx(2)  # 0.74
    assert ratio_after(0.01, 1.0) == pytest.approx(2)


def test_validation_leaves_out_what_is_not_finite_and_joins_times():
    balance = ValidationBalance(times=(0.1, 0.2, 0.3), step=2.0)
    balance.after_validation({"nll": math.nan}, 0.15)
    assert balance.adjust({"kl": 1.0, "ce": 1.0}) == {"kl": 1.0, "ce": 1.0}
    balance.after_validation({"nll": 0.7}, 0.5)
    assert balance.log_ratio.item() == pytest.approx(math.log(2))
    balance.after_validation({"nll": 0.0}, 0.6)
    assert balance.log_ratio.item() == pytest.approx(math.log(2))


def test_validation_leaves_one_sided_weights_alone():
    balance = ValidationBalance(times=(0.1,), step=2.0)
    balance.after_validation({"nll": 1.0}, 0.5)
    assert balance.adjust({"kl": 0.9, "ce": 0.0}) == {"kl": 0.9, "ce": 0.0}
    assert balance.adjust({"kl": 0.0, "ce": 1.0}) == {"kl": 0.0, "ce": 1.0}


# By uncertainty


def total_of(balance, losses, weights):
    terms = dict(zip(weights, losses, strict=True))
    penalty = balance.observe(terms, weights, nn.Identity())
    adjusted = balance.adjust(weights)
    return sum(adjusted[name] * terms[name] for name in terms) + penalty


def test_uncertainty_starts_with_the_weights_of_the_recipe():
    balance = UncertaintyBalance({"kl": 0.9, "ce": 0.1, "rkd": 2.0})
    weights = {"kl": 0.9, "ce": 0.1, "rkd": 2.0}
    assert {n: w.item() for n, w in balance.adjust(weights).items()} == pytest.approx(weights)
    assert balance.observe({"kl": torch.ones(())}, weights, nn.Identity()).item() == 0


def test_gradients_of_uncertainty_equal_the_formula_and_finite_differences():
    largest, weights = {"kl": 0.9, "ce": 0.4, "rkd": 2.0}, {"kl": 0.3, "ce": 0.4, "rkd": 0.0}
    balance = UncertaintyBalance(largest).double()
    losses = torch.tensor([0.7, 1.3, 5.0], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.2, -0.4, 0.1], dtype=torch.float64, requires_grad=True)

    def total(s, losses):
        del balance.log_variances_T
        balance.log_variances_T = s
        return total_of(balance, losses, weights)

    parameter = balance.log_variances_T
    del parameter
    assert torch.autograd.gradcheck(total, (s, losses))
    gradient, by_loss = torch.autograd.grad(total(s, losses), (s, losses))
    w = np.array([0.3, 0.4, 0.0])
    shares, values = w / np.array([0.9, 0.4, 2.0]), np.array([0.7, 1.3, 5.0])
    precisions = np.exp(-np.array([0.2, -0.4, 0.1]))
    np.testing.assert_allclose(gradient, shares / 2 - w * precisions * values)
    np.testing.assert_allclose(by_loss, w * precisions)
    assert gradient[2] == 0, "a term without weight rests"


def test_uncertainty_learns_twice_the_weighted_loss_as_variance():
    weights = {"kl": 0.8, "ce": 0.2}
    balance = UncertaintyBalance(weights)
    optimizer = torch.optim.SGD(balance.parameters(), lr=0.5)
    losses = torch.tensor([2.0, 0.3])
    for _ in range(400):
        optimizer.zero_grad()
        total_of(balance, losses, weights).backward()
        optimizer.step()
    learnt = balance.log_variances_T.detach().exp().tolist()
    assert learnt == pytest.approx([2 * 0.8 * 2.0, 2 * 0.2 * 0.3], rel=1e-3)
    adjusted = {n: w.item() for n, w in balance.adjust(weights).items()}
    assert adjusted == pytest.approx({"kl": 1 / (2 * 2.0), "ce": 1 / (2 * 0.3)}, rel=1e-3)
    # A schedule that takes half the weight away still does so.
    halved = balance.adjust({"kl": 0.4, "ce": 0.2})
    assert halved["kl"].item() == pytest.approx(adjusted["kl"] / 2)


def test_the_largest_weight_of_a_schedule_is_found():
    settings = DistillSettings.model_validate(
        {"kl_weight": {"start": 0, "end": 2}, "teacher_share": {"start": 1, "end": 0}}
    )
    assert largest_weights(settings) == pytest.approx({"kl": 0.5, "ce": 1.0})


# By the norms of gradients


class Trunk(nn.Module):
    """A shared vector, and one that only the second term reaches."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.own = nn.Parameter(torch.tensor([1.0, 1.0]))

    def terms(self, *, scale=1.0):
        return {
            "kl": scale * self.shared @ torch.tensor([0.6, 0.8]),  # gradient norm 1
            "ce": self.shared.square().sum() / 2 + 7 * self.own.sum(),  # norm 5 where shared
        }


def test_norms_are_those_computed_by_hand_over_what_is_shared():
    trunk = Trunk()
    terms = trunk.terms()
    norms = gradient_norms(terms, list(trunk.parameters()))
    assert norms == pytest.approx({"kl": 1.0, "ce": 5.0})
    assert trunk.shared.grad is None
    sum(terms.values()).backward()  # the graph is still there
    torch.testing.assert_close(trunk.shared.grad, torch.tensor([3.6, 4.8]))
    free = torch.tensor(1.0)
    elsewhere = nn.Parameter(torch.ones(())) * 2
    norms = gradient_norms({**trunk.terms(), "a": free, "b": elsewhere}, list(trunk.parameters()))
    assert norms == pytest.approx({"kl": 1.0, "ce": 5.0})
    assert gradient_norms({"a": free}, list(trunk.parameters())) == {}


def test_weighted_gradients_come_to_the_proportion_of_the_weights():
    trunk = Trunk()
    balance = GradientNormBalance(["kl", "ce", "none"], every_steps=2, smoothing=0.5)
    weights = {"kl": 0.9, "ce": 0.1, "none": 0.0, "other": 3.0}
    assert balance.observe(trunk.terms(), weights, trunk) is None
    adjusted = balance.adjust(weights)
    # w c / G with c = (0.9 * 1 + 0.1 * 5) / 1
    assert adjusted == pytest.approx({"kl": 0.9 * 1.4, "ce": 0.1 * 1.4 / 5, "none": 0, "other": 3})
    norms = {"kl": adjusted["kl"] * 1, "ce": adjusted["ce"] * 5}
    assert norms["kl"] / norms["ce"] == pytest.approx(0.9 / 0.1)
    assert sum(norms.values()) == pytest.approx(0.9 * 1 + 0.1 * 5)
    assert balance.adjust({"kl": 0.0, "ce": 1.0}) == pytest.approx({"kl": 0.0, "ce": 1.0})


def test_norms_are_measured_on_time_once_an_update_and_averaged():
    trunk = Trunk()
    balance = GradientNormBalance(["kl", "ce"], every_steps=2, smoothing=0.75)
    scales = [(1, 9), (50, 50), (3, 9), (70, 70), (2, 9)]  # of both micro-batches
    plain, expected = None, []
    for update, pair in enumerate(scales):
        for scale in pair:
            balance.observe(trunk.terms(scale=scale), {}, trunk)
        balance.after_step()
        if update % 2 == 0:
            plain = pair[0] if plain is None else 0.75 * plain + 0.25 * pair[0]
        expected.append(plain)
        assert balance.norms_T.tolist() == pytest.approx([plain, 5.0])
    assert expected == [1, 1, 1.5, 1.5, 1.625]


def test_gradients_that_are_zero_or_not_finite_do_no_harm():
    trunk = Trunk()
    balance = GradientNormBalance(["kl", "ce"], every_steps=1, smoothing=0.0)
    weights = {"kl": 0.9, "ce": 0.1}
    balance.observe(trunk.terms(scale=math.inf), weights, trunk)
    assert balance.adjust(weights) == pytest.approx(weights)
    balance.after_step()
    balance.observe(trunk.terms(scale=0.0), weights, trunk)
    assert balance.adjust(weights) == pytest.approx(weights)
    balance.after_step()
    balance.observe(trunk.terms(scale=1e-9), weights, trunk)
    assert balance.adjust(weights)["kl"] < 1e6


def distributed_norms(rank):
    """Measure with a share of the data in each process, then back-propagate as usual."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    wrapped = nn.parallel.DistributedDataParallel(network)
    inputs = torch.arange(12.0).view(2, 2, 3)[rank]
    balance = GradientNormBalance(["kl", "ce"], every_steps=1, smoothing=0.0)
    outputs = wrapped(inputs)
    terms = {"kl": outputs.square().mean(), "ce": outputs.sum()}
    balance.observe(terms, {}, wrapped)
    alone = gradient_norms(terms, list(network.parameters()))
    weights = balance.adjust({"kl": 0.5, "ce": 0.5})
    sum(weights[name] * term for name, term in terms.items()).backward()
    return {
        "mean": balance.norms_T,
        "alone": torch.tensor([alone["kl"], alone["ce"]], dtype=torch.float64),
        "gradient": network.weight.grad.clone(),
        "weights": torch.tensor([weights["kl"], weights["ce"]]),
    }


def test_several_processes_come_to_the_same_weights(tmp_path):
    first, second = in_two_processes(distributed_norms, tmp_path)
    assert not torch.equal(first["alone"], second["alone"])
    for found in (first, second):
        torch.testing.assert_close(found["mean"], (first["alone"] + second["alone"]) / 2)
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["gradient"], second["gradient"])
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    outputs = network(torch.arange(12.0).view(4, 3))
    loss = first["weights"][0] * outputs.square().mean() + first["weights"][1] * outputs.sum() / 2
    loss.backward()
    torch.testing.assert_close(first["gradient"], network.weight.grad)


# In the objective and the loop


def test_the_settings_choose_the_balance():
    assert build_balance(balanced("fixed")) is None
    assert isinstance(build_balance(balanced("validation")), ValidationBalance)
    assert isinstance(build_balance(balanced("uncertainty")), UncertaintyBalance)
    chosen = build_balance(balanced("gradient_norm"))
    assert isinstance(chosen, GradientNormBalance)
    assert (chosen.names, chosen.every_steps) == (("kl", "ce", "mse_logits"), 4)
    with pytest.raises(ValidationError, match="times"):
        balanced("validation", balance={"method": "validation", "times": []})


class ScaledError(nn.Module):
    """A term whose gradient is far from the size of the others."""

    def forward(self, seen):
        return 1000 * (seen.logits_NK - seen.teacher.logits_NK).square().mean()


def make_objective(method):
    settings = balanced(method)
    terms = nn.ModuleDict({"mse_logits": ScaledError()})
    return DistillObjective(settings, terms=terms, balance=build_balance(settings))


def test_the_objective_gives_gradients_in_the_proportion_of_the_weights(make_network, digits):
    network, objective = make_network(), make_objective("gradient_norm")
    indices_N = torch.arange(40)
    batch = Batch(indices_N, digits.images(indices_N), digits.labels_N[indices_N])
    output = objective.step(network, batch, Fixed().outputs(batch, view=0), 0.0)
    weights = objective.weights(0.0)
    norms = {
        name: torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    weights[name] * term, network.parameters(), retain_graph=True
                )
            ]
        )
        .norm()
        .item()
        for name, term in output.terms.items()
    }
    assert norms["kl"] / norms["ce"] == pytest.approx(0.7 / 0.3, rel=1e-4)
    assert norms["kl"] / norms["mse_logits"] == pytest.approx(0.7 / 0.2, rel=1e-4)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the loop catches it."""


def kill_after(num_updates):
    def progress(done, total, note=""):
        if done == num_updates:
            raise Killed

    return progress


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_continues_bit_for_bit_with_its_balance(
    make_plan, make_network, fabric, method
):
    def plan_in(folder):
        plan = make_plan(
            folder,
            objective=make_objective(method),
            teacher=Fixed(),
            num_micro_batches=2,
            checkpoint_every_steps=3,
            optimizer={"learning_rate": 0.01},
        )

        def validate(network):
            return {**plan.validate(network), "nll": network.layer.weight.square().mean().item()}

        return type(plan)(plan.feed, plan.objective, plan.settings, validate, plan.folder)

    unbroken = train(make_network(), plan_in("unbroken"), fabric=fabric, progress=silent)
    for num_updates in (7, 20):
        with pytest.raises(Killed):
            train(
                make_network(), plan_in("broken"), fabric=fabric, progress=kill_after(num_updates)
            )
    resumed = train(make_network(), plan_in("broken"), fabric=fabric, progress=silent)
    assert unbroken.parts
    assert unbroken.parts.keys() == resumed.parts.keys()
    for name, value in unbroken.parts.items():
        torch.testing.assert_close(value, resumed.parts[name], rtol=0, atol=0, equal_nan=True)
    for name, value in unbroken.weights.items():
        assert torch.equal(value, resumed.weights[name]), name
    assert [row["train_loss"] for row in unbroken.rows] == [
        row["train_loss"] for row in resumed.rows
    ]
    moved = {
        "validation": lambda parts: parts["balance.log_ratio"],
        "uncertainty": lambda parts: parts["balance.log_variances_T"].abs().min(),
        "gradient_norm": lambda parts: parts["balance.norms_T"].min(),
    }[method](unbroken.parts)
    assert moved != 0
    assert torch.isfinite(moved)
