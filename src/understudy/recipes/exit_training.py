"""The student with its side heads: built, trained, stored and loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from understudy.artifacts import Record, atomic_path
from understudy.errors import InputError, problem
from understudy.heads.adapters import build_adapter
from understudy.heads.exits import ExitNetwork, add_exits, check_exits, exit_macs, split_weights
from understudy.models.feature_kinds import kind_shape
from understudy.models.taps import EMBEDDING, check_taps, tap_shapes
from understudy.recipes.networks import WEIGHTS_NAME, build_model, trained_model
from understudy.recipes.run import Run
from understudy.recipes.strategies import DeepToShallow
from understudy.train.exit_settings import ExitGuidance
from understudy.train.exits import ExitHint, ExitObjective
from understudy.train.objective import Objective
from understudy.train.plan import TrainPlan

EXITS_NAME = "exits.safetensors"


def exit_layers(run: Run) -> tuple[str, ...]:
    """Return the student's layers that get a side head."""
    if run.recipe.exits is not None:
        return run.recipe.exits.layers
    strategy = run.recipe.strategy
    return strategy.layers if isinstance(strategy, DeepToShallow) else ()


def training_section(run: Run) -> dict[str, Any]:
    """Return what a student's training depends on of the recipe's exits: not the policy."""
    exits = run.recipe.exits
    return {} if exits is None else {"exits": exits.model_dump(mode="json", exclude={"policy"})}


def with_exits(
    run: Run, role: str, model: nn.Module, plan: TrainPlan, *, before: Path | None = None
) -> tuple[nn.Module, TrainPlan]:
    """Return network and plan of a training with the student's side heads and their losses.

    All other networks, and a student without exits, are returned as they are.

    Args:
        before: the folder of a training that this one goes on from, the heads included.
    """
    if role != "student" or not exit_layers(run):
        return model, plan
    network = build_exits(run, model)
    if before is not None:
        network.heads.load_state_dict(load_file(before / EXITS_NAME))
    objective = exit_objective(
        run, network, plan.objective, label_smoothing=plan.settings.label_smoothing
    )
    return network, dataclasses.replace(plan, objective=objective)


def build_exits(run: Run, model: nn.Module) -> ExitNetwork:
    """Return a student with side heads as the recipe describes them, from their own seed."""
    torch.manual_seed(run.seed_for("weights", "exits"))
    exits, strategy = run.recipe.exits, run.recipe.strategy
    channels = exits.head_channels if exits is not None else None
    if isinstance(strategy, DeepToShallow) and exits is None:
        channels = strategy.head_channels
    return add_exits(
        model,
        run.source.image_shape,
        exit_layers(run),
        num_classes=len(run.source.class_names),
        channels=channels,
    )


def exit_objective(
    run: Run, network: ExitNetwork, last: Objective, *, label_smoothing: float
) -> ExitObjective:
    """Return the losses of the side heads around those of the last exit."""
    recipe, strategy = run.recipe, run.recipe.strategy
    if isinstance(strategy, DeepToShallow):
        guidance = ExitGuidance(
            ce_weight=1 - strategy.guidance_weight,
            teacher_weight=0,
            last_weight=strategy.guidance_weight,
            temperature=strategy.temperature,
        )
        return ExitObjective(
            last,
            guidance,
            label_smoothing=label_smoothing,
            hint=None if strategy.hint_weight == 0 else exit_hint(run, network),
            hint_weight=strategy.hint_weight,
        )
    assert recipe.exits is not None, "there are layers with side heads"
    return ExitObjective(
        last,
        recipe.exits.guidance,
        temperature=recipe.distillation.temperature,
        label_smoothing=label_smoothing,
        teacher_share=recipe.distillation.teacher_share,
    )


def exit_hint(run: Run, network: ExitNetwork) -> ExitHint:
    """Return the comparison of the exits' layers with the last one, through new adapters."""
    torch.manual_seed(run.seed_for("weights", "exit adapters"))
    shapes = tap_shapes(network.model, run.source.image_shape)
    adapters = [
        build_adapter("auto", kind_shape(shapes[name], "pooled"), shapes[EMBEDDING], where=name)
        for name in network.layers
    ]
    return ExitHint(network.model, network.layers, adapters)


