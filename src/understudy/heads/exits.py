"""Early exits: side heads on the way to the logits (Teerapittayanon et al. 2016, "BranchyNet").

Exits are numbered from shallow to deep; the last is the network's own classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from understudy.errors import ModelError, problem
from understudy.models.cost import ImageShape, count_macs
from understudy.models.embedding import first_tensor, own_copy
from understudy.models.feature_kinds import FeatureKind, Shape, as_kind, kind_shape
from understudy.models.taps import EMBEDDING, Tap, Taps, check_taps, inner_network, tap_shapes

MODEL_PREFIX, HEADS_PREFIX = "model.", "heads."


class ExitHead(nn.Module):
    """From the features of a layer to logits_NK: a mean over positions and a linear layer.

    Args:
        shape: of the layer's output without the batch: a map (C, H, W), tokens (T, C), vector (D,).
        num_classes: K.
        channels: of a 1x1 convolution with batch norm and ReLU before the mean (of tokens and
            vectors: a linear layer after it); None: none.
    """

    def __init__(self, shape: Shape, *, num_classes: int, channels: int | None = None) -> None:
        super().__init__()
        (width,) = kind_shape(shape, "pooled")
        is_map = len(shape) == 3
        self.kind: FeatureKind = "map" if is_map and channels is not None else "pooled"
        self.hidden: nn.Module = nn.Identity()
        if channels is not None:
            mixing: nn.Conv2d | nn.Linear = nn.Linear(width, channels, bias=False)
            norm: nn.Module = nn.BatchNorm1d(channels)
            if is_map:
                mixing = nn.Conv2d(width, channels, 1, bias=False)
                norm = nn.BatchNorm2d(channels)
            nn.init.kaiming_normal_(mixing.weight, nonlinearity="relu")
            self.hidden = nn.Sequential(mixing, norm, nn.ReLU())
        self.linear = nn.Linear(channels or width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits_NK; ``features`` are of kind ``self.kind``."""
        logits_NK: Tensor = self.linear(as_kind(self.hidden(features), "pooled"))
        return logits_NK


class ExitNetwork(nn.Module):
    """A network with side heads. Called as any network it answers with the last exit's logits_NK.

    Args:
        model: a network, or a ``NormalizedModel`` around one.
        heads: by the name of the layer that each reads (``models.taps``), shallow to deep.
    """

    def __init__(self, model: nn.Module, heads: Mapping[str, ExitHead]) -> None:
        super().__init__()
        self.model = model
        self.layers = tuple(heads)
        self.heads = nn.ModuleList(heads.values())
        self.tapped = tuple(Tap(name, head.kind) for name, head in heads.items())
        self._taps = Taps(model, self.tapped)

    @property
    def num_exits(self) -> int:
        """Exits, the network's own among them."""
        return len(self.layers) + 1

    def forward(self, images_NCHW: Tensor, *, all_exits: bool = False) -> Tensor | list[Tensor]:
        """Return logits_NK of the last exit, or with ``all_exits`` a list of those of all."""
        if not all_exits:
            logits_NK: Tensor = self.model(images_NCHW)
            return logits_NK
        logits_NK, features = self._taps.run(self.model, images_NCHW)
        pairs = zip(self.heads, self.tapped, strict=True)
        return [*(head(features[tap.key]) for head, tap in pairs), logits_NK]


class SingleExit(nn.Module):
    """What one exit needs of an ``ExitNetwork``: images_NCHW to its logits_NK.

    Nothing behind the exit's layer is run.
    """

    def __init__(self, network: ExitNetwork, number: int) -> None:
        super().__init__()
        self.network, self.number = network, number

    def forward(self, images_NCHW: Tensor) -> Tensor:
        network, number = self.network, self.number
        if number == network.num_exits - 1:
            logits_NK: Tensor = network.model(images_NCHW)
        else:
            logits_NK = network.heads[number](self._features(images_NCHW))
        return logits_NK

    def _features(self, images_NCHW: Tensor) -> Tensor:
        """Run the network until its layer has answered."""
        tap = self.network.tapped[self.number]
        layer = inner_network(self.network.model).get_submodule(tap.name)

        def stop(module: nn.Module, inputs: Any, output: Any) -> None:
            features = first_tensor(output)
            if features is not None:
                raise _ReachedError(features)

        handle = layer.register_forward_hook(stop)
        try:
            self.network.model(images_NCHW)
        except _ReachedError as reached:
            return as_kind(own_copy(reached.features), tap.kind)
        finally:
            handle.remove()
        raise ModelError(
            problem(
                f"'{tap.name}' gave nothing in this forward pass",
                expected="a module that is called and returns a floating-point tensor",
                mend="Put the exit at another layer.",
            )
        )


