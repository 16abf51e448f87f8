"""Stage 3, the teacher's outputs: computed once for every view, stored, and answered from there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from understudy.artifacts import Record, write_text
from understudy.data.batches import iter_view_batches
from understudy.progress import log, shown_progress
from understudy.recipes.networks import trained_model
from understudy.recipes.outputs import open_entries, stored_hashes
from understudy.recipes.run import Run
from understudy.teachers.inference import Inference, fast_inference
from understudy.teachers.label import label_views
from understudy.teachers.store import StoreKey
from understudy.train.devices import use_threads

RUNTIME_NAME = "runtime"
NUM_SAMPLE_IMAGES = 512


def label(run: Run) -> Record:
    """Store the teacher's outputs for every view of the training split that lacks them."""
    use_threads(run.recipe.device.num_threads)
    teacher = run.parent("teacher", "teach")
    section = run.recipe.section("seed", "views", "labelling")
    parents = {"split": run.parent("split", "teach").hash, "teacher": teacher.hash}
    stage = run.begin(
        "labels",
        section=section,
        parents=parents,
        # What the record describes lies in the store, and may be damaged or gone.
        holds=lambda record: stored_hashes(run) == record.payload["entries"],
    )
    if stage.record is not None:
        return stage.record
    infer = teacher_inference(run, stage.folder)
    with shown_progress("teacher outputs") as progress:
        done = label_views(
            infer,
            run.source,
            run.views,
            run.splits.train,
            entries=open_entries(run),
            batch_size=run.recipe.labelling.batch_size,
            progress=progress,
        )
    return stage.finish(
        {
            "precision": infer.precision,
            "entries": stored_hashes(run),
        },
        timing={
            "runtime": infer.runtime,
            "num_computed": done.num_computed,
            "num_reused": done.num_reused,
            "images_per_second": done.images_per_second,
            "label_seconds": done.seconds,
        },
    )


def teacher_inference(run: Run, folder: Path) -> Inference:
    """Return the teacher in its fastest runtime; a continued stage keeps the one it began with.

    Runtimes of one precision differ in the last bits, and an interrupted run must end as an
    unbroken one does.
    """
    model = trained_model(run, "teacher", run.parent("teacher", "teach"))
    path = folder / RUNTIME_NAME
    images_NCHW = run.source.images(run.splits.train[:NUM_SAMPLE_IMAGES])
    infer = fast_inference(
        model,
        image_shape=run.source.image_shape,
        precision=run.recipe.labelling.precision,
        device="cuda" if uses_gpu(run) else "cpu",
        sample_images_NCHW=images_NCHW,
        runtime=path.read_text() if path.exists() else None,
        num_images=len(run.splits.train) * run.recipe.views.num_views,
    )
    write_text(path, infer.runtime)
    log.info("teacher runs in %s, precision %s", infer.runtime, infer.precision)
    return infer


def uses_gpu(run: Run) -> bool:
    """Return whether the recipe asks for a GPU, and with ``auto`` whether there is one."""
    accelerator = run.recipe.device.accelerator
    return accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())


def recomputation(run: Run) -> Callable[[StoreKey, Tensor], Tensor]:
    """Return the function that computes stored rows again, for ``understudy store verify``."""

    @cache
    def infer() -> Inference:
        return teacher_inference(run, run.folder / "labels")

    def recompute(key: StoreKey, rows_N: Tensor) -> Tensor:
        batches = torch.split(run.splits.train[rows_N], run.recipe.labelling.batch_size)
        shown = iter_view_batches(run.source, run.views, batches, view=key.view)
        return torch.cat([infer()(batch.images_NCHW) for batch in shown])

    return recompute
