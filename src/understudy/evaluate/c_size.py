"""Bytes that a C student takes on a device, where its source text does not count.

The folder also holds a self-test with its pictures, a Makefile and headers: megabytes of text that
no device ever sees.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from understudy.export.runtimes.c import COMPILE_SECONDS, SOURCES

# As the runtime compiles them here, but as objects: a library has the system's own parts in it.
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off")


def compiled_bytes(folder: Path) -> int | None:
    """Return code, constants and initial data of the student compiled for this machine.

    None where the compiler (CC, or ``cc``) or ``size`` of the binutils is missing or fails.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(prefix="understudy-") as built:
        objects = []
        for name in SOURCES:
            objects.append(str(Path(built) / f"{name}.o"))
            command = [*compiler, *FLAGS, "-c", str(folder / name), "-o", objects[-1]]
            if _said(command) is None:
                return None
        table = _said(["size", *objects])
    if table is None:
        return None
    # Columns: text (with the constants), data, bss.
    rows = [line.split() for line in table.splitlines()[1:]]
    return sum(int(text) + int(data) for text, data, *_ in rows)


def c_model_size(
    chip: Mapping[str, Any], *, compiled: int | None, weight_bytes: int
) -> tuple[int, str]:
    """Return the bytes of C code on a device as far as they are known, and what they count.

    Args:
        chip: figures of ``MicrocontrollerCost``; empty where there are none.
        compiled: as ``compiled_bytes`` returns it.
    """
    if chip:
        return int(chip["flash_bytes"]), f"flash of a {chip['cpu']}"
    if compiled is not None:
        return compiled, "code and weights as compiled here"
    return weight_bytes, "weights alone, the code was not compiled"


def _said(command: list[str]) -> str | None:
    """Return what a command printed, None where it is missing or fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
