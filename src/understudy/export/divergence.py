"""Where an exported network first departs from the trained one, layer by layer, for any target.

What is compared are exports of the network cut off behind a layer: the same target makes a file
that returns that layer's output, its runtime runs it, and PyTorch says what it should have been.
The layer is found by halving what may still be at fault, so a network of 60 layers takes about six
exports. The same search names the layer whose operator a target does not have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import InputError, MissingExtraError, ModelError, problem
from understudy.export.onnx_file import portable_copy
from understudy.export.target import (
    Artifact,
    ExportSource,
    Precision,
    Target,
    open_artifact,
    run_artifact,
)
from understudy.models.build import one_way

ImageShape = tuple[int, int, int]

# Rounding alone stays a hundred times below the first; the coarse steps of int8 add up to a few
# hundredths at the last layers of a network that is still accurate.
RELATIVE_TOLERANCES: dict[Precision, float] = {"float32": 1e-4, "int8": 0.2}
OUTPUT = "(output)"
BATCH_SIZE = 100
NUM_TRIAL_IMAGES = 2


@dataclass(frozen=True)
class LayerDifference:
    """One layer's output in the target's runtime against PyTorch.

    Attributes:
        name: the module's path in the model; "(output)" for the logits.
        relative_difference: |difference| / |PyTorch's output|, both as Euclidean norms over all
            images; None where the runtime's output is not finite.
    """

    name: str
    relative_difference: float | None


@dataclass(frozen=True)
class Divergence:
    """What a search for the first diverging layer found.

    Attributes:
        rows: the layers that were compared, in the order in which the network computes them.
        first: the layer at which the difference is above the tolerance although it is not at any
            layer that this one is computed from; it answers for functions called before it as
            well, such as a normalisation. "(output)": what the model does with the output of its
            last layer. None where the logits agree.
        tolerance: for ``relative_difference``.
        num_images: images compared.
        not_exported: layers that could not be compared, because the target exports the whole
            network but not the part that ends there.
    """

    target: str
    precision: Precision
    rows: tuple[LayerDifference, ...]
    first: str | None
    tolerance: float
    num_images: int
    not_exported: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as a plain dict."""
        return asdict(self)


class LayerOutput(nn.Module):
    """A network that returns what one of its layers computes: images_NCHW to [N, K], flattened.

    Args:
        model: takes images_NCHW.
        name: path of a module that is called once; "" for the model itself.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return the layer's output [N, K]."""

        # A copy, for activations that would overwrite the output in place.
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found.append(output.clone())
            # What lies behind the layer is dead code, which torch.export drops by itself; a trace
            # of TorchScript keeps it, but can be broken off.
            if torchscript.is_tracing():
                raise _LayerDoneError

        torchscript: Any = torch.jit
        found: list[Tensor] = []
        hook = self.model.get_submodule(self.name).register_forward_hook(keep)
        try:
            with suppress(_LayerDoneError):
                self.model(images_NCHW)
        finally:
            hook.remove()
        return found[0].flatten(1)


class _LayerDoneError(Exception):
    pass


def find_divergence(
    source: ExportSource,
    target: Target,
    images_NCHW: Tensor,
    *,
    precision: Precision = "float32",
    tolerance: float | None = None,
    every_layer: bool = False,
    num_threads: int = 1,
) -> Divergence:
    """Name the first layer that a target computes otherwise than PyTorch does.

    With int8 each part is quantised from ``source.model`` and the calibration images, not from
    ``source.quantized``, which is one whole graph.

    Args:
        target: a module of ``export.targets``, or what exports as one.
        images_NCHW: as ``run_artifact`` takes them, at least one; a few test images are enough.
        tolerance: of ``LayerDifference.relative_difference``; None for ``RELATIVE_TOLERANCES``.
        every_layer: compare all layers, for a table, and not only those that the search needs.

    Raises:
        InputError: there are no images, or nothing here runs the target's files.
        ModelError: the target cannot export the network.
    """
    _check_request(images_NCHW, target)
    source = replace(source, model=portable_copy(source.model))
    allowed = RELATIVE_TOLERANCES[precision] if tolerance is None else tolerance
    comparison = whole = _Comparison(source, target, images_NCHW, precision, num_threads)
    # The logits come first: should the target be unable to export the network, this says so.
    is_wrong = _exceeds(whole.relative_difference(OUTPUT, skip=False), allowed)

    def diverges(name: str) -> bool | None:
        exceeds = _exceeds(comparison.relative_difference(name), allowed)
        return None if name in comparison.skipped else exceeds

    first = None
    with one_way(source.model) as is_averaged:
        network = layer_graph(source.model, source.image_shape)
        if is_averaged and (is_wrong or every_layer):  # layers and logits of the pictures alone
            comparison = _Comparison(source, target, images_NCHW, precision, num_threads)
        if every_layer:
            for name in network.order:
                diverges(name)
        if is_wrong:
            first = network.first_failing(diverges) if diverges(OUTPUT) else OUTPUT
    compared = [name for name in network.order if name in comparison.found]
    return Divergence(
        target=whole.target_name,
        precision=precision,
        rows=tuple(LayerDifference(name, comparison.found[name]) for name in compared),
        first=first,
        tolerance=allowed,
        num_images=len(images_NCHW),
        not_exported=tuple(name for name in network.order if name in comparison.skipped),
    )


