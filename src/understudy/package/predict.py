"""Predicts with a package: NumPy, Pillow and the artifact's runtime are all it needs."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from understudy.errors import InputError, ModelError, printable, problem
from understudy.export import runtimes
from understudy.package.manifest import CODE_TARGETS, ArtifactEntry
from understudy.package.picture import (
    ArrayLayout,
    ColorOrder,
    Picture,
    load_pictures,
    pictures_from_arrays,
)
from understudy.package.reading import Package, read_package
from understudy.package.statistics import softmax

RUNTIMES_FOLDER = Path(runtimes.__file__).parent
BATCH_SIZE = 64
DEFAULT_TOP = 3


class Running(Protocol):
    """An opened artifact: float32 images [n, C, H, W] in [0, 1] to logits [n, K]."""

    def __call__(self, images_NCHW: NDArray[np.float32]) -> NDArray[Any]:
        """Run the images, in one batch or one by one as the format wants."""


@dataclass(frozen=True)
class Guess:
    """One class and its probability."""

    class_name: str
    class_index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one picture, the likeliest first, and what was done to it."""

    picture: str
    guesses: tuple[Guess, ...]
    original_size: tuple[int, int]
    changes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the prediction as plain dicts, lists and numbers."""
        return {
            "picture": self.picture,
            "top": [
                {
                    "class_name": guess.class_name,
                    "class_index": guess.class_index,
                    "probability": guess.probability,
                }
                for guess in self.guesses
            ],
            "original_size": list(self.original_size),
            "changes": list(self.changes),
        }


def predict(
    package: Package,
    pictures: Sequence[Path],
    *,
    top: int = DEFAULT_TOP,
    artifact: str | None = None,
    num_threads: int = 1,
) -> list[Prediction]:
    """Return the likeliest classes of picture files.

    Args:
        top: classes a picture; all where there are fewer.
        artifact: "<target>-<precision>", or None for the package's default. One that is code is
            compiled and run, so it has to be named.

    Raises:
        DataError: pictures cannot be used.
        InputError: there is no such artifact, or its runtime is not installed or cannot load it.
        ModelError: what the artifact returns does not fit the manifest.
    """
    entry = _chosen(package, artifact, top)
    return _predictions(
        package, entry, load_pictures(pictures, package.manifest.preprocessing), top, num_threads
    )


def predict_arrays(
    package: Package,
    images: NDArray[Any],
    *,
    order: ColorOrder,
    layout: ArrayLayout = "NCHW",
    top: int = DEFAULT_TOP,
    artifact: str | None = None,
    num_threads: int = 1,
) -> list[Prediction]:
    """Return the likeliest classes of uint8 pixels; see ``pictures_from_arrays``.

    Raises:
        DataError, InputError, ModelError: as ``predict``.
    """
    entry = _chosen(package, artifact, top)
    pictures = pictures_from_arrays(
        images, package.manifest.preprocessing, order=order, layout=layout
    )
    return _predictions(package, entry, pictures, top, num_threads)


def predict_command(
    package: str, pictures: list[Path], *, top: int, artifact: str | None, as_json: bool
) -> str:
    """Return what ``understudy predict`` prints."""
    with read_package(Path(package)) as opened:
        predictions = predict(opened, pictures, top=top, artifact=artifact)
        if not as_json:
            return predictions_text(predictions)
        values = {
            "package": opened.manifest.name,
            "version": opened.manifest.version,
            "artifact": opened.artifact(artifact).name,
            "predictions": [prediction.to_json() for prediction in predictions],
        }
    return json.dumps(values, indent=2, allow_nan=False)


def predictions_text(predictions: Sequence[Prediction]) -> str:
    """Return predictions for reading: a picture a line, and below it what was done to it."""
    lines = []
    for prediction in predictions:
        guesses = ", ".join(f"{g.class_name} {g.probability:.1%}" for g in prediction.guesses)
        lines.append(f"{printable(prediction.picture)}: {guesses}")
        lines += [f"  {change}" for change in prediction.changes]
    return "\n".join(lines)


def open_running(package: Package, entry: ArtifactEntry, *, num_threads: int = 1) -> Running:
    """Open an artifact in this process, with this installation's script for its runtime.

    The script inside the package is for those who have nothing else: hashes show damage, not
    malice, so no code out of a package is run, but for an artifact that is itself code.

    Raises:
        InputError: nothing here runs it, its runtime is not installed, or it cannot load the file.
    """
    script = RUNTIMES_FOLDER / f"{entry.target}.py"
    if entry.runtime is None or not script.is_file():
        others = [one.name for one in package.manifest.artifacts if one.runtime is not None]
        raise InputError(
            problem(
                f"{entry.name} cannot be run in Python here",
                expected="an artifact with a runtime for Python",
                mend=f"Choose one of {', '.join(others) or 'another package'}.",
            )
        )
    spec = importlib.util.spec_from_file_location(f"understudy_runtime_{entry.target}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = package.folder / entry.folder / entry.opens
    try:
        spec.loader.exec_module(module)
        running: Running = module.open_model(str(path), num_threads=num_threads)
    except ModuleNotFoundError as error:
        raise InputError(
            problem(
                f"{entry.name} needs the package '{error.name}', which is not installed",
                expected="the runtime of the artifact",
                mend=f"Run: pip install {' '.join(_needed(script))}",
            )
        ) from None
    # Every runtime has exceptions of its own, most without a base of theirs.
    except Exception as error:
        raise InputError(
            problem(
                f"{entry.target} cannot load {entry.opens} of {package.source} ({error})",
                expected="intact files of that target",
                mend="Try another artifact, or write the package again.",
            )
        ) from error
    return running


def _needed(script: Path) -> list[str]:
    """Return the script's PACKAGES without running it, which is what has just failed."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES":
            return list(ast.literal_eval(node.value))
    return []


