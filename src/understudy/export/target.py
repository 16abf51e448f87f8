"""What an export target is: it makes the files of one runtime, and that runtime runs them.

A target is two modules with its name:
    ``export/targets/NAME.py``   makes the files from a trained network
    ``export/runtimes/NAME.py``  opens them with NumPy and the runtime's own package alone
The second is a plain script of a few lines, because it is also what is copied into a package, sent
to a device and started in the fresh process that measures a file.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from understudy.errors import InputError, MissingExtraError, problem
from understudy.export.target_names import DEFAULT_OPSET, TARGETS

if TYPE_CHECKING:
    from torch.fx import GraphModule

Precision = Literal["float32", "int8"]
RUNTIMES_FOLDER = Path(__file__).parent / "runtimes"


@dataclass(frozen=True)
class ExportSource:
    """What every target exports from.

    Attributes:
        model: float32, on the CPU, in evaluation mode; takes float images NCHW in [0, 1] (its
            normalisation is inside) and returns logits NK.
        image_shape: (C, H, W).
        calibration_NCHW: uint8 images of the calibration split, for int8.
        quantized: the same network after quantisation-aware training, as torchao's
            ``convert_pt2e`` returns it; ``model`` then has the weights that this training left.
            Targets that read ONNX use it for int8; the others quantise ``model`` themselves.
        float_layers: names of modules of ``model`` that stay in float32 in an int8 file.
        metadata: entries for formats that carry them, such as {"recipe_hash": ...}.
        opset: of ONNX files that ship.
    """

    model: nn.Module
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    calibration_NCHW: Tensor | None = None
    quantized: GraphModule | None = None
    float_layers: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    opset: int = DEFAULT_OPSET

    def calibration(self, target: str) -> Tensor:
        """Return the calibration images, or say that int8 needs them."""
        if self.calibration_NCHW is None or len(self.calibration_NCHW) == 0:
            raise InputError(
                problem(
                    f"{target} is asked for int8 without calibration images",
                    expected="a calibration split",
                    mend="Set data.calibration_fraction above 0.",
                )
            )
        return self.calibration_NCHW


@dataclass(frozen=True)
class Artifact:
    """Files of one target, as one folder.

    Attributes:
        files: names in ``folder``, of files or folders of files; the runtime opens the first.
        batch: "any", or "one" where the file takes one image at a time.
        facts: what the files say of themselves: static RAM, flash, arena bytes, number of nodes.
        notes: sentences that a user must know, for instance why it is not run here.
    """

    target: str
    precision: Precision
    folder: Path
    files: tuple[str, ...]
    batch: Literal["any", "one"] = "any"
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file, or folder of files, that the runtime opens."""
        return self.folder / self.files[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that the device needs."""
        paths = [self.folder / name for name in self.files]
        inner = [part for path in paths if path.is_dir() for part in path.rglob("*")]
        return sum(path.stat().st_size for path in (*paths, *inner) if path.is_file())

    def to_json(self) -> dict[str, Any]:
        """Return everything but the folder, and the size, as a plain dict."""
        values = {name: value for name, value in asdict(self).items() if name != "folder"}
        return {**values, "size_bytes": self.size_bytes}


class Target(Protocol):
    """One runtime's file format. ``export/targets/NAME.py`` has these as module-level names."""

    PRECISIONS: tuple[Precision, ...]
    RUNS_HERE: bool

    def export(self, source: ExportSource, folder: Path, *, precision: Precision) -> Artifact:
        """Write the files into ``folder`` (it exists), each atomically.

        Raises:
            MissingExtraError: a package is not installed.
            ModelError: an operator that the target lacks, named with the layer it came from.
        """


class Running(Protocol):
    """An opened artifact: float32 images [n, C, H, W] in [0, 1] to float32 logits [n, K]."""

    facts: dict[str, Any]

    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        """Run the images, in one batch or one by one as the format wants."""


def find_target(name: str) -> Target:
    """Return the target of this name.

    Raises:
        InputError: there is none.
    """
    if name not in TARGETS:
        raise InputError(
            problem(
                f"there is no export target '{name}'",
                expected=f"one of {', '.join(TARGETS)}",
                mend="`understudy doctor` lists them with what is installed.",
            )
        )
    target: Target = importlib.import_module(f"understudy.export.targets.{name}")
    return target


def require_package(module: str, *, target: str, package: str | None = None) -> Any:
    """Import and return a module of a target, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(package or module, TARGETS[target]) from None


def open_artifact(artifact: Artifact, *, num_threads: int = 1) -> Running:
    """Open the files in this process.

    Raises:
        InputError: the runtime cannot load them.
    """
    spec = importlib.util.spec_from_file_location(
        f"understudy_runtime_{artifact.target}", RUNTIMES_FOLDER / f"{artifact.target}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        running: Running = module.open_model(str(artifact.path), num_threads=num_threads)
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), TARGETS[artifact.target]) from None
    # Every runtime has exceptions of its own, most without a base of theirs.
    except Exception as error:
        raise InputError(
            problem(
                f"{artifact.target} cannot load {artifact.path} ({error})",
                expected="intact files of that target",
                mend="Export the student again.",
            )
        ) from error
    return running


def run_artifact(running: Running, images_NCHW: Tensor) -> Tensor:
    """Return logits [n, K] for uint8 images (scaled to [0, 1]) or float images."""
    pixels_NCHW = images_NCHW.cpu().numpy()
    if pixels_NCHW.dtype == np.uint8:
        pixels_NCHW = pixels_NCHW.astype(np.float32) / np.float32(255)
    return torch.from_numpy(np.asarray(running(pixels_NCHW), dtype=np.float32))
