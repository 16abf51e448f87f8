"""Image classifiers of the ``timm`` and ``transformers`` libraries, both optional extras."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import CheckpointError, MissingExtraError, ModelError, problem


class TransformersClassifier(nn.Module):
    """A ``transformers`` image classifier whose forward takes images_NCHW and returns logits_NK."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images_NCHW: Tensor) -> Tensor:
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
    configuration. ``arguments`` override entries of the configuration.

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
    return TransformersClassifier(classifier)


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
