"""A student that the user brings trained: loaded, looked at, and compressed like any other."""

from __future__ import annotations

from pathlib import Path

from understudy.artifacts import Record, file_hash
from understudy.models.build import NormalizedModel
from understudy.models.load import load_weights
from understudy.progress import log
from understudy.recipes.exit_training import save_weights, weight_files
from understudy.recipes.networks import build_model, code_section
from understudy.recipes.outputs import mean_confidence
from understudy.recipes.run import Run
from understudy.recipes.train import training_parents, validation_metrics


def load_student(run: Run, checkpoint: Path) -> Record:
    """Take a trained student's weights from the user's file, and look at it on validation."""
    parents = {record.kind: record.hash for record in training_parents(run, "student")}
    # Where the file lies does not matter, what is in it does.
    parents["weights"] = file_hash(checkpoint)
    section = run.recipe.section("seed", "student") | code_section(run, ["student"])
    stage = run.begin("student", section=section, parents=parents)
    if stage.record is not None:
        return stage.record
    model = given_weights(run)
    save_weights(stage.folder, model.state_dict())
    numbers = {f"validation_{k}": v for k, v in validation_metrics(run)(model.eval()).items()}
    log.info("student: %.2f %% validation accuracy", 100 * numbers["validation_accuracy"])
    rows = [{"epoch": 0, "step": 0, **numbers}]
    payload = {"rows": rows, "num_steps": 0, "num_rollbacks": 0}
    payload["teacher_confidence"] = mean_confidence(run) if run.stores_outputs else None
    return stage.finish(
        payload, files=weight_files(stage.folder), timing={"train_seconds": 0.0, "rows": rows}
    )


def given_weights(run: Run) -> NormalizedModel:
    """Return the student's network, with the user's weights where the recipe names some."""
    model, checkpoint = build_model(run, "student"), run.recipe.student.checkpoint
    if checkpoint is not None:
        load_weights(model.network, checkpoint)
    return model
