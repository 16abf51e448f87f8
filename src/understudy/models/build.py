"""Build a network from its name, and give it the pixels and classes of the data."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from understudy.errors import ModelError, problem
from understudy.models.catalog import CATALOG, check_model
from understudy.models.foreign import build_timm, build_transformers
from understudy.models.inverted import InvertedResidualNet
from understudy.models.mlp import MLP
from understudy.models.own_code import own_callable
from understudy.models.paper import PaperStudent, PaperTeacher
from understudy.models.resnet import ResNet
from understudy.models.separable import SeparableNet
from understudy.models.strided_pointwise import guard_strided_pointwise

__all__ = [
    "NormalizedModel",
    "both_ways",
    "build_network",
    "check_model",
    "check_network",
    "one_way",
]

ColorOrder = Literal["rgb", "bgr", "gray"]
ImageShape = tuple[int, int, int]

# name -> network(num_classes=..., in_channels=..., **arguments)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet,
    "paper_student": PaperStudent,
    "paper_teacher": PaperTeacher,
    "separable": SeparableNet,
    "inverted": InvertedResidualNet,
}

# Luma weights of ITU-R BT.601, as Pillow's conversion to "L".
_LUMA = (0.299, 0.587, 0.114)


def build_network(
    name: str,
    *,
    num_classes: int,
    image_shape: ImageShape,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """Build a network by name.

    Args:
        name: a built-in name (``catalog.CATALOG``), ``module:callable``, ``timm:NAME_OR_FOLDER``
            or ``transformers:NAME_OR_FOLDER``. A callable gets the arguments and, if its signature
            takes them, ``num_classes`` and ``image_shape``.
        num_classes: K of the logits.
        image_shape: (C, H, W) of the normalised float pictures the network will get.
        arguments: the network's own arguments.

    Returns:
        A module from normalised float images_NCHW to logits_NK, with fresh weights; a
        ``transformers`` name, and a folder that holds weights, brings its own.

    Raises:
        ModelError: unknown name, wrong arguments, or a network whose output is not [N, K].
        MissingExtraError: timm or transformers is not installed.
    """
    problems = check_model(name, arguments)
    if problems:
        raise ModelError(*problems)
    if name in CATALOG:
        network = _build_catalog(name, num_classes, image_shape, dict(arguments))
    else:
        source, _, target = name.partition(":")
        if source == "timm":
            network = build_timm(
                target, num_classes=num_classes, in_channels=image_shape[0], arguments=arguments
            )
        elif source == "transformers":
            network = build_transformers(target, num_classes=num_classes, arguments=arguments)
        else:
            network = _build_user(name, num_classes, image_shape, dict(arguments))
    check_network(network, name=name, num_classes=num_classes, image_shape=image_shape)
    guard_strided_pointwise(network)
    return network


def _build_catalog(
    name: str, num_classes: int, image_shape: ImageShape, arguments: dict[str, Any]
) -> nn.Module:
    if name == "mlp":
        return MLP(num_classes=num_classes, image_shape=image_shape, **arguments)
    if name.startswith("resnet") and name != "resnet":
        name, arguments["depth"] = "resnet", int(name.removeprefix("resnet"))
    return NETWORKS[name](num_classes=num_classes, in_channels=image_shape[0], **arguments)


def _build_user(
    name: str, num_classes: int, image_shape: ImageShape, arguments: dict[str, Any]
) -> nn.Module:
    make = own_callable(name)
    offered = {"num_classes": num_classes, "image_shape": image_shape}
    try:
        accepted = inspect.signature(make).parameters
    except ValueError:  # some callables written in C have no signature
        accepted = MappingProxyType({})
    known = {key: value for key, value in offered.items() if key in accepted}
    network = _call(make, name, known | arguments)
    if not isinstance(network, nn.Module):
        raise ModelError(
            problem(
                f"model '{name}' returned a {type(network).__name__}",
                expected="a torch.nn.Module",
                mend="Return the network from the callable.",
            )
        )
    return network


def _call(make: Callable[..., Any], name: str, arguments: dict[str, Any]) -> Any:
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        raise ModelError(
            problem(
                f"model '{name}' was given {sorted(arguments)}: {error}",
                expected=f"arguments of {inspect.signature(make)}",
                mend="Correct the model's arguments in the recipe, or name a callable that needs "
                "no others.",
            )
        ) from None
    except ValueError:  # no signature to check against
        pass
    try:
        return make(**arguments)
    except Exception as error:  # user code may raise anything
        raise ModelError(
            problem(
                f"building model '{name}' raised {type(error).__name__}: {error}",
                expected="a network",
                mend="Correct its arguments or the callable.",
            )
        ) from error


def check_network(
    network: nn.Module, *, name: str, num_classes: int, image_shape: ImageShape
) -> None:
    """Run two blank pictures through a network and check that logits [2, K] come out.

    Raises:
        ModelError: the network fails on this image shape, or its output is something else.
    """
    was_training = network.training
    network.eval()
    given = f"model '{name}' on pictures [2, {', '.join(map(str, image_shape))}]"
    try:
        with torch.no_grad():
            output = network(torch.zeros(2, *image_shape))
    except Exception as error:  # user code may raise anything
        raise ModelError(
            problem(
                f"{given} raised {type(error).__name__}: {error}",
                expected=f"logits of shape [2, {num_classes}]",
                mend="Choose a network and pictures that fit each other: data.image_size in a "
                "recipe, --shape of `understudy profile`.",
            )
        ) from error
    finally:
        network.train(was_training)
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if found != (2, num_classes):
        raise ModelError(
            problem(
                f"{given} returned {found}",
                expected=f"logits of shape (2, {num_classes}), one column a class",
                mend="Give the network the data's number of classes (--classes of `understudy "
                "profile`) and return only the logits.",
            )
        )


class NormalizedModel(nn.Module):
    """A network with the preprocessing it was trained with, answering in the data's class order.

    Input: images_NCHW in the data's RGB (or one gray channel), uint8 (0 to 255) or float (0 to 1).
    Output: logits_NK, column k for the data's class k.

    Args:
        network: normalised float images to logits.
        mean: per channel of the *network's* input, for pixels in [0, 1].
        std: likewise, above 0.
        color_order: what the network was trained on. "rgb": pictures go in as they are (whatever
            their channel count); "bgr": the channels are reversed; "gray": colour pictures are
            converted with the BT.601 luma.
        output_order: ``output_order[k]`` is the network's output for the data's class k; None if
            they agree. See ``load.class_order``.
        flip_average: whether the logits are the mean of the picture's and its mirror image's, as
            ten-crop testing averages (Krizhevsky et al. 2012). Not in training, which sees one of
            the two at a time, but in every captured graph: what is exported has it built in.

    Raises:
        ModelError: lengths differ, a standard deviation is not positive, or an index is twice or
            negative in ``output_order``.
    """

    scale: Tensor
    shift: Tensor
    luma: Tensor
    output_order: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        color_order: ColorOrder = "rgb",
        output_order: Sequence[int] | None = None,
        flip_average: bool = False,
    ) -> None:
        super().__init__()
        problems = _normalization_problems(mean, std, color_order, output_order)
        if problems:
            raise ModelError(*problems)
        self.network = network
        self.color_order = color_order
        self.flip_average = flip_average
        # (x - mean) / std as x * scale + shift; buffers, so that they move with the model, but not
        # saved: they are the recipe's, and a checkpoint must not overrule it.
        scale = 1 / torch.tensor(std, dtype=torch.float64)
        shift = -torch.tensor(mean, dtype=torch.float64) * scale
        self.register_buffer("scale", scale.float().view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(-1, 1, 1), persistent=False)
        self.register_buffer("luma", torch.tensor(_LUMA).view(-1, 1, 1), persistent=False)
        order = None if output_order is None else torch.tensor(list(output_order))
        self.register_buffer("output_order", order, persistent=False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return logits_NK in the data's class order."""
        logits_NK: Tensor
        pixels_NCHW = self.normalize(images_NCHW)
        # A model around this one may be captured in training mode.
        if self.flip_average and (not self.training or torch.compiler.is_exporting()):
            logits_NK = both_ways(self.network, pixels_NCHW)
        else:
            logits_NK = self.network(pixels_NCHW)
        if self.output_order is not None:
            logits_NK = logits_NK[:, self.output_order]
        return logits_NK

    def normalize(self, images_NCHW: Tensor) -> Tensor:
        """Return what the network sees, float, in the memory format of the input."""
        pixels = images_NCHW.to(self.scale.dtype)
        # /255 is folded into the scale: one pass over the pixels.
        scale = self.scale / 255 if images_NCHW.dtype == torch.uint8 else self.scale
        if self.color_order == "bgr":
            pixels = pixels.flip(1)
        elif self.color_order == "gray" and pixels.shape[1] == 3:
            pixels = (pixels * self.luma).sum(dim=1, keepdim=True)
        if _is_channels_last(pixels) and not torch.compiler.is_compiling():
            # Whole rows of pixels at once: three channels are too short a run for vectors.
            num_images, num_channels, height, width = pixels.shape
            rows = pixels.permute(0, 2, 3, 1).reshape(-1, width * num_channels)
            shift_row, scale_row = self.shift.flatten().repeat(width), scale.flatten().repeat(width)
            rows = torch.addcmul(shift_row, rows, scale_row)
            return rows.view(num_images, height, width, num_channels).permute(0, 3, 1, 2)
        return torch.addcmul(self.shift, pixels, scale)

    def extra_repr(self) -> str:
        return f"color_order={self.color_order!r}, flip_average={self.flip_average}"