class _ReachedError(Exception):
    """The layer of an exit has answered: the rest of the network need not run."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def check_exits(
    model: nn.Module, image_shape: ImageShape, layers: Sequence[str], *, where: str
) -> list[str]:
    """Return what is wrong with the layers of side heads.

    Args:
        model: a network, or a ``NormalizedModel`` around one; as it was afterwards.
        image_shape: (C, H, W).
        layers: names of ``models.taps``, in any order.
        where: what the user has to change, at the start of every problem.
    """
    problems = []
    for name in sorted({name for name in layers if layers.count(name) > 1}):
        given = f"{where}: '{name}' is named twice"
        problems.append(problem(given, expected="each layer once", mend="Drop one."))
    if EMBEDDING in layers:
        problems.append(
            problem(
                f"{where}: '{EMBEDDING}' is what the last exit reads",
                expected="a layer before it",
                mend="Drop it.",
            )
        )
    inside = [name for name in dict.fromkeys(layers) if name != EMBEDDING]
    return problems + check_taps(model, image_shape, inside, where=where)


def add_exits(
    model: nn.Module,
    image_shape: ImageShape,
    layers: Sequence[str],
    *,
    num_classes: int,
    channels: int | None = None,
) -> ExitNetwork:
    """Return the model with a side head at each layer, initialised from torch's seed.

    Args:
        model: a network, or a ``NormalizedModel`` around one; it is not copied.
        image_shape: (C, H, W).
        layers: names of ``models.taps`` in any order; exits are numbered from shallow to deep.
        num_classes: K.
        channels: see ``ExitHead``.

    Raises:
        ModelError: a layer cannot have a head.
    """
    problems = check_exits(model, image_shape, layers, where="exits")
    if problems:
        raise ModelError(*problems)
    shapes = tap_shapes(model, image_shape)
    heads = {
        name: ExitHead(shapes[name], num_classes=num_classes, channels=channels) for name in layers
    }
    unsorted = ExitNetwork(model, heads)
    depths = [
        count_macs(SingleExit(unsorted, number), image_shape) - head_macs
        for number, head_macs in enumerate(_head_macs(unsorted, shapes))
    ]
    order = sorted(range(len(layers)), key=depths.__getitem__)
    return ExitNetwork(model, {layers[number]: heads[layers[number]] for number in order})


def exit_macs(network: ExitNetwork, image_shape: ImageShape) -> tuple[int, ...]:
    """Return the multiply-accumulates spent on a picture that leaves at each exit.

    On the way the heads of the exits before were asked too.
    """
    heads = _head_macs(network, tap_shapes(network.model, image_shape))
    return tuple(
        count_macs(SingleExit(network, number), image_shape) + sum(heads[:number])
        for number in range(network.num_exits)
    )


def _head_macs(network: ExitNetwork, shapes: Mapping[str, Shape]) -> list[int]:
    found = []
    for tap, head in zip(network.tapped, network.heads, strict=True):
        shape = kind_shape(shapes[tap.name], tap.kind)
        found.append(count_macs(head, shape))  # type: ignore[arg-type]
    return found


def split_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of an ``ExitNetwork``'s model and those of its heads.

    Weights of any other network are returned as they are, with none of heads.
    """
    if not all(name.startswith((MODEL_PREFIX, HEADS_PREFIX)) for name in weights):
        return dict(weights), {}
    parts = []
    for prefix in (MODEL_PREFIX, HEADS_PREFIX):
        named = {name: value for name, value in weights.items() if name.startswith(prefix)}
        parts.append({name.removeprefix(prefix): value for name, value in named.items()})
    return parts[0], parts[1]
