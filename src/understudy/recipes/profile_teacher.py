"""Runs one teacher in one fresh process and prints how fast it labels, with what memory and energy.

Started as a script by ``rank_profile.measure_fresh``: threads, allocator and caches of a process
that has trained networks would be measured too.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

MIN_BATCHES = 5


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load the teacher, label until the time is up. See ``measure_fresh`` for the request."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from understudy.evaluate.artifact_process import peak_memory_bytes
    from understudy.evaluate.energy import measure_energy_here
    from understudy.models.build import NormalizedModel, build_network
    from understudy.models.onnx_model import OnnxModel
    from understudy.teachers.inference import fast_inference

    torch.set_num_threads(request["num_threads"])
    images_NCHW = torch.from_numpy(np.load(request["images"]))
    forget_peak()
    baseline_bytes = peak_memory_bytes()
    shape, name = tuple(request["image_shape"]), request["model"]
    network: torch.nn.Module
    if name.endswith(".onnx"):
        network = OnnxModel(
            Path(name), num_classes=request["num_classes"], image_shape=request["image_shape"]
        )
    else:
        network = build_network(
            name,
            num_classes=request["num_classes"],
            image_shape=shape,
            arguments=request["arguments"],
        )
    model = NormalizedModel(network, **request["conversions"]).eval()
    if request["weights"] is not None:
        model.load_state_dict(load_file(request["weights"]))
    infer = fast_inference(
        model,
        image_shape=shape,
        precision=request["precision"],
        device=request["device"],
        sample_images_NCHW=images_NCHW,
        runtime=request["runtime"],
    )
    size = request["batch_size"]
    seconds = seconds_of_batches(
        infer, images_NCHW, batch_size=size, min_seconds=request["min_seconds"]
    )
    peak_bytes = peak_memory_bytes()
    batch_NCHW = batch_of(images_NCHW, 0, size)
    energy = measure_energy_here(
        lambda: infer(batch_NCHW), device=request["device"], images_a_run=size
    )
    return {
        "seconds": seconds,
        "peak_memory_bytes": peak_bytes,
        "baseline_memory_bytes": baseline_bytes,
        "energy": energy.to_json(),
    }


def seconds_of_batches(
    infer: Any, images_NCHW: Any, *, batch_size: int, min_seconds: float
) -> list[float]:
    """Return the time of each batch, the first one left out."""
    infer(batch_of(images_NCHW, 0, batch_size))
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < MIN_BATCHES or time.perf_counter() - started < min_seconds:
        batch_NCHW = batch_of(images_NCHW, len(seconds), batch_size)
        begun = time.perf_counter()
        infer(batch_NCHW)
        seconds.append(time.perf_counter() - begun)
    return seconds


def batch_of(images_NCHW: Any, number: int, size: int) -> Any:
    """Return real pictures in turn, so that one batch does not stay in the caches."""
    return images_NCHW[[(number * size + row) % len(images_NCHW) for row in range(size)]]


def forget_peak() -> None:
    """Let the peak of resident memory count from here on, where the system can do that."""
    # Where it cannot, what the imports took for a moment counts as the baseline.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    json.dump(measure(json.loads(sys.argv[1])), sys.stdout)
