"""Image classifiers of the ``timm`` and ``transformers`` libraries, both optional extras."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy.errors import CheckpointError, MissingExtraError, ModelError, problem


class TransformersClassifier(nn.Module):
    """A ``transformers`` image classifier whose forward takes images_NCHW and returns logits_NK.

    Args:
        classifier: the library's network.
        image_size: (H, W) that it asks for; pictures of another size are resized to it,
            bilinearly. None: it takes them as they are.
    """

    def __init__(self, classifier: nn.Module, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.classifier = classifier
        self.image_size = image_size

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if self.image_size is not None and images_NCHW.shape[2:] != self.image_size:
            images_NCHW = F.interpolate(
                images_NCHW, self.image_size, mode="bilinear", align_corners=False
            )
        logits_NK: Tensor = self.classifier(pixel_values=images_NCHW).logits
        return logits_NK


def build_timm(
    name_or_folder: str, *, num_classes: int, in_channels: int, arguments: Mapping[str, Any]
) -> nn.Module:
    """Create a timm model by name, or from a local folder with ``config.json``.

    Weights are fresh, except where the folder holds safetensors or ``pretrained: true`` is among
    the arguments.

    Raises:
        MissingExtraError: timm is not installed.
        ModelError: timm does not know the name, or refuses the arguments.
        CheckpointError: the folder holds weights in pickles only.
    """
    try:
        import timm
    except Exception as error:  # a torchvision that does not match torch raises RuntimeError
        if isinstance(error, ModuleNotFoundError) and error.name == "timm":
            raise MissingExtraError("timm", "timm") from None
        raise ModelError(
            problem(
                f"timm cannot be imported ({type(error).__name__}: {error})",
                expected="timm with a torchvision build that matches torch",
                mend=f"Install the torchvision that belongs to torch {torch.__version__}.",
            )
        ) from error
    folder = Path(name_or_folder)
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if folder.is_dir():
        options["pretrained"] = folder_has_weights(folder)
        name_or_folder = f"local-dir:{folder}"
    elif not timm.is_model(name_or_folder):
        near = timm.list_models(f"*{name_or_folder[:6]}*")[:5]
        raise ModelError(
            problem(
                f"timm has no model '{name_or_folder}'",
                expected=f"a local folder, or a name such as {', '.join(near) or 'resnet18'}",
                mend="List them with timm.list_models().",
            )
        )
    try:
        network: nn.Module = timm.create_model(name_or_folder, **options | dict(arguments))
    except Exception as error:  # the library raises many kinds
        raise _unusable("timm", name_or_folder, error) from error
    return network


def build_transformers(
    name_or_folder: str, *, num_classes: int, arguments: Mapping[str, Any]
) -> nn.Module:
    """Load an image classifier by hub name or from a local folder.

    A folder with ``config.json`` and no weights gives a freshly initialised network of that
    configuration. ``arguments`` override entries of the configuration; ``image_size`` among them
    is the size that pictures are resized to.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelError: there is nothing usable.
        CheckpointError: the folder holds weights in pickles only.
    """
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError:
        raise MissingExtraError("transformers", "transformers") from None
    folder = Path(name_or_folder)
    has_weights = not folder.is_dir() or folder_has_weights(folder)
    try:
        config = AutoConfig.from_pretrained(name_or_folder, **arguments)
        if has_weights:
            classifier = AutoModelForImageClassification.from_pretrained(
                name_or_folder, config=config, use_safetensors=True
            )
        else:
            config.num_labels = num_classes
            classifier = AutoModelForImageClassification.from_config(config)
    except Exception as error:  # the library raises many kinds
        raise _unusable("transformers", name_or_folder, error) from error
    return TransformersClassifier(classifier, image_size_of(config))


def image_size_of(config: Any) -> tuple[int, int] | None:
    """Return the (H, W) that a transformers configuration asks for; None where it asks for none."""
    # Of a model of pictures and text, the half that sees.
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def stated_normalization(folder: Path) -> dict[str, list[float]] | None:
    """Return ``mean`` and ``std``, for pixels in [0, 1], of a local folder of transformers.

    They are in its preprocessor_config.json; None where there is no such file, or it states none.

    Raises:
        ModelError: the file cannot be read.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        mean, std = values.get("image_mean"), values.get("image_std")
        if not mean or not std:
            return None
        if not values.get("do_normalize", True):
            mean, std = [0.0] * len(mean), [1.0] * len(std)
        # What the file's numbers are for: pixels times this factor, [0, 1] by default.
        scale = 255 * values.get("rescale_factor", 1 / 255)
        return {"mean": [m / scale for m in mean], "std": [s / scale for s in std]}
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            problem(
                f"{path} cannot be read ({type(error).__name__}: {error})",
                expected="the preprocessing of an image classifier as transformers saves it",
                mend="Correct or delete it, and state model.normalization in the recipe.",
            )
        ) from error


def folder_has_weights(folder: Path) -> bool:
    """Return whether a model folder holds safetensors; weights in pickles only are refused."""
    if any(folder.glob("*.safetensors")):
        return True
    pickles = [path.name for pattern in ("*.bin", "*.pt*") for path in folder.glob(pattern)]
    if pickles:
        raise CheckpointError(
            problem(
                f"{folder} holds weights only as {', '.join(sorted(pickles))}, a pickle",
                expected="*.safetensors",
                mend="Save them again as safetensors where you trust their author.",
            )
        )
    return False


def _unusable(library: str, name_or_folder: str, error: Exception) -> ModelError:
    reason = str(error).splitlines()[0] if str(error) else ""
    return ModelError(
        problem(
            f"{library} could not load '{name_or_folder}' ({type(error).__name__}: {reason})",
            expected="the name or folder of an image classifier with config.json and, if "
            "trained, *.safetensors",
            mend="Check the name and arguments; without a network use a local folder.",
        )
    )
