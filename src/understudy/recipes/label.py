"""Stage 3, the teacher's outputs: computed once for every view, stored, and answered from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from understudy.artifacts import Record, write_text
from understudy.data.batches import iter_view_batches
from understudy.progress import log, shown_progress
from understudy.recipes.networks import trained_model
from understudy.recipes.outputs import (
    as_one,
    holds_all,
    open_entries,
    sample_pictures,
    stored_hashes,
    stored_teacher,
    teacher_features,
    teacher_identity,
)
from understudy.recipes.peers import require_teacher
from understudy.recipes.run import Run
from understudy.teachers.inference import Inference, fast_inference
from understudy.teachers.label import LabelReport, label_views
from understudy.teachers.live import LiveTeacher
from understudy.teachers.store import LOGITS, StoreKey
from understudy.train.devices import use_threads
from understudy.train.feed import TeacherSource

RUNTIME_NAME = "runtime"


def label(run: Run) -> Record:
    """Store every teacher's outputs for every view of the training split that lacks them."""
    require_teacher(run, doing="label with")
    use_threads(run.num_threads)
    section = run.recipe.section("seed", "views", "labelling")
    del section["labelling"]["batch_size"]  # a matter of speed and rounding
    section["features"] = {
        role: [tap.key for tap in teacher_features(run, role)] for role in run.teachers
    }
    parents = {"split": run.parent("split", "teach").hash}
    parents |= {role: run.parent(role, "teach").hash for role in run.teachers}
    stage = run.begin(
        "labels",
        section=section,
        parents=parents,
        # What the record describes lies in the store, and may be damaged or gone.
        holds=lambda record: holds_all(run, record),
    )
    if stage.record is not None:
        return stage.record
    done = {role: label_with(run, role, stage.folder) for role in run.teachers}
    return stage.finish(
        {
            "precision": {role: infer.precision for role, (infer, _) in done.items()},
            "entries": stored_hashes(run),
        },
        timing={role: {"runtime": i.runtime, **asdict(r)} for role, (i, r) in done.items()},
    )


def label_with(run: Run, role: str, folder: Path) -> tuple[Inference, LabelReport]:
    """Store what is missing of one teacher's outputs."""
    infer = teacher_inference(run, role, folder)
    with shown_progress(f"outputs of the {role}") as progress:
        report = label_views(
            infer.outputs,
            run.source,
            run.views,
            run.splits.train,
            entries=open_entries(run, role),
            batch_size=run.recipe.labelling.batch_size,
            progress=progress,
        )
    return infer, report


def teacher_inference(run: Run, role: str, folder: Path, *, remember: bool = True) -> Inference:
    """Return a teacher in its fastest runtime; a continued stage keeps the one it began with.

    Runtimes of one precision differ in the last bits, and an interrupted run must end as an
    unbroken one does. Without ``remember`` nothing is written.
    """
    model = trained_model(run, role, run.parent(role, "teach"))
    path = folder / f"{RUNTIME_NAME}-{role}"
    images_NCHW = run.source.images(sample_pictures(run))
    infer = fast_inference(
        model,
        image_shape=run.source.image_shape,
        precision=run.recipe.labelling.precision,
        device="cuda" if uses_gpu(run) else "cpu",
        sample_images_NCHW=images_NCHW,
        runtime=path.read_text() if path.exists() else None,
        num_images=len(run.splits.train) * run.recipe.views.num_views,
        taps=teacher_features(run, role),
    )
    if remember:
        write_text(path, infer.runtime)
    log.info("%s runs in %s, precision %s", role, infer.runtime, infer.precision)
    return infer


def teacher_source(run: Run) -> TeacherSource:
    """Return the teacher that the student learns from: stored, or run on every batch."""
    if run.stores_outputs:
        return stored_teacher(run)
    num_classes = len(run.source.class_names)
    return as_one(
        run,
        [
            LiveTeacher(
                teacher_inference(run, role, run.folder / "student").outputs,
                num_classes=num_classes,
            )
            for role in run.teachers
        ],
    )


def uses_gpu(run: Run) -> bool:
    """Return whether the recipe asks for a GPU, and with ``auto`` whether there is one."""
    accelerator = run.recipe.device.accelerator
    return accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())


def recomputation(run: Run) -> Callable[[StoreKey, Tensor], Tensor]:
    """Return the function that computes stored rows again, for ``understudy store verify``."""

    identities = {
        teacher_identity(run, role, run.parent(role, "teach")): role for role in run.teachers
    }

    @cache
    def infer(role: str) -> Inference:
        return teacher_inference(run, role, run.folder / "labels", remember=False)

    def recompute(key: StoreKey, rows_N: Tensor) -> Tensor:
        batches = torch.split(run.splits.train[rows_N], run.recipe.labelling.batch_size)
        shown = iter_view_batches(run.source, run.views, batches, view=key.view)
        outputs = [infer(identities[key.teacher]).outputs(b.images_NCHW) for b in shown]
        if key.output == LOGITS:
            return torch.cat([output.logits_NK for output in outputs])
        return torch.cat([output.features[key.output] for output in outputs])

    return recompute