def _chosen(package: Package, artifact: str | None, top: int) -> ArtifactEntry:
    if top < 1:
        raise InputError(problem(f"top is {top}", expected="at least 1", mend="Ask for 1 or more."))
    entry = package.artifact(artifact)
    if artifact is None and entry.target in CODE_TARGETS:
        raise InputError(
            problem(
                f"the default artifact of {package.source}, {entry.name}, is code, which would be "
                "compiled and run here",
                expected="an artifact that is data, or one that is named",
                mend=f"If you trust the package, ask for artifact {entry.name} by name.",
            )
        )
    return entry


def _predictions(
    package: Package,
    entry: ArtifactEntry,
    pictures: Sequence[Picture],
    top: int,
    num_threads: int,
) -> list[Prediction]:
    if not pictures:
        raise InputError(
            problem("there are no pictures", expected="at least one", mend="Name a picture.")
        )
    running = open_running(package, entry, num_threads=num_threads)
    class_names = package.manifest.class_names
    predictions = []
    for start in range(0, len(pictures), BATCH_SIZE):
        batch = pictures[start : start + BATCH_SIZE]
        logits_NK = _logits(running, entry, batch, num_classes=len(class_names))
        # Stable, so that of equal logits the first class is first, as in the evaluation.
        ranked_NK = np.argsort(-logits_NK, axis=1, kind="stable")[:, :top]
        for picture, shares_K, ranked_K in zip(batch, softmax(logits_NK), ranked_NK, strict=True):
            guesses = tuple(Guess(class_names[k], int(k), float(shares_K[k])) for k in ranked_K)
            predictions.append(
                Prediction(picture.source, guesses, picture.original_size, picture.changes)
            )
    return predictions


def _logits(
    running: Running, entry: ArtifactEntry, pictures: Sequence[Picture], *, num_classes: int
) -> NDArray[np.float32]:
    pixels_NCHW = np.stack([picture.pixels_CHW for picture in pictures])
    try:
        answer = running(pixels_NCHW.astype(np.float32) / np.float32(255))
    except Exception as error:
        raise ModelError(
            problem(
                f"{entry.name} does not run on pictures of {pixels_NCHW.shape[1:]} ({error})",
                expected="a file that takes the manifest's image_shape",
                mend="Write the package again from a student of that shape.",
            )
        ) from error
    logits_NK = np.asarray(answer, dtype=np.float32)
    expected_shape = (len(pictures), num_classes)
    if logits_NK.shape != expected_shape:
        raise ModelError(
            problem(
                f"{entry.name} returns logits of shape {logits_NK.shape}",
                expected=f"{expected_shape}: the manifest has {num_classes} class names",
                mend="Write the package again with the class names of the student.",
            )
        )
    bad_N = ~np.isfinite(logits_NK).all(axis=1)
    if bad_N.any():
        raise ModelError(
            problem(
                f"{entry.name} returns NaN or infinity for "
                f"{pictures[int(bad_N.argmax())].source} ({int(bad_N.sum())} in all)",
                expected="finite logits",
                mend="Try another artifact, and check its parity.",
            )
        )
    return logits_NK