def _check_request(images_NCHW: Tensor, target: Target) -> None:
    if len(images_NCHW) == 0 or not target.RUNS_HERE:
        raise InputError(
            problem(
                f"divergence is asked for on {len(images_NCHW)} images with a target that "
                f"{'runs' if target.RUNS_HERE else 'does not run'} here",
                expected="at least one image and a target that runs here",
                mend="Give test images, and look for the fault with another target.",
            )
        )


@dataclass
class _Comparison:
    """Relative differences by layer, each computed once."""

    source: ExportSource
    target: Target
    images_NCHW: Tensor
    precision: Precision
    num_threads: int
    target_name: str = ""
    found: dict[str, float | None] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)

    def relative_difference(self, name: str, *, skip: bool = True) -> float | None:
        if name in self.found or name in self.skipped:
            return self.found.get(name)
        try:
            self.found[name] = self._compare(LayerOutput(self.source.model, _path(name)).eval())
        except InputError as error:  # ModelError too; in int8 that a part has no layer to quantise
            if not skip or isinstance(error, MissingExtraError):
                raise
            self.skipped.add(name)
        return self.found.get(name)

    def _compare(self, cut: LayerOutput) -> float | None:
        batches = torch.split(self.images_NCHW, BATCH_SIZE)
        with torch.inference_mode():
            expected_NK = torch.cat([cut(some) for some in batches])
        with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
            artifact = self._export(cut, expected_NK.shape[1], Path(folder))
            self.target_name = artifact.target
            running = open_artifact(artifact, num_threads=self.num_threads)
            given_NK = torch.cat([run_artifact(running, some) for some in batches])
        return _relative_difference(given_NK, expected_NK)

    def _export(self, cut: LayerOutput, num_outputs: int, folder: Path) -> Artifact:
        source = replace(
            self.source,
            model=cut,
            class_names=tuple(str(number) for number in range(num_outputs)),
            quantized=None,
            float_layers=tuple(f"model.{name}" for name in self.source.float_layers),
        )
        return self.target.export(source, folder, precision=self.precision)


def _exceeds(difference: float | None, allowed: float) -> bool:
    return difference is None or difference > allowed


def _relative_difference(given_NK: Tensor, expected_NK: Tensor) -> float | None:
    if given_NK.shape != expected_NK.shape or not torch.isfinite(given_NK).all():
        return None
    difference = (given_NK.double() - expected_NK.double()).square().sum().sqrt().item()
    return difference / (expected_NK.double().square().sum().sqrt().item() or 1.0)


