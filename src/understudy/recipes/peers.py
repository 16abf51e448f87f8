"""Networks trained beside the student: an online teacher, peers, the student's own average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from understudy.artifacts import Record, atomic_path
from understudy.errors import InputError, problem
from understudy.progress import log
from understudy.recipes.networks import WEIGHTS_NAME, build_model, model_section
from understudy.recipes.run import Run
from understudy.recipes.strategies import EmaTeacher, Mutual, Online
from understudy.train.averaged_teacher import EmaObjective
from understudy.train.distillation import DistillObjective
from understudy.train.objective import Objective
from understudy.train.peers import MutualObjective, OnlineObjective, prefix_of

Validate = Callable[[nn.Module], dict[str, float]]

AVERAGE = "average"


def roles_beside(run: Run) -> list[str]:
    """Return which networks are trained beside the student, in the same updates."""
    strategy = run.recipe.strategy
    if isinstance(strategy, Online):
        return ["teacher"]
    if isinstance(strategy, Mutual):
        return list(run.peers)
    return [AVERAGE] if isinstance(strategy, EmaTeacher) else []


def beside_objective(run: Run, model: nn.Module, alone: DistillObjective) -> Objective:
    """Return the objective of the student and of the networks beside it.

    ``alone`` is what the student minimises given a teacher's outputs; it is returned as it is where
    the strategy trains nothing beside.
    """
    strategy, training, settings = run.recipe.strategy, run.recipe.training, run.recipe.distillation
    smoothing, precision = training.label_smoothing, training.precision
    objective: OnlineObjective | MutualObjective | EmaObjective
    if isinstance(strategy, Online):
        objective = OnlineObjective(
            first_teacher(run),
            alone,
            temperature=settings.temperature,
            teacher_kl_weight=strategy.teacher_kl_weight,
            label_smoothing=smoothing,
            precision=precision,
        )
    elif isinstance(strategy, Mutual):
        peers = [build_model(run, role) for role in run.peers]
        objective = MutualObjective(peers, settings, label_smoothing=smoothing, precision=precision)
    elif isinstance(strategy, EmaTeacher):
        objective = EmaObjective(model, alone, decay=strategy.decay, precision=precision)
    else:
        return alone
    if training.channels_last:
        for network in objective.networks.values():
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return objective


def first_teacher(run: Run) -> nn.Module:
    """Return the online teacher with its first weights: those of a checkpoint, or drawn."""
    from understudy.recipes.teach import load_teacher

    assert run.recipe.teacher is not None, "validated: strategy online needs a teacher section"
    if run.recipe.teacher.has_weights:
        return load_teacher(run, "teacher").train()
    return build_model(run, "teacher")


def first_weights(run: Run) -> dict[str, str]:
    """Return the hash of the weights that an online teacher starts with, if it is given some."""
    from understudy.recipes.teach import weights_hash

    teacher = run.recipe.teacher
    if not isinstance(run.recipe.strategy, Online) or teacher is None or not teacher.has_weights:
        return {}
    return {"teacher_weights": weights_hash(run, "teacher")}


# While training


def networks_of(objective: Objective) -> Mapping[str, nn.Module]:
    """Return the networks that an objective trains beside the student's, by role."""
    networks: Mapping[str, nn.Module] = getattr(objective, "networks", {})
    return networks


def watched(validate: Validate, objective: Objective) -> Validate:
    """Return ``validate`` that tells the networks beside as well, as ``peer1_accuracy``."""
    networks = networks_of(objective)
    if not networks:
        return validate

    def validate_all(network: nn.Module) -> dict[str, float]:
        numbers = validate(network)
        for role, other in networks.items():
            numbers[f"{prefix_of(role)}accuracy"] = validate(other)["accuracy"]
        return numbers

    return validate_all


def file_of(role: str) -> str:
    """Return the name of the file with the last weights of a network beside the student."""
    return f"{role}.safetensors"


def write_beside(folder: Path, objective: Objective) -> None:
    """Write the last weights of the networks that were trained beside the student's."""
    for role, network in networks_of(objective).items():
        state = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
        with atomic_path(folder / file_of(role)) as temporary:
            save_file(state, temporary)


# Afterwards


def beside_facts(run: Run, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return name, model, size and last validation accuracy of the networks beside the student."""
    facts = []
    for role in roles_beside(run):
        built_as = "student" if role == AVERAGE else role
        model = build_model(run, built_as)
        accuracy = rows[-1][f"validation_{prefix_of(role)}accuracy"]
        log.info("%s: %.2f %% validation accuracy", role, 100 * accuracy)
        facts.append(
            {
                "name": role,
                "model": model_section(run, built_as).name,
                "num_params": sum(parameter.numel() for parameter in model.parameters()),
                "validation_accuracy": accuracy,
            }
        )
    return facts


def trains_teacher(run: Run) -> bool:
    """Return whether the teacher's record is made from the student's training."""
    return isinstance(run.recipe.strategy, Online)


def collect_teacher(run: Run) -> Record:
    """Make the teacher's record from the training in which it learned with the student.

    It is the teacher after the last update, whatever the student's training keeps of the student.
    """
    from understudy.recipes.finetune import untuned

    student = run.parent("student", "train")
    stage = run.begin(
        "teacher", section=run.recipe.section("teacher"), parents={"student": student.hash}
    )
    if stage.record is not None:
        return stage.record
    kind = "student" if run.recipe.finetuning is None else untuned("student")
    trained = run.parent(kind, "train")
    with atomic_path(stage.folder / WEIGHTS_NAME) as temporary:
        save_file(load_file(run.folder / kind / file_of("teacher")), temporary)
    accuracy = trained.payload["beside"][0]["validation_accuracy"]
    return stage.finish(
        {"validation_accuracy": accuracy},
        files=[WEIGHTS_NAME],
        timing={"rows": [teacher_row(row) for row in trained.timing["rows"]]},
    )


def teacher_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a row of the student's training says of the teacher."""
    found = {name: row[name] for name in ("epoch", "step", "learning_rate", "num_rollbacks")}
    found["losses"] = {
        name.removeprefix("teacher_"): value
        for name, value in row["losses"].items()
        if name.startswith("teacher_")
    }
    if "validation_teacher_accuracy" in row:
        found["validation_accuracy"] = row["validation_teacher_accuracy"]
    return found


def require_teacher(run: Run, *, doing: str) -> None:
    """Raise InputError where the strategy has no teacher that could be trained or asked first."""
    if run.teaches_first:
        return
    name = run.recipe.strategy.name
    known = "trains its teacher together with the student, and has none"
    raise InputError(
        problem(
            f"strategy {name} {known if trains_teacher(run) else 'has no teacher'} to {doing}",
            expected="a strategy with a teacher that is trained before the student",
            mend=f"Run `understudy train {run.folder}`, or `understudy distill` for all stages.",
        )
    )
