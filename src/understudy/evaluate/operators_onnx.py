"""Where the time of one batch goes: a row for each kind of operator in ONNX Runtime."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from understudy.errors import UnderstudyError, problem
from understudy.evaluate.operators import (
    NUM_RUNS,
    NUM_WARMUP,
    OperatorSum,
    OperatorTable,
    check_batch,
    float_pixels,
    median_ms,
    median_rows,
    with_shares,
)
from understudy.runtime import processor_name


def onnx_operators(
    path: Path, images_NCHW: Tensor, *, num_threads: int = 1, num_runs: int = NUM_RUNS
) -> OperatorTable:
    """Profile an ONNX file in ONNX Runtime with one batch of uint8 images.

    Operators are those that it runs after its own fusions. Memory is that of their outputs.

    Raises:
        InputError: the images are not a batch of bytes, or a count is below 1.
        UnderstudyError: ONNX Runtime fails on the file or the images.
    """
    import onnxruntime

    check_batch(images_NCHW, num_threads=num_threads, num_runs=num_runs)
    pixels_NCHW = float_pixels(images_NCHW).numpy()
    try:
        with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
            plain, profiled = (
                _session(path, num_threads, prefix) for prefix in (None, f"{folder}/profile")
            )
            feed = {plain.get_inputs()[0].name: pixels_NCHW}
            total_ms = median_ms(lambda: plain.run(None, feed), num_runs)
            for _ in range(NUM_WARMUP + num_runs):
                profiled.run(None, feed)
            events = json.loads(Path(profiled.end_profiling()).read_text())
    # ONNX Runtime's exceptions have no common base but Exception.
    except Exception as error:
        raise UnderstudyError(
            problem(
                f"profiling {path} failed ({error})",
                expected="an ONNX file and images that fit it",
                mend="Export the model again.",
            )
        ) from error
    return OperatorTable(
        name=path.name,
        runtime="ONNX Runtime",
        rows=with_shares(median_rows(_onnx_runs(events)[NUM_WARMUP:])),
        total_ms=total_ms,
        created=None,
        loading=None,
        batch_size=len(images_NCHW),
        num_threads=num_threads,
        num_runs=num_runs,
        training=False,
        facts={"onnxruntime": onnxruntime.__version__, "processor": processor_name()},
    )


def _session(path: Path, num_threads: int, profile_prefix: str | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    return onnxruntime.InferenceSession(
        str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )


def _onnx_runs(events: Sequence[dict[str, Any]]) -> list[dict[str, OperatorSum]]:
    """Return the sums of each run; an event of the whole run stands behind those of its nodes."""
    runs: list[dict[str, OperatorSum]] = []
    sums: dict[str, OperatorSum] = {}
    for event in events:
        if event.get("name") == "model_run":
            runs.append(sums)
            sums = {}
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            facts = event["args"]
            num_bytes = int(facts.get("output_size", 0))
            sums.setdefault(facts["op_name"], OperatorSum()).add(event["dur"], 1, num_bytes)
    return runs
