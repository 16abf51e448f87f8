"""What an exported C student takes on a Cortex-M core: flash, RAM, stack and instructions.

The student is compiled with arm-none-eabi-gcc and run in QEMU's models of the Arm MPS2 boards. QEMU
does not model the time that a core takes, so instructions are counted, not cycles: a repeatable
figure to compare students by. Real cores take one to three cycles for most of them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from understudy.errors import InputError, UnderstudyError, problem

if TYPE_CHECKING:
    from understudy.export.target import Artifact

Cpu = Literal["cortex-m4", "cortex-m7"]
BOARDS: dict[str, str] = {"cortex-m4": "mps2-an386", "cortex-m7": "mps2-an500"}
# tool -> Debian package
TOOLS = {
    "make": "make",
    "arm-none-eabi-gcc": "gcc-arm-none-eabi",
    "arm-none-eabi-size": "binutils-arm-none-eabi",
    "qemu-system-arm": "qemu-system-arm",
}
NEWLIB_PACKAGE = "libnewlib-arm-none-eabi"
BUILD_SECONDS = 300.0


@dataclass(frozen=True)
class MicrocontrollerCost:
    """What one student takes on one core.

    Attributes:
        machine: the board that QEMU modelled.
        flash_bytes: code, constants and initial data of the smallest program that calls the
            student once: vector table and start-up code (some 200 bytes) are in it, the C
            library's input and output are not.
        ram_bytes: static data of that program: the network's intermediate results, not the
            caller's pixels and logits, not the stack.
        input_bytes: float32 pixels of one image, which the caller holds.
        peak_stack_bytes: largest stack of one call, seen by painting the stack before it.
        instructions_per_image: mean over all images, of ``understudy_classify`` with its checks,
            counted in steps of 40.
        least_instructions, most_instructions: of one image.
        num_images: images run.
        top1_agreement: share of images with the same class as the expected logits; None without.
        max_abs_difference: largest |difference| from the expected logits; None without.
        flags: what the student was compiled with.
        compiler, emulator: first line of their version text.
    """

    cpu: str
    machine: str
    precision: str
    flash_bytes: int
    ram_bytes: int
    input_bytes: int
    peak_stack_bytes: int
    instructions_per_image: float
    least_instructions: int
    most_instructions: int
    num_images: int
    top1_agreement: float | None
    max_abs_difference: float | None
    flags: str
    compiler: str
    emulator: str

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a plain dict."""
        return asdict(self)


@dataclass(frozen=True)
class EmulatedRun:
    """Logits of all images from the emulated core, and the counts it printed."""

    logits_NK: np.ndarray
    counts: dict[str, int]


def measure_microcontroller(
    artifact: Artifact,
    images: ArrayLike,
    *,
    cpu: Cpu = "cortex-m4",
    expected: ArrayLike | None = None,
    optimization: str = "-O3",
    timeout_seconds: float = 600.0,
) -> MicrocontrollerCost:
    """Compile a student of the target "c" for a Cortex-M core and run images through it in QEMU.

    Args:
        images: uint8 or float32 in [0, 1], [n, C, H, W]. An image of 32x32 pixels takes some
            0.05 s.
        expected: logits [n, K] of the same images, for instance ONNX Runtime's.
        optimization: option of the compiler.

    Raises:
        InputError: a tool is missing (with its Debian package), the images do not fit, the student
            does not fit into the board's memory.
        UnderstudyError: the program failed or ran past ``timeout_seconds``.
    """
    require_tools(cpu)
    pixels_NCHW = _pixels(artifact, images)
    expected_NK = None if expected is None else np.asarray(expected, dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="understudy-") as name:
        folder = Path(name)
        for file_name in artifact.files:
            shutil.copy(artifact.folder / file_name, folder / file_name)
        commands = build(folder, cpu, optimization=optimization)
        flash_bytes, ram_bytes = footprint(folder, cpu)
        run = run_emulated(folder, pixels_NCHW, cpu=cpu, timeout_seconds=timeout_seconds)
    per_tick = _instructions_per_tick(run.counts)
    agreement, difference = _compare(run.logits_NK, expected_NK)
    return MicrocontrollerCost(
        cpu=cpu,
        machine=BOARDS[cpu],
        precision=artifact.precision,
        flash_bytes=flash_bytes,
        ram_bytes=ram_bytes,
        input_bytes=pixels_NCHW[0].nbytes,
        peak_stack_bytes=run.counts["peak_stack_bytes"],
        instructions_per_image=run.counts["total_ticks"] * per_tick / len(pixels_NCHW),
        least_instructions=run.counts["least_ticks"] * per_tick,
        most_instructions=run.counts["most_ticks"] * per_tick,
        num_images=len(pixels_NCHW),
        top1_agreement=agreement,
        max_abs_difference=difference,
        flags=_flags(commands),
        compiler=_version("arm-none-eabi-gcc"),
        emulator=_version("qemu-system-arm"),
    )


