"""Runs one artifact in one fresh process and prints what it took as JSON.

Started as a script by ``fresh_process`` and, on a device, by ``remote``. It imports nothing of this
package: what it measures is what a user of the file has, Python with NumPy and one runtime, which a
script of ``export/runtimes`` opens. It runs on Python 3.9 as well, because devices have that.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.util
import json
import os
import platform
import resource
import signal
import sys
import time
import traceback
from importlib import metadata
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


def machine_facts() -> dict[str, Any]:
    """Return board, processor, system and Python of the machine that runs this."""
    facts: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if hasattr(os, "sched_getaffinity"):
        facts["num_cores"] = len(os.sched_getaffinity(0))
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                facts["processor"] = line.split(":", 1)[1].strip()
        # ARM boards name themselves here and nowhere else.
        facts["board"] = Path("/proc/device-tree/model").read_text().rstrip("\0\n")
    except OSError:
        pass
    return facts


def load_script(path: str) -> Any:
    """Return a Python file as a module, by its path."""
    spec = importlib.util.spec_from_file_location("script_" + Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_early(path: str) -> None:
    """Import everything that a script imports anywhere.

    Runtimes import their package when they open a file, so that its absence can be told; in the
    time and memory of the file it has no place.
    """
    for node in ast.walk(ast.parse(Path(path).read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            # What is needed and missing is reported when the file is opened.
            with contextlib.suppress(ImportError):
                __import__(name)


def package_versions(names: Any) -> dict[str, str]:
    """Return distribution name to version; what is not installed under its name is left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Open the artifact and do what is asked. See ``fresh_process`` for the requests."""
    import numpy

    assert numpy.__version__
    import_early(request["runtime"])
    runtime = load_script(request["runtime"])
    path, options = request["artifact"], {"num_threads": request["num_threads"]}
    # What no loading is: C code is compiled, which takes seconds, and the library kept.
    if hasattr(runtime, "prepare"):
        options["prepared"] = runtime.prepare(path)
    baseline_bytes = peak_memory_bytes()
    start = time.perf_counter_ns()
    running = runtime.open_model(path, **options)
    load_ms = (time.perf_counter_ns() - start) / 1e6
    return {
        "load_ms": load_ms,
        "baseline_memory_bytes": baseline_bytes,
        **ACTIONS[request["mode"]](running, request),
        # Read at the end: some runtimes know their memory only after a run.
        "facts": dict(running.facts),
        "versions": package_versions(runtime.PACKAGES),
        "machine": machine_facts(),
    }


def measure(running: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Warm up, time runs, and read the energy counters where there are any."""
    import numpy as np

    batch_size = request["batch_size"]
    images_NCHW = np.load(request["images"], mmap_mode="r")
    # Real images in turn, so that one batch does not stay in the caches; repeated if too few.
    num_batches = min(request["num_batches"], max(1, len(images_NCHW) // batch_size))
    feeds = []
    for batch in range(num_batches):
        rows = np.arange(batch * batch_size, (batch + 1) * batch_size) % len(images_NCHW)
        feeds.append(images_NCHW[rows].astype(np.float32) / np.float32(255))

    for run in range(request["num_warmup"]):
        running(feeds[run % num_batches])
    times_ns: list[int] = []
    gc.collect()
    gc.disable()
    end = time.perf_counter_ns() + int(request["min_seconds"] * 1e9)
    while len(times_ns) < MAX_RUNS:
        feed = feeds[len(times_ns) % num_batches]
        start = time.perf_counter_ns()
        running(feed)
        stop = time.perf_counter_ns()
        times_ns.append(stop - start)
        if stop >= end and len(times_ns) >= request["min_runs"]:
            break
    result: dict[str, Any] = {"times_ns": times_ns, "peak_memory_bytes": peak_memory_bytes()}
    energy = request.get("energy")
    if energy is not None:
        counters = load_script(energy["script"])
        result["energy"] = counters.measure_window(
            lambda: running(feeds[0]),
            counters.find_counters(energy["powercap"]),
            seconds=energy["seconds"],
            idle_seconds=energy["idle_seconds"],
        )
    return result


def describe(running: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return nothing but what is told of every opened artifact."""
    return {}


ACTIONS = {"describe": describe, "measure": measure}


def plain(value: Any) -> Any:
    """Return a JSON value for what JSON does not know: NumPy's scalars and arrays, and paths."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def main() -> int:
    """Answer one request. Failures are one JSON object too, and exit code 1."""
    # Runtimes print, also from native code; the answer alone is to stand on standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    code = 0
    try:
        request = json.loads(sys.argv[1])
        # The signal's own action, not a handler: it ends native code that never returns, too.
        signal.alarm(int(request.get("alarm_seconds", 0)))
        result = answer(request)
    # Every runtime has exceptions of its own, most without a base of theirs.
    except Exception as error:
        traceback.print_exc()
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        result = {"error": type(error).__name__, "text": str(error), "missing": missing}
        code = 1
    json.dump(result, answers, default=plain)
    answers.write("\n")
    answers.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
