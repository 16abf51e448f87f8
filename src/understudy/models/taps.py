"""Taps: what a network computes on its way to the logits, by the name of a layer.

Hooks are on the network during one forward pass and at no other time, so a tapped network stays
what it was: the same state, the same export, the same speed where nothing is tapped.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from understudy.errors import ModelError, problem
from understudy.models.build import NormalizedModel, one_way
from understudy.models.embedding import (
    ClassifierCall,
    classifier_hook,
    classifying,
    first_tensor,
    may_classify,
    own_copy,
)
from understudy.models.fast_conv import FastConv3x3
from understudy.models.feature_kinds import (
    FeatureKind,
    Shape,
    as_kind,
    kind_shape,
    tokens_to_map,
)
from understudy.models.onnx_model import OnnxModel

__all__ = [
    "EMBEDDING",
    "FeatureKind",
    "Tap",
    "Taps",
    "as_kind",
    "check_taps",
    "inner_network",
    "kind_shape",
    "tap_shapes",
    "tokens_to_map",
]

ImageShape = tuple[int, int, int]

EMBEDDING = "embedding"
NUM_TRIAL_IMAGES = 2


@dataclass(frozen=True)
class Tap:
    """A layer, and what is wanted of its output.

    Attributes:
        name: path of a module inside the network ("layer3", "blocks.0.pointwise"; the preprocessing
            of a ``NormalizedModel`` does not count), whose output is tapped; or "embedding", the
            input of the last linear classifier, averaged over positions where it has any: [N, D].
        kind: see ``as_kind``.

    Raises:
        ModelError: for another kind.
    """

    name: str
    kind: FeatureKind = "map"

    def __post_init__(self) -> None:
        if self.kind not in get_args(FeatureKind):
            raise ModelError(
                problem(
                    f"a tap of kind {self.kind!r}",
                    expected=f"one of {', '.join(get_args(FeatureKind))}",
                    mend="Correct it.",
                )
            )

    @property
    def key(self) -> str:
        """The name under which features are handed on and stored."""
        return f"{self.name}:{self.kind}"


def tap_shapes(model: nn.Module, image_shape: ImageShape) -> dict[str, Shape]:
    """Return every name that can be tapped with the shape of its output, without the batch.

    One forward pass of two pictures in evaluation mode; the model and the random numbers are as
    they were afterwards. A black box (``OnnxModel``) has no names.

    Args:
        model: a network, or a ``NormalizedModel`` around one.
        image_shape: (C, H, W) of the pictures that ``model`` takes.
    """
    return _survey(model, image_shape).shapes


def check_taps(
    model: nn.Module, image_shape: ImageShape, names: Sequence[str | Tap], *, where: str
) -> list[str]:
    """Return what is wrong with taps; the model and the random numbers are as they were afterwards.

    Args:
        model: a network, or a ``NormalizedModel`` around one.
        image_shape: (C, H, W) of the pictures that ``model`` takes.
        names: of the layers; of whole taps the kind is checked too.
        where: what the user has to change, at the start of every problem.
    """
    taps = list(dict.fromkeys(Tap(name) if isinstance(name, str) else name for name in names))
    if not taps:
        return []
    if isinstance(inner_network(model), OnnxModel):
        return [f"{where}: {_black_box(taps)}"]
    survey = _survey(model, image_shape)
    problems, unknown = [], []
    for tap in taps:
        if tap.name in survey.shapes:
            try:
                kind_shape(survey.shapes[tap.name], tap.kind)
            except ModelError as error:
                problems.append(f"{where}: '{tap.name}': {error}")
        elif survey.num_calls.get(tap.name, 0) > 1:
            problems.append(f"{where}: {_called_again(tap.name, survey.num_calls[tap.name])}")
        else:
            unknown.append(tap.name)
    if unknown:
        problems.append(f"{where}: {_unknown(unknown, survey)}")
    return problems


class Taps:
    """Runs a network and returns its features beside its logits.

    Args:
        model: a network, or a ``NormalizedModel`` around one.
        taps: what is wanted; none is fine.

    Raises:
        ModelError: the network has no module of that name, or is a black box.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap]) -> None:
        self.taps = tuple(dict.fromkeys(taps))
        self._network = inner_network(model)
        if self.taps and isinstance(self._network, OnnxModel):
            raise ModelError(_black_box(self.taps))
        modules = _named_modules(self._network)
        layers = [tap for tap in self.taps if tap.name != EMBEDDING]
        unknown = [tap.name for tap in layers if tap.name not in modules]
        if unknown:
            raise ModelError(_unknown(unknown, _Survey(dict.fromkeys(modules, ()), {})))
        self._layers = [(modules[tap.name], tap) for tap in layers]
        # All that may be the classifier, until a forward pass has shown which it is.
        self._classifiers: list[nn.Module] = []
        if len(layers) < len(self.taps):
            self._classifiers = [m for m in self._network.modules() if may_classify(m)]

    def run(
        self, forward: Callable[[Tensor], Tensor], images_NCHW: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (logits_NK, features by ``Tap.key``), both with their gradients.

        Features are copies, in float32 at least: what later layers do in place does not reach them,
        and under autocast they fit adapters and losses outside of it.

        Args:
            forward: the model itself, or what trains it (Fabric, DistributedDataParallel).
            images_NCHW: its argument.

        Raises:
            ModelError: a tapped module was called several times or not at all, gave no
                floating-point tensor, no linear classifier was found, or ``forward`` is compiled.
        """
        if self.taps and _is_compiled(forward):
            raise ModelError(_compiled(self.taps))
        found: dict[str, Tensor] = {}
        classified: list[ClassifierCall] = []
        outputs: list[Tensor | None] = []
        with contextlib.ExitStack() as hooks:
            for module, tap in self._layers:
                hooks.callback(module.register_forward_hook(_layer_hook(tap, found)).remove)
            for module in self._classifiers:
                hook = classifier_hook(classified)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            if self._classifiers:
                hooks.callback(self._network.register_forward_hook(_output_hook(outputs)).remove)
            logits_NK = forward(images_NCHW)
        wanted = [tap for tap in self.taps if tap.name == EMBEDDING]
        if wanted:
            answer = outputs[-1] if outputs else None
            call = classifying(classified, logits_NK if answer is None else answer)
            if call is None:
                raise ModelError(_no_classifier(_named_modules(self._network)))
            self._classifiers = [call.module]
            found |= {tap.key: as_kind(call.embedding_ND, tap.kind) for tap in wanted}
        missing = [tap.name for tap in self.taps if tap.key not in found]
        if missing:
            raise ModelError(_silent(missing))
        return logits_NK, {tap.key: found[tap.key] for tap in self.taps}


def inner_network(model: nn.Module) -> nn.Module:
    """Return the network whose module paths are tap names: without the preprocessing around it."""
    return model.network if isinstance(model, NormalizedModel) else model


def _named_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path, without the network itself and what it may compute unasked."""
    named = {name: m for name, m in network.named_modules(remove_duplicate=False) if name}
    # In training its kernels do the activation too, and the module is not called.
    fused = {m.activation for m in named.values() if isinstance(m, FastConv3x3)}
    return {name: m for name, m in named.items() if m not in fused}


def _layer_hook(tap: Tap, found: dict[str, Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if tap.key in found:
            raise ModelError(_called_again(tap.name, 2))
        features = first_tensor(output)
        if features is None:
            return
        if tap.kind == "pooled" and features.dim() > 2:
            # A mean has memory of its own, and its gradient does not read the map again.
            found[tap.key] = as_kind(features, tap.kind)
        else:
            found[tap.key] = as_kind(own_copy(features), tap.kind)

    return keep


def _is_compiled(forward: Callable[[Tensor], Tensor]) -> bool:
    if not isinstance(forward, nn.Module):
        return False
    # torch.compile puts a module around the network, Module.compile a function into it.
    parts = list(forward.modules())
    return any("_orig_mod" in p._modules or p._compiled_call_impl is not None for p in parts)


def _output_hook(outputs: list[Tensor | None]) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(first_tensor(output))

    return keep


# What a network offers


@dataclass(frozen=True)
class _Survey:
    """Shapes of what can be tapped, and how often each module was called; by name."""

    shapes: dict[str, Shape]
    num_calls: dict[str, int]


def _survey(model: nn.Module, image_shape: ImageShape) -> _Survey:
    network = inner_network(model)
    if isinstance(network, OnnxModel):
        return _Survey({}, {})
    calls: dict[nn.Module, list[Tensor | None]] = {}
    classified: list[ClassifierCall] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        calls.setdefault(module, []).append(first_tensor(output))

    images_NCHW = _trial_images(model, image_shape)
    with _undisturbed(model), contextlib.ExitStack() as hooks:
        for module in network.modules():
            hooks.callback(module.register_forward_hook(note).remove)
            if may_classify(module):
                hook = classifier_hook(classified)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
        model(images_NCHW)
    shapes: dict[str, Shape] = {}
    answer = calls.get(network, [None])[-1]
    classifier = None if answer is None else classifying(classified, answer)
    if classifier is not None:
        shapes[EMBEDDING] = tuple(classifier.embedding_ND.shape[1:])
    named = _named_modules(network)
    for name, module in named.items():
        tensors = calls.get(module, [])
        features = tensors[0] if len(tensors) == 1 else None
        if features is None or features.dim() not in (2, 3, 4) or name in shapes:
            continue
        if len(features) == NUM_TRIAL_IMAGES:  # not rows of windows or patches
            shapes[name] = tuple(features.shape[1:])
    return _Survey(shapes, {name: len(calls.get(module, [])) for name, module in named.items()})


def _trial_images(model: nn.Module, image_shape: ImageShape) -> Tensor:
    # Noise rather than zeros, on which layers that differ may agree; from a generator of its own.
    weights = (p for p in model.parameters() if p.is_floating_point())
    like = next(weights, torch.empty(0))
    noise = torch.rand(NUM_TRIAL_IMAGES, *image_shape, generator=torch.Generator().manual_seed(0))
    return noise.to(like.device, like.dtype)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients and mirror images; flags and random numbers are put back."""
    training = {module: module.training for module in model.modules()}
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), one_way(model):
            model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


# Errors


def _black_box(taps: Sequence[Tap]) -> str:
    return problem(
        f"features {_quoted(tap.name for tap in taps)} of an ONNX file, a black box",
        expected="a network in PyTorch",
        mend="Use losses on logits with this teacher, or give its weights and network instead.",
    )


def _called_again(name: str, num_calls: int) -> str:
    return problem(
        f"'{name}' is called {num_calls} times in one forward pass",
        expected="a module that is called once",
        mend="Tap the module around it, or one beside it.",
    )


def _silent(names: Sequence[str]) -> str:
    return problem(
        f"{_quoted(names)} gave nothing in this forward pass",
        expected="a module that is called and returns a floating-point tensor",
        mend="Tap another module.",
    )


def _compiled(taps: Sequence[Tap]) -> str:
    return problem(
        f"{_quoted(tap.name for tap in taps)} of a compiled network, which runs without its hooks",
        expected="a network that is not compiled",
        mend="Set compile: false, or use losses on logits.",
    )


def _no_classifier(names: Iterable[str]) -> str:
    return problem(
        f"no linear layer or 1x1 convolution of this network gives its logits, so '{EMBEDDING}' "
        "names nothing",
        expected=f"a module path: {', '.join(names)}",
        mend="Name the layer whose output is the embedding.",
    )


def _unknown(unknown: Sequence[str], survey: _Survey) -> str:
    names = [
        name if not shape else f"{name} {list(shape)}" for name, shape in survey.shapes.items()
    ]
    near = [
        match
        for name in unknown
        for match in difflib.get_close_matches(name.removeprefix("network."), survey.shapes, n=2)
    ]
    return problem(
        f"the network has no layer {_quoted(unknown)} to tap",
        expected=f"one of: {', '.join(names) or '(it has none)'}",
        mend=f"Did you mean {' or '.join(near)}?" if near else "Name one of these.",
    )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in dict.fromkeys(names))
