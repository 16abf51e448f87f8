"""Stage 2, the teacher: loaded from what the user has, or trained; and checked either way."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from understudy.artifacts import Record, atomic_path, content_hash, file_hash
from understudy.evaluate.accuracy import evaluate_logits, predict_logits
from understudy.models.load import load_weights
from understudy.progress import log
from understudy.recipes.networks import WEIGHTS_NAME, build_model, is_onnx, trained_model
from understudy.recipes.run import Run
from understudy.recipes.train import train_role
from understudy.teachers.check import check_teacher


def teach(run: Run) -> Record:
    """Return the record of a teacher that is better than chance on the validation split.

    Raises:
        CheckpointError: if the weights do not fit the network.
        ModelError: if the teacher is near chance; the likely cause is named.
    """
    split = run.parent("split", "teach")
    training = run.recipe.teacher.training
    if training is not None:
        record = train_role(run, "teacher")
        # Watched every epoch already: only a teacher near chance has to be looked at again.
        accuracies = [row.get("validation_accuracy", 0.0) for row in record.payload["rows"]]
        accuracy = max(accuracies) if training.keep == "best" else accuracies[-1]
        trained = trained_model(run, "teacher", record)
        check_teacher(trained, run.source, run.splits.validation, accuracy=accuracy)
        return record
    section = run.recipe.section("teacher")
    parents = {"split": split.hash, "weights": weights_hash(run)}
    stage = run.begin("teacher", section=section, parents=parents)
    if stage.record is not None:
        return stage.record
    files: list[str] = []
    model = load_teacher(run)
    accuracy = check_accuracy(run, model)
    if not is_onnx(run.recipe.teacher.model):
        # A copy in a safe format: the run folder stays whole when the checkpoint moves away.
        files.append(WEIGHTS_NAME)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        with atomic_path(stage.folder / WEIGHTS_NAME) as temporary:
            save_file(state, temporary)
    return stage.finish({"validation_accuracy": accuracy}, files=files)


def load_teacher(run: Run) -> nn.Module:
    """Return a teacher with the weights that the user gave, in eval mode."""
    teacher = run.recipe.teacher
    model = build_model(run, teacher.model, "teacher")
    if teacher.checkpoint is not None:
        report = load_weights(model.network, teacher.checkpoint)
        found = f"{report.num_tensors} tensors from {report.path}"
        if report.ignored:
            found += f", {len(report.ignored)} entries that no network needs left out"
        log.info("teacher: %s", found)
    return model.eval()


def weights_hash(run: Run) -> str:
    """Return the hash of the weights file, or of the name where a library finds the weights."""
    teacher = run.recipe.teacher
    path = teacher.checkpoint or Path(teacher.model.name)
    return file_hash(path) if path.is_file() else content_hash(teacher.model.name)


def check_accuracy(run: Run, model: nn.Module) -> float:
    """Return the accuracy on the validation split; near chance is an error that says why."""
    indices_N = run.splits.validation
    labels_N = run.source.labels_N[indices_N]
    logits_NK = predict_logits(model, run.source, indices_N)
    metrics = evaluate_logits(logits_NK, labels_N, class_names=run.source.class_names)
    log.info("teacher: %.2f %% validation accuracy", 100 * metrics.accuracy)
    check_teacher(model, run.source, indices_N, accuracy=metrics.accuracy)
    return metrics.accuracy
