"""Finds the smallest arena in which TensorFlow Lite Micro runs a file; run as a script, prints it.

A process of its own, because the interpreter prints a complaint for every arena that is too small.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SEARCH_SECONDS = 300.0


def arena_bytes(path: Path) -> int | None:
    """Return bytes of static memory that the interpreter needs for a file; None: not found out.

    It is counted with pointers of 64 bits; a 32-bit microcontroller needs less.
    """
    command = [sys.executable, "-P", "-m", __name__, str(path)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SEARCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return int(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


if __name__ == "__main__":
    from tflite_micro.python.tflite_micro import runtime

    from understudy.export.runtimes.tflm import smallest_arena

    print(smallest_arena(runtime, Path(sys.argv[1]).read_bytes()))
