"""Finds the smallest arena in which TensorFlow Lite Micro runs a file; run as a script, prints it.

A process of its own, because the interpreter prints a complaint for every arena that is too small.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

STEP_BYTES = 16
MAX_ARENA_BYTES = 1 << 28
SEARCH_SECONDS = 300.0


def smallest_arena(path: Path) -> int | None:
    """Return bytes of static memory that the interpreter needs for a file; None: not found out.

    It is counted with pointers of 64 bits; a 32-bit microcontroller needs less.
    """
    # -P keeps the script's folder, and the modules in it, off the import path.
    command = [sys.executable, "-P", __file__, str(path)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SEARCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return int(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _search(content: bytes, runtime: Any) -> int:
    too_few, enough = 0, MAX_ARENA_BYTES // STEP_BYTES
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        try:
            runtime.Interpreter.from_bytes(content, arena_size=middle * STEP_BYTES)
        except RuntimeError:
            too_few = middle
        else:
            enough = middle
    return enough * STEP_BYTES


if __name__ == "__main__":
    from tflite_micro.python.tflite_micro import runtime

    print(_search(Path(sys.argv[1]).read_bytes(), runtime))
