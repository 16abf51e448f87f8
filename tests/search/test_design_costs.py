"""What candidates cost against plain references, and which limits leave them out."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from understudy.evaluate.budget import Budget
from understudy.recipes import design_costs
from understudy.recipes.design_costs import Candidate, counts_fit
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe

SEPARABLE = {"stages": [[8, 1], [12, 2], [16, 1]], "depth": 1, "kernel": 3}
KNOWN = Candidate(
    number=1, name="mlp", arguments={}, num_params=1000, macs=900, peak_activation_bytes=4000,
    model_size_bytes=5000, latency_ms=8.0, step_ms=36.0, peak_memory_bytes=70_000,
)  # fmt: skip


def digits_run(folder, changes=None, **budget):
    values = {
        "name": "costs",
        "data": {"source": "digits"},
        "teacher": {"model": {"name": "mlp"}, "training": {"num_epochs": 1}},
        "student": {"model": {"name": "mlp"}},
        "training": {"num_epochs": 10, "batch_size": 64},
        "measurement": {"min_seconds": 0.02},
        "budget": budget,
        "device": {"num_threads": 1},
    }
    values |= changes or {}
    return Run(parse_recipe(values), folder, folder / "home")


def test_counts_are_what_hooks_on_every_layer_give(tmp_path):
    run = digits_run(tmp_path)
    found = design_costs.counted(run, 3, "separable", SEPARABLE)
    model = design_costs.candidate_model(run, "separable", SEPARABLE).eval()
    macs, largest = [], []

    def look(layer, inputs, output):
        macs.append(layer.weight[0].numel() * output.numel())
        largest.append(4 * (inputs[0].numel() + output.numel()))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(look)
    with torch.no_grad():
        model(torch.zeros(1, 1, 8, 8))
    assert found.macs == sum(macs)
    assert found.num_params == sum(p.numel() for p in model.parameters())
    assert found.num_params == design_costs.num_params_of(run, "separable", SEPARABLE)
    assert found.peak_activation_bytes == max(largest)


def test_times_are_measured_and_memory_where_it_is_limited(tmp_path, monkeypatch):
    run = digits_run(
        tmp_path,
        latency_ms={"batch": 4, "at_most": 1000, "percentile": 50},
        peak_memory_bytes=10**10,
    )
    measured, asked = design_costs.measure_memory, []
    monkeypatch.setattr(
        design_costs,
        "measure_memory",
        lambda *given, **options: asked.append(options) or measured(*given, **options),
    )
    found = design_costs.timed(run, design_costs.counted(run, 1, "separable", SEPARABLE), tmp_path)
    assert found.latency_ms > 0
    assert asked == [{}]  # a picture and a thread, as of the file that is exported later
    assert found.step_ms > 0
    assert found.model_size_bytes > 4 * found.num_params
    assert found.peak_memory_bytes > 10**7
    assert design_costs.times_fit(run, found)
    assert list(tmp_path.glob("*.onnx")) == []


@pytest.mark.parametrize(
    ("limit", "kept", "broken"),
    [
        ("num_params", 1000, 999),
        ("macs", 900, 899),
        ("model_size_bytes", 4000, 3999),
        ("flash_bytes", 1000, 999),
        ("ram_bytes", 1000, 999),
    ],
)
def test_a_count_at_the_limit_is_kept_and_above_it_is_not(limit, kept, broken):
    assert counts_fit(KNOWN, Budget(**{limit: kept}))
    assert not counts_fit(KNOWN, Budget(**{limit: broken}))


@pytest.mark.parametrize(
    ("limit", "kept", "broken"),
    [
        ("latency_ms", {"at_most": 9}, {"at_most": 8.8}),
        ("model_size_bytes", 5000, 4999),
        ("peak_memory_bytes", 70_000, 69_999),
    ],
)
def test_times_need_a_margin_and_sizes_none(tmp_path, limit, kept, broken):
    assert design_costs.times_fit(digits_run(tmp_path, **{limit: kept}), KNOWN)
    assert not design_costs.times_fit(digits_run(tmp_path, **{limit: broken}), KNOWN)


def test_hours_of_training_are_steps_times_their_time(tmp_path):
    run = digits_run(tmp_path)
    steps = 10 * (len(run.splits.train) // 64)
    hours = steps * 0.036 / 3600
    assert design_costs.train_hours(run, KNOWN) == pytest.approx(hours)
    slow = replace(KNOWN, step_ms=2 * KNOWN.step_ms)
    limited = digits_run(tmp_path, train_hours=1.5 * hours)
    assert design_costs.times_fit(limited, KNOWN)
    assert not design_costs.times_fit(limited, slow)


FEATURES = {"losses": {"rkd": {}, "dist": {}}}


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, ""),
        ({"distillation": {"losses": {"dist": {}}}}, ""),
        ({"distillation": FEATURES}, "rkd"),
        ({"device": {"accelerator": "cuda"}}, "GPU"),
        ({"device": {"num_processes": 2}}, "2 processes"),
        ({"training": {"precision": "bfloat16", "compile": True}}, "bfloat16 and no compiled"),
        ({"strategy": {"name": "mutual"}, "teacher": None}, "strategy mutual"),
        ({"labelling": {"live": True}}, "teacher that answers live"),
    ],
)
def test_hours_are_a_limit_only_where_the_measured_step_is_that_of_the_training(
    tmp_path, changes, missing
):
    run = digits_run(tmp_path, changes, train_hours=1e-9)
    assert design_costs.untimed(run).startswith(missing)
    assert bool(design_costs.untimed(run)) == bool(missing)
    assert design_costs.times_fit(run, KNOWN) == bool(missing)


def test_a_candidate_is_normalised_as_the_recipes_student(tmp_path):
    student = {"model": {"name": "mlp", "normalization": {"mean": [0.5], "std": [0.25]}}}
    run = digits_run(tmp_path, {"student": student})
    other = design_costs.with_student(run, "separable", SEPARABLE).recipe.student.model
    assert (other.name, other.arguments) == ("separable", SEPARABLE)
    assert other.normalization.mean == (0.5,)