def require_tools(cpu: str = "cortex-m4") -> None:
    """Raise InputError, with the Debian packages to install, unless all tools are there."""
    if cpu not in BOARDS:
        raise InputError(
            problem(
                f"there is no emulated board with the core '{cpu}'",
                expected=f"one of {', '.join(BOARDS)}",
                mend="Choose one of them.",
            )
        )
    missing = {tool: package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if missing:
        raise InputError(
            problem(
                f"{', '.join(missing)} not found",
                expected="a cross compiler and an emulator for Cortex-M",
                mend=f"On Debian: apt install {' '.join(missing.values())} {NEWLIB_PACKAGE}",
            )
        )


def has_newlib() -> bool:
    """Return whether the cross compiler is here and finds the C library."""
    try:
        done = subprocess.run(
            ["arm-none-eabi-gcc", "-print-file-name=rdimon.specs"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    # The name alone comes back for a file that it does not find.
    return Path(done.stdout.strip()).is_absolute()


def build(folder: Path, cpu: str, *, optimization: str) -> str:
    """Build the programs of a project folder for this core and return the commands that ran."""
    command = ["make", "-C", str(folder), cpu, f"OPTIMIZATION={optimization}"]
    done = _run(command, what=f"compiling for {cpu}", timeout_seconds=BUILD_SECONDS)
    if done.returncode == 0:
        return done.stdout
    text = done.stderr
    if "rdimon.specs" in text or "cannot find -lc" in text or "No such file or directory" in text:
        given, mend = "the C library newlib is not installed", f"apt install {NEWLIB_PACKAGE}"
        raise InputError(
            problem(given, expected="newlib for arm-none-eabi", mend=f"On Debian: {mend}")
        )
    lines = [line for line in text.splitlines() if "error:" in line or "overflow" in line]
    reason = (lines or text.splitlines() or ["it said nothing"])[0].strip()
    if "overflowed" in text or "do not fit" in text:
        raise InputError(
            problem(
                f"the student does not fit into the memory of {BOARDS[cpu]} ({reason})",
                expected="at most 4 MB of flash and 4 MB of RAM",
                mend="Choose a smaller student or int8.",
            )
        )
    raise UnderstudyError(
        problem(
            f"compiling for {cpu} failed ({reason})",
            expected="arm-none-eabi-gcc to compile the project",
            mend="Export the student again.",
        )
    )


def footprint(folder: Path, cpu: str) -> tuple[int, int]:
    """Return (flash, RAM) bytes of the smallest program around the student."""
    program = folder / "build" / cpu / "footprint.elf"
    done = _run(["arm-none-eabi-size", str(program)], what="reading sizes", timeout_seconds=60)
    if done.returncode != 0:
        raise UnderstudyError(
            problem(
                f"arm-none-eabi-size failed ({done.stderr.strip()})",
                expected="a program to weigh",
                mend="Export the student again.",
            )
        )
    text, data, bss = (int(field) for field in done.stdout.splitlines()[1].split()[:3])
    # Initial values of data lie in flash and are copied to RAM.
    return text + data, data + bss


def run_emulated(
    folder: Path, pixels_NCHW: np.ndarray, *, cpu: str, timeout_seconds: float
) -> EmulatedRun:
    """Run float32 images through the built program of a project folder in QEMU."""
    pixels_NCHW.astype("<f4").tofile(folder / "images.f32")
    command = ["qemu-system-arm", "-M", BOARDS[cpu], "-icount", "shift=0"]
    command += ["-display", "none", "-monitor", "none", "-serial", "none"]
    command += ["-semihosting-config", "enable=on,target=native"]
    command += ["-kernel", f"build/{cpu}/measure.elf"]
    what = f"{len(pixels_NCHW)} images on {cpu}"
    done = _run(command, what=what, timeout_seconds=timeout_seconds, folder=folder)
    try:
        counts: dict[str, int] = json.loads(done.stdout)
        logits_NK = np.fromfile(folder / "logits.f32", "<f4").reshape(len(pixels_NCHW), -1)
    except (ValueError, OSError):
        counts = {}
    if done.returncode != 0 or counts.get("num_images") != len(pixels_NCHW):
        reason = (done.stdout.strip() or done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UnderstudyError(
            problem(
                f"the student failed on the emulated {cpu} with exit code {done.returncode} "
                f"({reason})",
                expected="logits of all images",
                mend="Run `make run-native` in the exported folder to see more.",
            )
        )
    return EmulatedRun(logits_NK.astype(np.float32), counts)


def _pixels(artifact: Artifact, images: ArrayLike) -> np.ndarray:
    if artifact.target != "c":
        raise InputError(
            problem(
                f"the artifact is of the target '{artifact.target}'",
                expected="an artifact of the target 'c'",
                mend="Export the student to C.",
            )
        )
    images_NCHW = np.asarray(images)
    num_bytes = artifact.facts.get("input_bytes", 0)
    scale = np.float32(255) if images_NCHW.dtype == np.uint8 else np.float32(1)
    if images_NCHW.ndim != 4 or len(images_NCHW) == 0 or images_NCHW[0].size * 4 != num_bytes:
        raise InputError(
            problem(
                f"the images are {images_NCHW.dtype} of {images_NCHW.shape}",
                expected=f"[n, C, H, W], n at least 1, {num_bytes // 4} pixels an image",
                mend="Give images of the test split.",
            )
        )
    pixels_NCHW: np.ndarray = images_NCHW.astype(np.float32) / scale
    return pixels_NCHW


def _instructions_per_tick(counts: dict[str, int]) -> int:
    """Return instructions between two ticks, from a loop of a known number of them."""
    exact = counts["spin_instructions"] / max(1, counts["spin_ticks"])
    nearest = round(exact)
    if nearest < 1 or abs(exact - nearest) > 0.01 * nearest:
        raise UnderstudyError(
            problem(
                f"{counts['spin_instructions']} instructions took {counts['spin_ticks']} ticks",
                expected="a whole number of instructions a tick",
                mend="Use a QEMU whose `-icount shift=0` takes one nanosecond an instruction.",
            )
        )
    return nearest


def _compare(
    logits_NK: np.ndarray, expected_NK: np.ndarray | None
) -> tuple[float | None, float | None]:
    if expected_NK is None:
        return None, None
    if logits_NK.shape != expected_NK.shape:
        raise InputError(
            problem(
                f"the expected logits are of shape {expected_NK.shape}",
                expected=f"{logits_NK.shape}",
                mend="Give the logits of the same images.",
            )
        )
    same = logits_NK.argmax(1) == expected_NK.argmax(1)
    return float(same.mean()), float(np.abs(logits_NK - expected_NK).max())


def _flags(commands: str) -> str:
    """Return the compiler's options for the network, from what make printed."""
    for line in commands.splitlines():
        if line.endswith("student_network.c") and " -c " in line:
            return line.split(" ", 1)[1].split(" -c ")[0]
    return ""


def _version(tool: str) -> str:
    done = _run([tool, "--version"], what=f"asking {tool}", timeout_seconds=30)
    return done.stdout.splitlines()[0] if done.stdout else ""


def _run(
    command: list[str], *, what: str, timeout_seconds: float, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnderstudyError(
            problem(
                f"{what} was not done after {timeout_seconds:g} s",
                expected="an end in that time",
                mend="Give fewer images or a smaller student.",
            )
        ) from None
