"""Networks that ``understudy profile`` is given by name, as files that eager PyTorch runs."""

from __future__ import annotations

from pathlib import Path

from understudy.errors import InputError, ModelError, problem
from understudy.evaluate.runtime_files import RuntimeFile, runtime_file
from understudy.models.catalog import CATALOG, check_model

ImageShape = tuple[int, int, int]
DEFAULT_SHAPE = (3, 32, 32)
DEFAULT_CLASSES = 10


def is_network_name(text: str) -> bool:
    """Return whether a text names a network, rightly or not, and no file or folder."""
    return (text in CATALOG or ":" in text) and not Path(text).exists()


def named_network(
    name: str, folder: Path, *, image_shape: ImageShape, num_classes: int
) -> RuntimeFile:
    """Write a file that builds the network, and return it with its runtime.

    The network is built here once as well: its own process could not say as well what is wrong.

    Args:
        name: as ``build_network`` takes it.

    Raises:
        ModelError, MissingExtraError: as ``build_network``.
    """
    problems = check_model(name, {})
    if problems:
        raise ModelError(*problems)
    from understudy.evaluate.eager import write_eager
    from understudy.models.build import build_network

    build_network(name, num_classes=num_classes, image_shape=image_shape)
    path = write_eager(folder, name, num_classes=num_classes, image_shape=image_shape)
    return runtime_file(path)


def exported_network(target: str, file: RuntimeFile, folder: Path) -> RuntimeFile:
    """Export what eager PyTorch runs for a target, as float32, and return that.

    Raises:
        InputError: ``file`` is no such network.
        MissingExtraError, ModelError: as ``Target.export``.
    """
    if file.runtime != "eager":
        raise InputError(
            problem(
                f"--against {target} is an export target and '{file.path}' a file",
                expected="another file or a network",
                mend="Name the file that was exported for that target.",
            )
        )
    from understudy.evaluate.eager import EagerModel
    from understudy.export.target import ExportSource, find_target

    network = EagerModel(file.path)
    names = tuple(str(label) for label in range(network.facts["num_classes"]))
    source = ExportSource(network.model, tuple(network.facts["image_shape"]), names)
    folder.mkdir(parents=True, exist_ok=True)
    return runtime_file(find_target(target).export(source, folder, precision="float32"))
