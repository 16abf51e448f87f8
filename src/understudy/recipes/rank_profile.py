"""What a candidate teacher is and costs: accuracy, size, labelling throughput, memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from understudy.artifacts import Record, atomic_path
from understudy.errors import UnderstudyError, problem
from understudy.evaluate.accuracy import predict_logits
from understudy.models.cost import model_cost
from understudy.progress import shown_progress
from understudy.recipes import profile_teacher
from understudy.recipes.label import teacher_inference, uses_gpu
from understudy.recipes.networks import (
    WEIGHTS_NAME,
    conversions,
    is_onnx,
    trained_model,
)
from understudy.recipes.outputs import sample_pictures
from understudy.recipes.run import Run
from understudy.recipes.sections import TeacherSection
from understudy.runtime import num_usable_cores

RIGHT_NAME = "right.safetensors"
PROFILE_NAME = "profile"
TIMEOUT_S = 600.0


def profile(run: Run) -> Record:
    """Return the record of what a run's teacher does on the validation split and costs here.

    Raises:
        UnderstudyError: the teacher cannot be run in a process of its own.
    """
    teacher = run.parent("teacher", "teach")
    section = run.recipe.section("labelling", "device", "views", "measurement")
    section["num_threads"] = run.recipe.device.num_threads  # which times depend on
    stage = run.begin(PROFILE_NAME, section=section, parents={"teacher": teacher.hash})
    if stage.record is not None:
        return stage.record
    infer = teacher_inference(run, "teacher", stage.folder)
    with shown_progress("validating the teacher") as progress:
        logits_NK = predict_logits(
            infer,
            run.source,
            run.splits.validation,
            batch_size=run.recipe.labelling.batch_size,
            progress=progress,
        )
    save_right(stage.folder, logits_NK.argmax(1) == run.source.labels_N[run.splits.validation])
    cost = model_cost(trained_model(run, "teacher", teacher), run.source.image_shape)
    measured = measure_fresh(run, teacher, runtime=infer.runtime)
    return stage.finish(
        {"cost": asdict(cost)},
        files=[RIGHT_NAME],
        timing={"runtime": infer.runtime, "precision": infer.precision, **measured},
    )


def throughput_facts(run: Run, record: Record) -> dict[str, Any]:
    """Return the fields of a ``Throughput`` from a profile."""
    size, timing = run.recipe.labelling.batch_size, record.timing
    return {
        "runtime": timing["runtime"],
        "precision": timing["precision"],
        "images_per_second": size / statistics.median(timing["seconds"]),
        "slowest": size / max(timing["seconds"]),
        "fastest": size / min(timing["seconds"]),
        "batch_size": size,
        "num_batches": len(timing["seconds"]),
        "num_threads": timing["num_threads"],
    }


def measure_fresh(run: Run, teacher: Record, *, runtime: str) -> dict[str, Any]:
    """Label real pictures with the teacher in a new process; return what ``measure`` returns."""
    section = run.teachers["teacher"]
    weights = run.folder / "teacher" / WEIGHTS_NAME
    images_NCHW = run.source.images(sample_pictures(run))
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        images_path = Path(folder) / "images.npy"
        np.save(images_path, images_NCHW.numpy())
        request = {
            "model": section.model.name,
            "arguments": section.model.arguments,
            "num_classes": len(run.source.class_names),
            "image_shape": run.source.image_shape,
            "conversions": conversions(run, "teacher"),
            "weights": None if is_onnx(section.model) else str(weights.absolute()),
            "images": str(images_path),
            "batch_size": run.recipe.labelling.batch_size,
            "num_threads": run.recipe.device.num_threads or num_usable_cores(),
            "precision": run.recipe.labelling.precision,
            "device": "cuda" if uses_gpu(run) else "cpu",
            "runtime": runtime,
            "min_seconds": run.recipe.measurement.min_seconds,
        }
        # -P keeps the script's folder, and the modules in it, off the import path.
        command = [sys.executable, "-P", profile_teacher.__file__, json.dumps(request)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise failure(section, f"not done after {TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise failure(section, lines[-1])
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "num_threads": request["num_threads"]}


def failure(section: TeacherSection, reason: str) -> UnderstudyError:
    """Return the error of a teacher that cannot be measured."""
    return UnderstudyError(
        problem(
            f"measuring the teacher {section.model.name} failed ({reason})",
            expected="it to run in a process of its own",
            mend="Lower labelling.batch_size if memory is short; otherwise drop this candidate.",
        )
    )


def save_right(folder: Path, right_N: Tensor) -> None:
    """Write which pictures of the validation split are answered rightly."""
    with atomic_path(folder / RIGHT_NAME) as temporary:
        save_file({"right_N": right_N.to(torch.uint8)}, temporary)


def load_right(folder: Path) -> Tensor:
    """Return which pictures of the validation split are answered rightly, bool."""
    return load_file(folder / RIGHT_NAME)["right_N"].bool()
