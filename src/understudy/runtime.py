"""Seeds, threads and the facts about the machine that every record carries."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

RECORDED_PACKAGES = (
    "understudy",
    "torch",
    "numpy",
    "lightning-fabric",
    "datasets",
    "kornia",
    "zarr",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "scikit-learn",
    "timm",
    "transformers",
    "torch-pruning",
    "torchao",
    "openvino",
    "executorch",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "litert-torch",
    "tflite-micro",
    "ncnn",
    "pnnx",
    "coremltools",
    "emx-onnx-cgen",
)

SECONDS_OF_ONE_REQUEST = 1.0

# Parameters of mallopt(3): no block is mapped apart (M_MMAP_MAX), the top of the heap stays
# (M_TRIM_THRESHOLD) and grows in steps of 64 MiB (M_TOP_PAD).
_KEEPING = ((-4, 0), (-1, 2**31 - 1), (-2, 2**26))
# MADV_HUGEPAGE of madvise(2), and how much of the heap is to have such pages. These are addresses:
# memory is taken as it is written.
_HUGE_PAGES = 14
_HUGE_PAGES_BYTES = 2**30


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for one named purpose, independent between purposes.

    One recipe seed feeds weights, sampling, views and dropout; hashing the purpose into it keeps
    those streams independent of each other and of the order in which they are drawn.
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@cache
def processor_name() -> str:
    """Return the processor's marketing name, or the architecture where it is not known."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def num_usable_cores() -> int:
    """Return how many processors this process may run on (cgroup and affinity aware)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def keep_freed_memory() -> None:
    """Have the C library keep the memory that this process frees, and not return it to the system.

    A training step frees its activations, some megabytes each. glibc gives blocks of that size back
    at once, and the system clears the pages again on the next step: a third to half of a small
    network's training time on a CPU. What is kept lies in huge pages where Linux has them on
    request, so that fewer addresses have to be looked up. Elsewhere than on glibc nothing is done.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, madvise, malloc = library.mallopt, library.madvise, library.malloc
    except (OSError, TypeError, AttributeError):
        return  # not glibc
    for parameter, value in _KEEPING:
        mallopt(parameter, value)
    malloc.restype = ctypes.c_void_p
    start = malloc(ctypes.c_size_t(_HUGE_PAGES_BYTES))
    if start is not None:
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = start + _HUGE_PAGES_BYTES - first
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _HUGE_PAGES)
        library.free(ctypes.c_void_p(start))


@cache
def package_versions() -> dict[str, str]:
    """Return name to version of the packages that can change a result."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def hardware_facts() -> dict[str, Any]:
    """Return processor, core count, memory in bytes, system and (if torch is loaded) the GPU."""
    import psutil

    facts: dict[str, Any] = {
        "processor": processor_name(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "num_cores": num_usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


@contextlib.contextmanager
def stop_requests(
    pass_on: Callable[[int], None] | None = None,
) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C or a termination signal came in.

    A loop that asks between two updates can save a consistent state first. A second signal
    interrupts at once, unless it follows so closely that it is the first one over again: a terminal
    signals every process, and a parent hands on what it gets. Outside the main thread signals
    cannot be caught and the answer is no.

    Args:
        pass_on: called with the number of every signal that comes in.
    """
    requested_at: float | None = None

    def note(signal_number: int, frame: Any) -> None:
        nonlocal requested_at
        now = time.monotonic()
        if requested_at is not None and now - requested_at > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt
        requested_at = requested_at or now
        if pass_on is not None:
            pass_on(signal_number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested_at is not None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
