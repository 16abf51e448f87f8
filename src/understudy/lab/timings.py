"""Seconds that the lab's tables print, and which processor they are of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from understudy.artifacts import Record
from understudy.evaluate.accuracy import predict_logits
from understudy.recipes.job import open_run
from understudy.recipes.networks import trained_model

BATCH_SIZE = 100  # of the paper
NUM_TIMED = 2000


def inference_seconds(recipe: Mapping[str, Any], folder: Path, role: str, record: Record) -> float:
    """Return the time of 10,000 pictures in batches of 100, from a pass over up to 2,000.

    On the CPU, wherever the network was trained.
    """
    run = open_run(recipe, out=folder)
    model = trained_model(run, role, record).eval()
    indices_N = run.splits.validation[:NUM_TIMED]
    with torch.inference_mode():
        predict_logits(model, run.source, indices_N[: 2 * BATCH_SIZE], batch_size=BATCH_SIZE)
        started = time.perf_counter()
        predict_logits(model, run.source, indices_N, batch_size=BATCH_SIZE)
    return (time.perf_counter() - started) * 10_000 / len(indices_N)


def labelling_seconds(labels: Record) -> float | None:
    """Return the time of a teacher's pass over the training pictures, from its pictures a second.

    The stage's own time would be that of the last process: of what an interrupted one left, or of
    nothing where the shared store had the outputs. None: this run computed none.
    """
    report = labels.timing["teacher"]
    if not report["num_computed"]:
        return None
    num_rows: int = report["num_computed"] + report["num_reused"]
    seconds: float = num_rows / report["images_per_second"]
    return seconds


def gpu_of(record: Record) -> str | None:
    """Return the name of the GPU that made a training's record; None: it was the CPU."""
    if record.recipe["device"]["accelerator"] == "cpu":
        return None
    return record.hardware.get("gpu")
