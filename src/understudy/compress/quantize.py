"""Quantisation-aware training: a network that computes with int8 values while it learns.

torchao's PT2E does the graph work: convolution and batch norm are folded as they will be in the
file, so the weights that are rounded are the ones that ship (Krishnamoorthi 2018, "Quantizing deep
convolutional networks for efficient inference", section 3.2). What is rounded where is decided in
``quant_annotate``.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx.graph import CodeGen

from understudy.compress.quant_fold import (
    LEARNS,
    lift_zero_scales,
    merge_norms,
    norm_nodes,
    restore_norms,
)
from understudy.compress.quant_graph import (
    average_mirrored,
    restore_convolutions,
    use_native_convolutions,
)
from understudy.errors import CheckpointError, InputError, MissingExtraError, ModelError, problem
from understudy.models.build import NormalizedModel, both_ways

if TYPE_CHECKING:
    from torch.fx import GraphModule

_EXTRA = "compress"
_DROPOUT = torch.ops.aten.dropout.default
_DROPS = 2  # position of aten::dropout's ``train``


class QatNetwork(nn.Module):
    """A network in quantisation-aware training; made by ``prepare_qat``.

    It is called as the network it was made from: uint8 images or float images in [0, 1], NCHW, any
    batch size, to logits NK. ``train`` and ``eval`` switch batch norm and dropout as usual, and in
    evaluation the ranges of the activations stand still too.

    After ``freeze_after`` forward passes in training, batch norm uses its running statistics and
    the ranges stand still, so that the last updates learn the network as it will run. The count is
    a buffer: it goes with the state dict, and a resumed training freezes at the same pass.

    A network that averages over mirror images learns from one of the two at a time, as it did in
    float, and answers in evaluation with the average.

    Attributes:
        graph: the captured network with fake quantisation, of one way.
        image_shape: (C, H, W).
        flip_average: whether answers are the mean of a picture's and its mirror image's.
    """

    num_passes: Tensor

    def __init__(
        self,
        graph: GraphModule,
        *,
        image_shape: tuple[int, int, int],
        freeze_after: int | None,
        flip_average: bool,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.flip_average = flip_average
        self.image_shape = image_shape
        self.freeze_after = freeze_after
        self.register_buffer("num_passes", torch.zeros((), dtype=torch.int64))
        self._mode: tuple[bool, bool] | None = None

    @property
    def frozen(self) -> bool:
        """Whether batch norm and ranges stand still in training by now."""
        return self.freeze_after is not None and int(self.num_passes) >= self.freeze_after

    def train(self, mode: bool = True) -> QatNetwork:
        # A captured graph refuses train() and eval(); its mode follows in the next forward pass.
        self.training = mode
        return self

    def forward(self, images_NCHW: Tensor) -> Tensor:
        pixels_NCHW = images_NCHW
        if images_NCHW.dtype == torch.uint8:
            pixels_NCHW = images_NCHW.float() / 255
        # From the attribute and not in train(): an evaluator may give a module its mode back by
        # setting the attribute alone.
        self._set_mode(training=self.training, learns=self.training and not self.frozen)
        if self.training:
            self.num_passes += 1
        elif self.flip_average:
            return both_ways(self.graph, pixels_NCHW)
        logits_NK: Tensor = self.graph(pixels_NCHW)
        return logits_NK

    def _set_mode(self, *, training: bool, learns: bool) -> None:
        if self._mode == (training, learns):
            return
        for norm in norm_nodes(self.graph):
            norm.update_arg(LEARNS, learns)
        for dropout in self.graph.graph.find_nodes(op="call_function", target=_DROPOUT):
            dropout.update_arg(_DROPS, training)
        self.graph.recompile()
        self._set_observing(learns)
        self._mode = training, learns

    def _set_observing(self, observing: bool) -> None:
        for module in self._observers():
            module.observing = observing

    def _observers(self) -> list[Any]:
        return [module for module in self.graph.modules() if hasattr(module, "observing")]

    @property
    def num_ranges(self) -> int:
        """Number of activations that are rounded."""
        return len(self._observers())

    def observe(self, images_NCHW: Tensor) -> None:
        """Let the ranges of the activations follow these images, with batch norm as it is."""
        was_training = self.training
        self.eval()
        self._set_mode(training=False, learns=False)
        self._set_observing(True)
        try:
            with torch.no_grad():
                self(images_NCHW)
        finally:
            self._set_observing(False)
            self.train(was_training)


def prepare_qat(
    model: nn.Module,
    *,
    example_NCHW: Tensor,
    float_layers: Sequence[str] = (),
    freeze_after: int | None = None,
) -> QatNetwork:
    """Return a trainable copy of ``model`` that rounds its weights and activations to integers.

    Weights: int8 from -63 to 63, of depthwise convolutions to 127 (``quant_affine`` says why), a
    scale for each output channel, as they are in every step.
    Activations: uint8, one range each, set by the example images and then a moving average over
    training batches. Train in float32: with bfloat16 the rounding of the arithmetic is coarser than
    that of int8.

    Args:
        model: float32; takes float images in [0, 1]; is not changed. If it is a ``NormalizedModel``
            with ``flip_average``, it learns from one of the two ways at a time.
        example_NCHW: real images, uint8 or float, at least two; a batch or more of the training or
            calibration split gives a good start.
        float_layers: names of modules of ``model`` that stay in float32.
        freeze_after: forward passes in training (updates times micro-batches) after which batch
            norm and ranges stand still; None: never. Three quarters of the training is usual.

    Raises:
        MissingExtraError: torchao is not installed.
        InputError: fewer than two images, or a name that ``model`` does not have.
        ModelError: the model cannot be captured, or no layer is left to quantise.
    """
    _check_request(model, example_NCHW, float_layers)
    modules = _import_torchao()
    pixels_NCHW = example_NCHW.cpu()
    if pixels_NCHW.dtype == torch.uint8:
        pixels_NCHW = pixels_NCHW.float() / 255
    single = copy.deepcopy(model).cpu().float().train()
    flips = False
    if isinstance(single, NormalizedModel):
        flips, single.flip_average = single.flip_average, False
    graph = _capture(single, pixels_NCHW)
    quantizer = modules["annotate"].OnnxRuntimeQuantizer(float_layers)
    with _quiet_torchao():
        graph = modules["pt2e"].prepare_qat_pt2e(graph, quantizer)
    use_native_convolutions(graph)
    channels, height, width = pixels_NCHW.shape[1:]
    network = QatNetwork(
        graph,
        image_shape=(channels, height, width),
        freeze_after=freeze_after,
        flip_average=flips,
    )
    if network.num_ranges == 0:
        raise ModelError(
            problem(
                f"no layer of the model is left to quantise (float_layers: {list(float_layers)})",
                expected="at least one convolution or linear layer",
                mend="Name fewer float layers.",
            )
        )
    network.observe(pixels_NCHW)
    return network.train()


def convert_qat(prepared: QatNetwork) -> GraphModule:
    """Return the network as it will run: int8 weights, quantise and dequantise nodes.

    What it takes and returns is as for ``prepared``, but float images only. The prepared network
    is left as it is.
    """
    modules = _import_torchao()
    network = copy.deepcopy(prepared).cpu().float().eval()
    with torch.no_grad():
        # The scales of the weights as they are now.
        logits_NK = network(torch.zeros(2, *network.image_shape))
    restore_convolutions(network.graph)
    graph = network.graph.graph
    for node in graph.find_nodes(op="call_function", target=_DROPOUT):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    merge_norms(network.graph)
    with _quiet_torchao():
        converted: GraphModule = modules["pt2e"].convert_pt2e(network.graph)
    restore_norms(converted)
    if network.flip_average:
        width, num_classes = network.image_shape[-1], logits_NK.shape[1]
        average_mirrored(converted, width=width, num_classes=num_classes)
    converted.requires_grad_(False)
    return converted


def float_weights(prepared: QatNetwork, model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with the weights and statistics that the training left.

    It computes in float32: for runtimes that quantise with tools of their own, and to see what the
    rounding costs.

    Args:
        model: the one that ``prepared`` was made from.

    Raises:
        CheckpointError: ``model`` has other weights.
    """
    trained = prepared.graph.state_dict()
    restored = copy.deepcopy(model).cpu().float().eval()
    own = restored.state_dict()
    # A buffer that the graph does not use is not captured; the model's own value is right.
    used = {name for name, _ in model.named_parameters()} | (own.keys() & trained.keys())
    bad = [name for name in used if getattr(trained.get(name), "shape", None) != own[name].shape]
    if bad:
        raise CheckpointError(
            problem(
                f"the trained network has no fitting {', '.join(sorted(bad)[:5])}",
                expected="the network that quantisation-aware training began with",
                mend="Give the same model to prepare_qat and float_weights.",
            )
        )
    restored.load_state_dict({**own, **{name: trained[name] for name in used}})
    return restored


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the layers that int8 is about: convolutions and linear layers."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def check_layers(model: nn.Module, float_layers: Sequence[str]) -> list[str]:
    """Return a problem for each name that is not one of the model's modules."""
    known = {name for name, _ in model.named_modules()}
    return [
        problem(
            f"the float layer '{name}' is not in the model",
            expected=f"one of {', '.join(layer_names(model))}, or a module that holds some",
            mend="Correct the name.",
        )
        for name in float_layers
        if name not in known or name == ""
    ]


