"""Stage 2, the teacher: loaded from what the user has, or trained; and checked either way."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from understudy.artifacts import Record, atomic_path, content_hash, file_hash
from understudy.evaluate.accuracy import evaluate_logits, predict_logits
from understudy.models.load import load_weights
from understudy.models.onnx_model import external_files
from understudy.progress import log
from understudy.recipes.networks import (
    WEIGHTS_NAME,
    build_model,
    code_section,
    is_onnx,
    model_folder,
    settings_hash,
    trained_model,
)
from understudy.recipes.outputs import validation_accuracy
from understudy.recipes.peers import require_teacher
from understudy.recipes.run import Run
from understudy.recipes.train import train_role
from understudy.teachers.check import check_teacher


def teach(run: Run) -> Record:
    """Load or train and check every teacher; return the first one's record.

    Raises:
        InputError: the strategy has no teacher, or trains it with the student.
    """
    require_teacher(run, doing="load or train first")
    records = [teach_one(run, role) for role in run.teachers]
    return records[0]


def teach_one(run: Run, role: str, *, known_accuracy: float | None = None) -> Record:
    """Return the record of a teacher that is better than chance on the validation split.

    ``known_accuracy`` is its accuracy there, where these weights were checked already.

    Raises:
        CheckpointError: if the weights do not fit the network.
        ModelError: if the teacher is near chance; the likely cause is named.
    """
    split = run.parent("split", "teach")
    training = run.teachers[role].training
    if training is not None:
        record = train_role(run, role)
        # Watched every epoch already: only a teacher near chance has to be looked at again.
        trained = trained_model(run, role, record)
        accuracy = validation_accuracy(run, role)
        check_teacher(trained, run.source, run.splits.validation, accuracy=accuracy)
        return record
    # Where the file lies does not matter, what is in it does.
    section = {"teacher": run.teachers[role].model_dump(mode="json", exclude={"checkpoint"})}
    section |= code_section(run, [role])
    parents = {"split": split.hash, "weights": weights_hash(run, role)}
    folder = model_folder(run.teachers[role].model)
    if folder is not None and run.teachers[role].checkpoint is not None:
        parents["settings"] = settings_hash(folder)  # which the weights' hash has otherwise
    stage = run.begin(role, section=section, parents=parents)
    if stage.record is not None:
        return stage.record
    files: list[str] = []
    model = load_teacher(run, role)
    accuracy = check_accuracy(run, role, model) if known_accuracy is None else known_accuracy
    if not is_onnx(run.teachers[role].model):
        # A copy in a safe format: the run folder stays whole when the checkpoint moves away.
        files.append(WEIGHTS_NAME)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        with atomic_path(stage.folder / WEIGHTS_NAME) as temporary:
            save_file(state, temporary)
    return stage.finish({"validation_accuracy": accuracy}, files=files)


def load_teacher(run: Run, role: str) -> nn.Module:
    """Return a teacher with the weights that the user gave, in eval mode."""
    teacher = run.teachers[role]
    model = build_model(run, role)
    if teacher.checkpoint is not None:
        report = load_weights(model.network, teacher.checkpoint)
        found = f"{report.num_tensors} tensors from {report.path}"
        if report.ignored:
            found += f", {len(report.ignored)} entries that no network needs left out"
        log.info("%s: %s", role, found)
    return model.eval()


def weights_hash(run: Run, role: str) -> str:
    """Return the hash of the weights file or folder, or of the name that a library looks up.

    Of an ONNX file the weights that are stored beside it count.
    """
    teacher = run.teachers[role]
    name = teacher.model.name.removeprefix("transformers:").removeprefix("timm:")
    path = teacher.checkpoint or Path(name)
    if path.is_dir():
        return content_hash([[p.name, file_hash(p)] for p in sorted(path.iterdir()) if p.is_file()])
    if not path.is_file():
        return content_hash(teacher.model.name)
    # The same graph may come with other weights beside it.
    beside = external_files(path) if is_onnx(teacher.model) else []
    if not beside:
        return file_hash(path)
    hashes = [[file.name, file_hash(file)] for file in beside if file.is_file()]
    return content_hash([file_hash(path), hashes])


def check_accuracy(run: Run, role: str, model: nn.Module) -> float:
    """Return the accuracy on the validation split; near chance is an error that says why."""
    indices_N = run.splits.validation
    labels_N = run.source.labels_N[indices_N]
    logits_NK = predict_logits(model, run.source, indices_N)
    metrics = evaluate_logits(logits_NK, labels_N, class_names=run.source.class_names)
    log.info("%s: %.2f %% validation accuracy", role, 100 * metrics.accuracy)
    check_teacher(model, run.source, indices_N, accuracy=metrics.accuracy)
    return metrics.accuracy
