"""The ways to run a teacher: a runtime takes uint8 images and gives logits, and tapped features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from understudy.models.taps import Tap, Taps
from understudy.teachers.folding import folded
from understudy.teachers.native_conv import has_native_convolutions, with_native_convolutions
from understudy.teachers.tap_points import collecting, with_tap_points

# Few enough that a small network's activations stay in the cache from layer to layer, and enough
# to repay reading the weights once more.
NUM_IMAGES_A_THREAD = 34
NATIVE = "native convolutions"

Run = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


def runtimes(
    model: nn.Module, device: str, precision: str, images_NCHW: Tensor, taps: Sequence[Tap]
) -> dict[str, Callable[[], Run]]:
    """Return by name what builds each runtime of this precision; plain PyTorch comes first.

    Args:
        model: uint8 images NCHW to logits_NK, in evaluation mode and on the device.
        device: "cpu" or a CUDA device.
        precision: "auto", "float32", "bfloat16" or "int8".
        images_NCHW: uint8, an example; int8 is calibrated on them.
        taps: whose features to give beside the logits; plain PyTorch gives them through hooks on
            the model as it is, which makes it the measure of the others.
    """

    def tapped() -> nn.Module:
        return with_tap_points(model, taps, images_NCHW[:2].to(device))

    if precision == "bfloat16":
        return {"pytorch bfloat16": lambda: _eager_bfloat16(tapped(), device)}
    if precision == "int8":
        return {"onnxruntime int8": lambda: _onnx_int8(tapped(), images_NCHW)}
    plain: dict[str, Callable[[], Run]] = {"pytorch": lambda: plain_pytorch(model, device, taps)}
    if precision == "float32":
        return plain
    plain["pytorch folded channels-last"] = lambda: _folded(tapped(), device)
    if device == "cpu" and has_native_convolutions(model):
        plain[NATIVE] = lambda: _native(tapped())
    if device == "cpu":
        plain["onnxruntime"] = lambda: _onnx_float32(tapped(), images_NCHW)
    return plain


def plain_pytorch(model: nn.Module, device: str, taps: Sequence[Tap]) -> Run:
    """Return the model as it stands, with hooks where it is tapped."""
    run = _eager(model, device)
    if not taps:
        return lambda images_NCHW: (run(images_NCHW), {})
    tapped = Taps(model, taps)
    return lambda images_NCHW: tapped.run(run, images_NCHW)


def _eager(model: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    def run(images_NCHW: Tensor) -> Tensor:
        # cuDNN's TF32 keeps 10 bits: not the float32 that is promised.
        with torch.backends.cudnn.flags(allow_tf32=False):
            logits_NK: Tensor = model(images_NCHW.to(device))
            return logits_NK

    return run


def _channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _folded(model: nn.Module, device: str) -> Run:
    network = _channels_last(folded(model))
    plain = _eager(network, device)

    def run(images_NCHW: Tensor) -> Tensor:
        return plain(images_NCHW.contiguous(memory_format=torch.channels_last))

    return collecting(network, run)


def _native(model: nn.Module) -> Run:
    network = with_native_convolutions(model)
    plain = _eager(network, "cpu")

    def run(images_NCHW: Tensor) -> Tensor:
        images_NCHW = images_NCHW.contiguous(memory_format=torch.channels_last)
        num_at_once = NUM_IMAGES_A_THREAD * torch.get_num_threads()
        num_parts = max(1, -(-len(images_NCHW) // num_at_once))
        return torch.cat([plain(part) for part in torch.tensor_split(images_NCHW, num_parts)])

    return collecting(network, run)


def _eager_bfloat16(model: nn.Module, device: str) -> Run:
    """Weights in bfloat16 throughout; autocast only carries the float input across."""
    narrow = _channels_last(folded(model))
    for module in narrow.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)
    device_type = torch.device(device).type

    def run(images_NCHW: Tensor) -> Tensor:
        with torch.autocast(device_type, torch.bfloat16):
            images_NCHW = images_NCHW.to(device, memory_format=torch.channels_last)
            logits_NK: Tensor = narrow(images_NCHW)
            return logits_NK

    return collecting(narrow, run)


def _onnx_float32(model: nn.Module, images_NCHW: Tensor) -> Run:
    from understudy.teachers import onnx_runtime

    return onnx_runtime.runner(*onnx_runtime.exported(folded(model), images_NCHW[:2]))


def _onnx_int8(model: nn.Module, images_NCHW: Tensor) -> Run:
    from understudy.teachers import onnx_runtime

    program, names = onnx_runtime.exported(folded(model), images_NCHW[:2])
    return onnx_runtime.runner(onnx_runtime.quantized(program, images_NCHW), names)