def _check_request(model: nn.Module, example_NCHW: Tensor, float_layers: Sequence[str]) -> None:
    problems = check_layers(model, float_layers)
    if example_NCHW.ndim != 4 or len(example_NCHW) < 2:
        problems.append(
            problem(
                f"quantisation-aware training was given images of {tuple(example_NCHW.shape)}",
                expected="at least two images [n, C, H, W] to set the ranges with",
                mend="Set data.calibration_fraction above 0.",
            )
        )
    if problems:
        raise InputError(*problems)


def _capture(model: nn.Module, pixels_NCHW: Tensor) -> GraphModule:
    """Return the network as a graph of any batch size, in training mode, with its own weights."""
    lift_zero_scales(model)
    try:
        with _quiet_torchao():
            captured = torch.export.export(
                model,
                (pixels_NCHW[:2],),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                strict=False,
            )
            # Checks of the batch size at every call would tie the graph to this capture.
            graph: Any = captured.module(check_guards=False)
    # Tracing runs the user's code: any exception can come out of it.
    except Exception as error:
        raise ModelError(
            problem(
                f"the model cannot be captured for quantisation-aware training "
                f"({str(error).strip().splitlines()[0]})",
                expected="no branches on values, and any batch size",
                mend="Use static quantisation, or write the layer without such branches.",
            )
        ) from error
    for node in list(graph.graph.nodes):
        counts_batches = node.target is torch.ops.aten.add_.Tensor and str(
            getattr(node.args[0], "target", "")
        ).endswith("num_batches_tracked")
        # The first would count in evaluation too, the second ties the graph to a device.
        if counts_batches or node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
    # A plain function of one tensor: the exporter's own nesting of inputs and outputs makes copies
    # of the graph warn.
    output = graph.graph.output_node()
    outputs: Any = output.args[0]
    if len(outputs) != 1:
        raise ModelError(
            problem(
                f"the model returns {len(outputs)} tensors",
                expected="logits alone",
                mend="Quantise the network of one exit or task.",
            )
        )
    output.args = tuple(outputs)
    graph.graph.set_codegen(CodeGen())
    del graph._in_spec, graph._out_spec
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph  # type: ignore[no-any-return]


def _import_torchao() -> dict[str, Any]:
    """Import what is needed of torchao, or say which extra brings it."""
    try:
        with _quiet_torchao():
            return {
                "annotate": importlib.import_module("understudy.compress.quant_annotate"),
                "pt2e": importlib.import_module("torchao.quantization.pt2e.quantize_pt2e"),
            }
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torchao":
            raise
        raise MissingExtraError("torchao", _EXTRA) from None


@contextlib.contextmanager
def _quiet_torchao() -> Iterator[None]:
    """Keep torchao's and the exporter's notes to their developers off the user's screen.

    They are: kernels for other machines were not loaded, deprecated calls between the two.
    """
    names = ("torchao", "torch.export", "torch.fx", "torch.utils._pytree")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
