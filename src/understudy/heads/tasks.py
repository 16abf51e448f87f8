"""Heads for further tasks on a trained network, which itself stays as it is.

A ``Trunk`` is a trained network up to its embedding, what its last linear classifier reads. Its
own classifier is one head on it (``OwnHead``); a ``TaskHead`` is trained on embeddings that were
computed once, which take the place of pictures in the training loop.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data.batches import epoch_order
from understudy.data.images import DataFacts, InMemoryImages
from understudy.errors import DataError, ModelError, problem
from understudy.models.build import NormalizedModel
from understudy.models.embedding import ClassifierCall, classifier_hook, classifying, may_classify
from understudy.models.taps import EMBEDDING, Tap, Taps, inner_network

# In place of a class number.
UNLABELLED, UNSEEN = -1, -2
MIN_SAMPLES_PER_CLASS = 2

EMBEDDING_TAP = Tap(EMBEDDING, "pooled")
# Largest difference between the network's logits and its classifier on its embedding, relative to
# the largest logit: sums in another order.
OWN_TOLERANCE = 1e-4
# Deviations below this share of the largest are rounding.
NO_DEVIATION = 1e-6

Task = str | int | bool | None


# What the tasks are


@dataclass(frozen=True, eq=False)
class TaskLabels:
    """The labels of one task for all N samples.

    Attributes:
        class_names: those that occur in the training split, sorted.
        labels_N: int64; ``UNLABELLED`` where the column has no value, ``UNSEEN`` where its value
            does not occur in the training split.
    """

    class_names: tuple[str, ...]
    labels_N: Tensor


def task_labels(values: Sequence[Task], train_indices_N: Tensor, *, where: str) -> TaskLabels:
    """Return labels made of a column's values, whole numbers in their order, text in its own.

    Args:
        values: one for each sample; None where a sample has no label for this task.
        train_indices_N: the training split, whose values are the classes.
        where: what the user has to change, at the start of every problem.

    Raises:
        DataError: values of another type, fewer than two classes, or so many that the column names
            samples rather than classes.
    """
    kinds = {type(value) for value in values if value is not None}
    if kinds - {str, int, bool} or len(kinds) > 1:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(
            problem(
                f"{where} holds values of type {found}",
                expected="either text or whole numbers, null where a sample has no label",
                mend="Name another column, or convert this one.",
            )
        )
    given = [values[index] for index in train_indices_N.tolist()]
    seen = sorted({value for value in given if value is not None})
    num_labelled = sum(value is not None for value in given)
    if len(seen) < 2 or num_labelled < MIN_SAMPLES_PER_CLASS * len(seen):
        raise DataError(
            problem(
                f"{where} names {len(seen)} classes for {num_labelled} training samples",
                expected=f"at least 2 classes, and on average {MIN_SAMPLES_PER_CLASS} or more "
                "samples of each",
                mend="Name a column that says what is in the picture.",
            )
        )
    numbers: dict[Task, int] = {value: number for number, value in enumerate(seen)}
    labels = [UNLABELLED if v is None else numbers.get(v, UNSEEN) for v in values]
    return TaskLabels(tuple(str(value) for value in seen), torch.tensor(labels))


# Networks


class Trunk(nn.Module):
    """A trained network up to its embedding; a frozen copy, always in evaluation mode.

    Input: images_NCHW as the model takes them. Output: embedding_ND, float32 at least, averaged
    over positions where the classifier is a 1x1 convolution.

    Args:
        model: a network, or a ``NormalizedModel`` around one.
        image_shape: (C, H, W).

    Attributes:
        width: D.

    Raises:
        ModelError: no linear classifier gives the logits, or the model is a black box.
    """

    def __init__(self, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._taps = Taps(self.model, [EMBEDDING_TAP])
        # The first pass shows which layer is the classifier.
        self.width: int = self(trial_images(image_shape)).shape[1]
        super().train(False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return embedding_ND."""
        return self._taps.run(self.model, images_NCHW)[1][EMBEDDING_TAP.key]

    def train(self, mode: bool = True) -> Trunk:
        """Do nothing: batch statistics of a frozen network must not move."""
        return self

    def identity(self) -> str:
        """Return the SHA-256 (hex) of all weights and of the preprocessing."""
        digest = hashlib.sha256()
        tensors = itertools.chain(self.model.named_parameters(), self.model.named_buffers())
        for name, tensor in tensors:
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class OwnHead(nn.Module):
    """The classifier that a network was trained with, as a head on its embedding.

    Input: embedding_ND. Output: logits_NK as the whole model gives them.

    Args:
        trunk: of the network.
        image_shape: (C, H, W).

    Raises:
        ModelError: the network does more with its classifier's output than ordering its classes.
    """

    order: Tensor | None

    def __init__(self, trunk: Trunk, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        model, images_NCHW = trunk.model, trial_images(image_shape)
        layer, logits_NK = _classifier(model, images_NCHW)
        self.layer = copy.deepcopy(layer)
        order = model.output_order if isinstance(model, NormalizedModel) else None
        self.register_buffer("order", order)
        with torch.no_grad():
            difference = (self(trunk(images_NCHW)) - logits_NK).abs().max().item()
        if not difference <= OWN_TOLERANCE * max(1.0, logits_NK.abs().max().item()):
            raise ModelError(
                problem(
                    f"the classifier on the embedding differs from the whole network by up to "
                    f"{difference:.2g}",
                    expected="logits that are the classifier's output",
                    mend="Use a network that ends in a linear layer, or a 1x1 convolution and a "
                    "mean over positions.",
                )
            )

    def forward(self, embedding_ND: Tensor) -> Tensor:
        """Return logits_NK."""
        is_convolution = isinstance(self.layer, nn.Conv2d)
        given = embedding_ND[:, :, None, None] if is_convolution else embedding_ND
        logits_NK: Tensor = self.layer(given).flatten(1)
        return logits_NK if self.order is None else logits_NK[:, self.order]


class TaskHead(nn.Module):
    """Standardises an embedding by the training split's statistics, then an MLP.

    Input: embedding_ND. Output: logits_NK.

    Args:
        num_features: D.
        num_classes: K.
        hidden: widths of the hidden layers, with ReLU after each; none gives a linear head.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, num_features: int, num_classes: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(num_features))
        self.register_buffer("shift", torch.zeros(num_features))
        widths = [num_features, *hidden, num_classes]
        layers: list[nn.Module] = []
        for num_inputs, num_outputs in itertools.pairwise(widths):
            layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def standardize(self, embeddings_MD: Tensor) -> None:
        """Take mean and deviation of these embeddings; one that never varies counts for nothing."""
        mean_D, deviation_D = embeddings_MD.double().mean(0), embeddings_MD.double().std(0)
        varies_D = deviation_D > NO_DEVIATION * deviation_D.max()
        scale_D = torch.where(varies_D, 1 / deviation_D, 0.0)
        self.scale.copy_(scale_D)
        self.shift.copy_(-mean_D * scale_D)

    def forward(self, embedding_ND: Tensor) -> Tensor:
        """Return logits_NK."""
        logits_NK: Tensor = self.layers(torch.addcmul(self.shift, embedding_ND, self.scale))
        return logits_NK


def trial_images(image_shape: tuple[int, int, int]) -> Tensor:
    """Return two pictures of noise in [0, 1], always the same."""
    return torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))


def _classifier(model: nn.Module, images_NCHW: Tensor) -> tuple[nn.Module, Tensor]:
    """Return the layer that gives the network's logits, and the whole model's logits_NK."""
    network, calls, outputs = inner_network(model), list[ClassifierCall](), list[Tensor]()

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in filter(may_classify, network.modules()):
            handle = module.register_forward_hook(classifier_hook(calls), with_kwargs=True)
            hooks.callback(handle.remove)
        hooks.callback(network.register_forward_hook(keep).remove)
        logits_NK = model(images_NCHW)
    call = classifying(calls, outputs[-1])
    assert call is not None, "a trunk has a classifier"
    return call.module, logits_NK


# Embeddings in the place of pictures


@torch.inference_mode()
def embed(trunk: nn.Module, image_batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield float32 embedding_ND of each batch of uint8 images_NCHW, on the CPU."""
    for images_NCHW in image_batches:
        yield trunk(images_NCHW).float().cpu()


def embedding_source(
    embeddings_MD: Tensor, labels_M: Tensor, class_names: Sequence[str]
) -> InMemoryImages:
    """Return a source for the training loop whose "pictures" are float32 embeddings [M, D]."""
    num_rows, width = embeddings_MD.shape
    rows = tuple(map(str, range(num_rows)))
    shape = (width, 1, 1)
    facts = DataFacts(shape, tuple(class_names), labels_M, rows, ("train",) * num_rows, "")
    return InMemoryImages(facts, embeddings_MD)


class ViewOrder:
    """Shows the rows of view ``e mod num_views`` in epoch ``e``, in an order of that epoch's own.

    A ``SampleOrder`` for rows that hold one view of the training split after the other.

    Args:
        num_views: V.
        num_rows: of each view.
    """

    watches_losses = False

    def __init__(self, num_views: int, num_rows: int) -> None:
        self.rows_VN = torch.arange(num_views * num_rows).view(num_views, num_rows)

    def order(self, *, seed: int, epoch: int) -> Tensor:
        """Return the row numbers of the epoch."""
        return epoch_order(self.rows_VN[epoch % len(self.rows_VN)], seed=seed, epoch=epoch)

    def observe(self, indices_N: Tensor, losses_N: Tensor) -> None:
        """Nothing is remembered."""

    def end_epoch(self, *, epoch: int) -> None:
        """Nothing is remembered."""
