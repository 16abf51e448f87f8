"""Counts the instructions of TensorFlow Lite Micro for a file; run as a script, runs the file.

Valgrind counts them one by one, on this machine's processor and with the package's reference
kernels. A microcontroller has other instructions, and often faster kernels, so the figure compares
files with one another; unlike a time it is the same in every run.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

TOOL, PACKAGE = "valgrind", "valgrind"
NUM_IMAGES = 5
COUNT_SECONDS = 600.0
# Only what this function and those that it calls do is counted: not Python, not the loading.
_INVOKE = "tflite::*MicroInterpreter::Invoke()"
_COUNT = re.compile(r"Collected : (\d+)")


@dataclass(frozen=True)
class TflmInstructions:
    """What the interpreter does for one image.

    Attributes:
        instructions_per_image: mean over the images.
        machine: whose instructions they are, "x86_64" for instance.
        num_images: images run.
        counter: first line of Valgrind's version text.
    """

    instructions_per_image: float
    machine: str
    num_images: int
    counter: str

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a plain dict."""
        return asdict(self)

    def __str__(self) -> str:
        millions = self.instructions_per_image / 1e6
        return f"{millions:.4g} M instructions of {self.machine} a picture ({self.counter})"


def count_instructions(path: Path, images: ArrayLike) -> TflmInstructions | str:
    """Return the count for a file, or why there is none.

    Args:
        images: uint8 [n, C, H, W], of which the first ``NUM_IMAGES`` are run.
    """
    if shutil.which(TOOL) is None:
        return f"{TOOL} is not installed (Debian's package {PACKAGE})"
    some_NCHW = np.asarray(images)[:NUM_IMAGES]
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        pictures = Path(folder) / "images.npy"
        np.save(pictures, some_NCHW)
        options = ["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]
        script = [sys.executable, "-P", "-m", __name__, str(path), str(pictures)]
        try:
            done = subprocess.run(
                [TOOL, *options, f"--toggle-collect={_INVOKE}", *script],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COUNT_SECONDS,
                check=False,
            )
            version = subprocess.run(
                [TOOL, "--version"], capture_output=True, text=True, errors="replace", check=False
            )
        except subprocess.TimeoutExpired:
            return f"{TOOL} took more than {COUNT_SECONDS:.0f} s"
    found = _COUNT.search(done.stderr)
    if done.returncode != 0 or found is None:
        told = [line for line in done.stderr.splitlines() if not line.startswith("==")]
        return f"{TOOL} failed (exit code {done.returncode}): {told[-1] if told else 'no output'}"
    if int(found[1]) == 0:
        return f"{TOOL} does not find the interpreter in this version of tflite-micro"
    return TflmInstructions(
        instructions_per_image=int(found[1]) / len(some_NCHW),
        machine=platform.machine(),
        num_images=len(some_NCHW),
        counter=version.stdout.strip(),
    )


if __name__ == "__main__":
    from understudy.export.runtimes.tflm import open_model

    open_model(sys.argv[1], num_threads=1)(np.load(sys.argv[2]).astype(np.float32) / 255)