def both_ways(network: Callable[[Tensor], Tensor], images_NCHW: Tensor) -> Tensor:
    """Return the mean logits_NK of pictures and their mirror images."""
    torchscript: Any = torch.jit  # untyped
    if torchscript.is_tracing():  # for ncnn, which has neither batches nor index_select
        return (network(images_NCHW) + network(images_NCHW.flip(3))) / 2
    # Not flip(): its slice with step -1 is more than the translator to C knows.
    columns_W = torch.arange(images_NCHW.shape[3] - 1, -1, -1, device=images_NCHW.device)
    mirrored_NCHW = images_NCHW.index_select(3, columns_W)
    # One batch: an exported file holds the layers once.
    both_MK = network(torch.cat([images_NCHW, mirrored_NCHW]))
    return both_MK.view(2, -1, both_MK.shape[1]).mean(dim=0)


@contextlib.contextmanager
def one_way(model: nn.Module) -> Iterator[bool]:
    """Take pictures as they are, without their mirror images, for as long as this lasts.

    What looks into a network then finds as many features in its layers as there are pictures.
    Yields whether the model, or a part of it, averages over both otherwise.
    """
    parts = [m for m in model.modules() if isinstance(m, NormalizedModel) and m.flip_average]
    for part in parts:
        part.flip_average = False
    try:
        yield bool(parts)
    finally:
        for part in parts:
            part.flip_average = True


def _is_channels_last(images_NCHW: Tensor) -> bool:
    in_last = images_NCHW.is_contiguous(memory_format=torch.channels_last)
    return in_last and not images_NCHW.is_contiguous()


def _normalization_problems(
    mean: Sequence[float],
    std: Sequence[float],
    color_order: str,
    output_order: Sequence[int] | None,
) -> list[str]:
    problems = []
    if len(mean) != len(std) or not mean or min(std) <= 0:
        problems.append(
            problem(
                f"normalisation with mean {list(mean)} and std {list(std)}",
                expected="one mean and one positive std for each input channel",
                mend="Give the values that the network was trained with, for pixels in [0, 1].",
            )
        )
    if color_order not in ("rgb", "bgr", "gray"):
        problems.append(
            problem(f"color_order {color_order!r}", expected="rgb, bgr or gray", mend="Correct it.")
        )
    if output_order is not None and (
        len(set(output_order)) != len(output_order) or min(output_order, default=0) < 0
    ):
        problems.append(
            problem(
                f"output_order {list(output_order)}",
                expected="for each class of the data a different output index",
                mend="Give the teacher's class names and let the order be worked out.",
            )
        )
    return problems