def save_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a trained network: the model's weights, and those of side heads in a second file."""
    model, heads = split_weights(weights)
    for name, part in ((EXITS_NAME, heads), (WEIGHTS_NAME, model)):
        if part:
            with atomic_path(folder / name) as temporary:
                save_file({key: value.contiguous() for key, value in part.items()}, temporary)


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that ``save_weights`` wrote."""
    return [name for name in (WEIGHTS_NAME, EXITS_NAME) if (folder / name).exists()]


def trained_exits(run: Run, record: Record) -> ExitNetwork:
    """Return the student of a record with its trained side heads, in eval mode.

    Raises:
        InputError: it was trained without side heads, or with others.
    """
    network = build_exits(run, trained_model(run, "student", record))
    heads = load_file(run.folder / record.kind / EXITS_NAME) if EXITS_NAME in record.files else {}
    expected = {name: value.shape for name, value in network.heads.state_dict().items()}
    if {name: value.shape for name, value in heads.items()} != expected:
        raise InputError(
            problem(
                f"{run.folder}: the student was trained {'with other' if heads else 'without'} "
                "side heads",
                expected=f"side heads at {', '.join(network.layers)}",
                mend=f"Run `understudy distill {run.folder}`, which trains it with them.",
            )
        )
    network.heads.load_state_dict(heads)
    return network.eval()


def check_early_exits(run: Run) -> list[str]:
    """Return what is wrong with exits before anything runs; the student can be built already."""
    recipe, layers = run.recipe, exit_layers(run)
    if not layers:
        return []
    model, shape = build_model(run, "student"), run.source.image_shape
    strategy = recipe.strategy
    is_own_teacher = isinstance(strategy, DeepToShallow)
    where = "exits.layers" if recipe.exits is not None else "strategy.layers"
    problems = check_exits(model, shape, layers, where=where)
    if isinstance(strategy, DeepToShallow):
        problems += check_taps(model, shape, [EMBEDDING], where="strategy.deep_to_shallow")
        if recipe.exits is not None and set(layers) != set(strategy.layers):
            problems.append(
                problem(
                    f"strategy.layers is {list(strategy.layers)} and exits.layers {list(layers)}",
                    expected="the same layers",
                    mend="Name the same in both, or drop exits.",
                )
            )
        if recipe.training.compile and strategy.hint_weight != 0:
            problems.append(
                problem(
                    "training.compile together with strategy.hint_weight",
                    expected="one of them",
                    mend="Set training.compile to false, or strategy.hint_weight to 0.",
                )
            )
    if problems or recipe.exits is None:
        return problems
    guidance = recipe.exits.guidance
    own_weights = (guidance.ce_weight, guidance.last_weight)
    if not run.teaches_first and not is_own_teacher and own_weights == (0, 0):
        problems.append(
            problem(
                "exits.guidance has only teacher_weight, and there is no trained teacher",
                expected="something that the side heads learn",
                mend="Give ce_weight or last_weight.",
            )
        )
    return problems + check_mean_macs(run, model)


def check_mean_macs(run: Run, model: nn.Module) -> list[str]:
    """A mean cost below that of the first exit cannot be reached, and is known before training."""
    assert run.recipe.exits is not None, "there are exits"
    policy = run.recipe.exits.policy
    if policy.target != "mean_macs":
        return []
    macs = exit_macs(build_exits(run, model), run.source.image_shape)
    if policy.at_most >= macs[0]:
        return []
    return [
        problem(
            f"exits.policy asks for mean_macs of at most {policy.at_most:g}, and leaving at the "
            f"first exit costs {macs[0]:,}",
            expected=f"between {macs[0]:,} and {macs[-1]:,}",
            mend="Raise it, or put the first exit at an earlier layer.",
        )
    ]
