"""Runs one ONNX file in one fresh process and prints what it took, as JSON.

Started as a script by ``fresh_process.run_fresh``. It imports nothing of this package and no torch:
what it measures is what a user of the file has, Python with NumPy and ONNX Runtime.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

MAX_RUNS = 100_000


def peak_memory_bytes() -> int | None:
    """Return the largest resident set of this process so far, or None where it is not known.

    Linux's ``ru_maxrss`` will not do: it survives exec, so a child of a large process starts with
    its parent's peak. VmHWM belongs to the address space, which exec makes anew.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load the file, warm up, time runs. See ``fresh_process.run_fresh`` for the request."""
    import numpy as np
    import onnxruntime

    baseline_bytes = peak_memory_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["num_threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning of idle pool threads is left as ONNX Runtime's default: what is measured is what a
    # user with the same number of threads gets, and this process has no other work to disturb.
    start = time.perf_counter_ns()
    session = onnxruntime.InferenceSession(
        request["model"], sess_options=options, providers=["CPUExecutionProvider"]
    )
    load_ms = (time.perf_counter_ns() - start) / 1e6

    batch_size, input_name = request["batch_size"], session.get_inputs()[0].name
    images_NCHW = np.load(request["images"], mmap_mode="r")
    # Real images in turn, so that one batch does not stay in the caches; repeated if too few.
    num_batches = min(request["num_batches"], max(1, len(images_NCHW) // batch_size))
    feeds = []
    for batch in range(num_batches):
        rows = np.arange(batch * batch_size, (batch + 1) * batch_size) % len(images_NCHW)
        feeds.append({input_name: images_NCHW[rows].astype(np.float32) / np.float32(255)})

    for run in range(request["num_warmup"]):
        session.run(None, feeds[run % num_batches])
    times_ns: list[int] = []
    gc.collect()
    gc.disable()
    end = time.perf_counter_ns() + int(request["min_seconds"] * 1e9)
    while len(times_ns) < MAX_RUNS:
        feed = feeds[len(times_ns) % num_batches]
        start = time.perf_counter_ns()
        session.run(None, feed)
        stop = time.perf_counter_ns()
        times_ns.append(stop - start)
        if stop >= end and len(times_ns) >= request["min_runs"]:
            break
    return {
        "times_ns": times_ns,
        "load_ms": load_ms,
        "peak_memory_bytes": peak_memory_bytes(),
        "baseline_memory_bytes": baseline_bytes,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "providers": session.get_providers(),
    }


if __name__ == "__main__":
    json.dump(measure(json.loads(sys.argv[1])), sys.stdout)