def unsupported_operator(
    model: nn.Module,
    image_shape: ImageShape,
    converts: Callable[[nn.Module], bool],
    *,
    target: str,
    reason: str,
) -> ModelError:
    """Return the error for an operator that a target lacks, with the layer that it came from.

    Args:
        converts: whether the target converts a network; it is asked about parts of ``model``, and
            may raise ModelError where it cannot tell.
        target: the target's name for people, such as "Core ML".
        reason: the operator, or what the converter said.
    """
    portable = portable_copy(model)

    def fails(name: str) -> bool | None:
        try:
            return not converts(LayerOutput(portable, _path(name)).eval())
        except ModelError:
            return None

    with one_way(portable) as is_averaged:
        name = OUTPUT
        if not is_averaged or fails(OUTPUT):
            name = layer_graph(portable, image_shape).first_failing(fails)
    kind = type(portable.get_submodule(_path(name))).__name__
    where = f"layer {name} ({kind})" if name != OUTPUT else f"the model ({kind})"
    return ModelError(
        problem(
            f"{where} cannot be exported to {target} ({reason})",
            expected=f"operators that {target} has",
            mend="Replace the layer by one made of standard operators, or choose another target.",
        )
    )


def _path(name: str) -> str:
    return "" if name == OUTPUT else name


@dataclass(frozen=True)
class LayerGraph:
    """Which layers there are, and which of them each one is computed from.

    Attributes:
        order: layers in the order in which their outputs are there; the last is "(output)".
        origins: name to the names of the layers that its output depends on.
    """

    order: tuple[str, ...]
    origins: dict[str, frozenset[str]]

    def first_failing(self, fails: Callable[[str], bool | None]) -> str:
        """Return a layer that fails while none that it depends on does, given that the output does.

        A layer behind a failing one is taken to fail too, so the halves of what may be at fault
        can be thrown away at once, also where the network has branches.

        Args:
            fails: True, False, or None where it cannot be told.
        """
        failing = OUTPUT
        suspects = set(self.origins[OUTPUT])
        while suspects:
            inner = [name for name in self.order if name in suspects]
            name = inner[(len(inner) - 1) // 2]
            verdict = fails(name)
            if verdict:
                failing = name
                suspects &= self.origins[name]
            elif verdict is None:
                suspects.remove(name)
            else:
                suspects -= {name} | self.origins[name]
        return failing


def layer_graph(model: nn.Module, image_shape: ImageShape) -> LayerGraph:
    """Return the layers of a network: its modules that are called once and return one tensor.

    Which layer depends on which is seen by disturbing the output of one after the other.

    Args:
        model: in evaluation mode; float images_NCHW in [0, 1] to logits.
    """
    generator = torch.Generator().manual_seed(0)
    images_NCHW = torch.rand(NUM_TRIAL_IMAGES, *image_shape, generator=generator)
    calm = _outputs(model, images_NCHW, dict(_called_once(model, images_NCHW)))
    order = tuple(calm)
    modules = {name: model.get_submodule(_path(name)) for name in order}
    origins: dict[str, set[str]] = {name: set() for name in order}
    for disturbed in order[:-1]:

        def disturb(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            noise = torch.rand(output.shape, generator=generator)
            return output + noise * (1 + output.abs())

        # Registered first, so that the layer's own record is of the disturbed output as well.
        hook = modules[disturbed].register_forward_hook(disturb)
        try:
            moved = _outputs(model, images_NCHW, modules)
        finally:
            hook.remove()
        for name in order:
            if name != disturbed and not torch.equal(moved[name], calm[name]):
                origins[name].add(disturbed)
    return LayerGraph(order, {name: frozenset(found) for name, found in origins.items()})


def _called_once(model: nn.Module, images_NCHW: Tensor) -> Iterator[tuple[str, nn.Module]]:
    calls: dict[nn.Module, list[Any]] = {module: [] for module in model.modules()}
    with ExitStack() as hooks, torch.inference_mode():
        for module in calls:
            hook = module.register_forward_hook(lambda m, _, output: calls[m].append(output))
            hooks.callback(hook.remove)
        model(images_NCHW)
    for name, module in model.named_modules():
        output = calls[module][0] if len(calls[module]) == 1 else None
        if (
            isinstance(output, Tensor)
            and output.is_floating_point()
            and output.dim() > 1
            and len(output) == len(images_NCHW)
        ):
            yield name or OUTPUT, module


def _outputs(
    model: nn.Module, images_NCHW: Tensor, modules: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """Return the modules' outputs by name, in the order in which they come."""
    names = {module: name for name, module in modules.items()}
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[names[module]] = output.clone()

    with ExitStack() as hooks, torch.inference_mode():
        for module in modules.values():
            hooks.callback(module.register_forward_hook(keep).remove)
        model(images_NCHW)
    return found
