"""Stage 6, the file that ships: exported, compared with the model, and measured in its runtime."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from understudy.artifacts import Record
from understudy.data.splits import spread
from understudy.evaluate.accuracy import evaluate_logits
from understudy.evaluate.latency import measure_latency
from understudy.evaluate.memory import measure_memory
from understudy.export.onnx_file import export_onnx
from understudy.export.onnx_run import onnx_logits
from understudy.export.parity import check_parity, require_parity
from understudy.progress import log, shown_progress
from understudy.recipes.networks import trained_model
from understudy.recipes.run import Run

MODEL_NAME = "student.onnx"


def export(run: Run) -> Record:
    """Write the student as ONNX, prove that it computes the same, and measure it.

    Raises:
        ParityError: if the file differs from the model by more than the tolerance.
    """
    student = run.parent("student", "train")
    section = run.recipe.section("export", "measurement", "budget") | parity_section(run)
    parents = {"student": student.hash}
    stage = run.begin("export", section=section, parents=parents)
    if stage.record is not None:
        return stage.record
    path = stage.folder / MODEL_NAME
    options, source = run.recipe.export, run.source
    model = trained_model(run, "student", student)
    facts = export_onnx(
        model,
        path,
        image_shape=source.image_shape,
        class_names=source.class_names,
        opset=options.opset,
        metadata={"recipe_hash": student.key},
    )
    test_N = run.splits.test
    parity = check_parity(
        model,
        path,
        source.images(parity_pictures(run)),
        tolerance=options.parity_tolerance,
    )
    require_parity(parity, path)
    log.info("export: %s, %d bytes, parity %.2g", path, facts.size_bytes, parity.max_abs_difference)
    metrics = evaluate_logits(
        onnx_logits(path, source, test_N), source.labels_N[test_N], class_names=source.class_names
    )
    measured = measure(run)
    return stage.finish(
        {
            "facts": facts.to_json(),
            "parity": parity.to_json(),
            "runtime_accuracy": metrics.accuracy,
        },
        files=[MODEL_NAME],
        timing=measured,
    )


def parity_pictures(run: Run) -> Tensor:
    """Return the test pictures that files and network must agree on."""
    return spread(run.splits.test, run.recipe.export.num_parity_images)


def parity_section(run: Run) -> dict[str, str]:
    """Return what a key says of those pictures where they are not the whole split.

    They were its first ones once: what was found on those is found again.
    """
    is_part = len(run.splits.test) > run.recipe.export.num_parity_images
    return {"parity_pictures": "spread"} if is_part else {}


def measure(run: Run) -> dict[str, Any]:
    """Time the exported file, with the setting that the budget asks for among the others."""
    options, limit = run.recipe.measurement, run.recipe.budget.latency_ms
    batch_sizes, num_threads = list(options.batch_sizes), list(options.num_threads or (1, "all"))
    if limit is not None:
        batch_sizes.append(limit.batch)
        num_threads.append(limit.threads)
    path = run.folder / "export" / MODEL_NAME
    images_NCHW = run.source.images(run.splits.test[: max(batch_sizes)]).numpy()
    with shown_progress("measuring the exported file") as progress:
        latency = measure_latency(
            path,
            images_NCHW,
            batch_sizes=batch_sizes,
            num_threads=num_threads,  # type: ignore[arg-type]
            min_seconds=options.min_seconds,
            progress=progress,
        )
    memory = measure_memory(path, images_NCHW)
    return {"latency": latency.to_json(), "memory": memory.to_json()}
