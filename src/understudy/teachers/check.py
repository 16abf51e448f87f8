"""Is the teacher any good here, and if it is near chance: which conversion was forgotten?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from understudy.data.images import ImageSource
from understudy.errors import ModelError, problem
from understudy.models.build import NormalizedModel
from understudy.runtime import derive_seed

# Enough to tell a mended teacher from chance, few enough to try a dozen conversions.
NUM_IMAGES = 256
BATCH_SIZE = 64

# name -> mean and standard deviation per RGB channel, for pixels in [0, 1]
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none (pixels in 0..1)": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "none (pixels in 0..255)": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "-1..1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class Cause:
    """A change of the teacher's conversion and the accuracy it gives on the images tried."""

    accuracy: float
    text: str


def chance_limit(num_classes: int) -> float:
    """Return the accuracy up to which a teacher counts as near chance.

    Chance plus a tenth of the way to perfection, but at most three times chance, so that a weak
    teacher of a thousand classes is not refused.
    """
    chance = 1 / num_classes
    return chance + min(0.1 * (1 - chance), 2 * chance)


def check_teacher(
    model: nn.Module, source: ImageSource, indices_N: Tensor, *, accuracy: float
) -> None:
    """Do nothing if the teacher is better than chance on the validation split, else say why not.

    Args:
        model: uint8 images NCHW to logits_NK; the conversions of a ``NormalizedModel`` are tried.
        source: the pictures.
        indices_N: the validation samples.
        accuracy: the teacher's on them, in [0, 1].

    Raises:
        ModelError: near chance, or no better than always answering the commonest class; the text
            names the conversion that mends it, if there is one.
    """
    labels_N = source.labels_N[indices_N]
    num_classes = len(source.class_names)
    commonest = torch.bincount(labels_N, minlength=num_classes).max().item() / len(labels_N)
    # Only then is there something to compute.
    if accuracy > max(chance_limit(num_classes), commonest + 0.02):
        return
    chosen_N = _spread(indices_N)
    labels_N = source.labels_N[chosen_N]
    images_NCHW = source.images(chosen_N)
    logits_NK = _logits(model, images_NCHW)
    # A constant answer is right in one of the classes that occur.
    limit = chance_limit(len(torch.unique(labels_N)))
    if _balanced_accuracy(logits_NK, labels_N) > limit:
        return
    order_K = getattr(model, "output_order", None)
    outputs_K = torch.arange(num_classes) if order_K is None else order_K.cpu()
    causes = [_permutation(logits_NK, labels_N, outputs_K, source.class_names)]
    found = min(0.9, 2 * limit)
    # An order that fits says that the pictures go in as they should.
    conversions = [] if causes[0].accuracy > found else _conversions(model, source.image_shape[0])
    for changed, text in conversions:
        changed_logits_NK = _logits(changed, images_NCHW)
        causes.append(Cause(_balanced_accuracy(changed_logits_NK, labels_N), text))
        best_order = _permutation(changed_logits_NK, labels_N, outputs_K, source.class_names)
        causes.append(Cause(best_order.accuracy, f"{text}; also {best_order.text}"))
    # Of equals the first: one change explains more than two.
    best = max(causes, key=lambda cause: round(cause.accuracy, 1))
    if best.accuracy > found:
        mend = (
            f"Likely cause: {best.text}. It is then right on {100 * best.accuracy:.0f} % of "
            f"{len(chosen_N)} images."
        )
    else:
        mend = (
            "Neither another normalisation, colour order nor class order helps: check that the "
            "weights are trained, were loaded completely and are for these classes."
        )
    raise ModelError(
        problem(
            f"the teacher is right on {100 * accuracy:.2f} % of {len(indices_N)} validation images,"
            f" near chance ({100 / num_classes:.3g} % for {num_classes} classes)",
            expected=f"more than {100 * limit:.3g} %, every class counting alike",
            mend=mend,
        )
    )


def _spread(indices_N: Tensor) -> Tensor:
    """Return at most NUM_IMAGES indices at random: the split may be sorted by class, or cycle."""
    generator = torch.Generator().manual_seed(derive_seed(0, "check teacher"))
    return indices_N[torch.randperm(len(indices_N), generator=generator)[:NUM_IMAGES]]


def _logits(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [model(batch) for batch in torch.split(images_NCHW, BATCH_SIZE)]
    return torch.cat(parts).float().cpu()


def _balanced_accuracy(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Return the mean over the classes present: a constant answer then is at chance."""
    right_N = (logits_NK.argmax(1) == labels_N).float()
    per_class = [right_N[labels_N == label].mean().item() for label in torch.unique(labels_N)]
    return float(np.mean(per_class))


def _permutation(
    logits_NK: Tensor, labels_N: Tensor, outputs_K: Tensor, class_names: Sequence[str]
) -> Cause:
    """Return the best class order; found on one half of the images, its accuracy on the other.

    With few images a class some order always fits them; the other half tells fit from truth.
    ``outputs_K[c]`` is the network's output that column c of the logits shows now.
    """
    num_classes = len(class_names)
    confusion_KK = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion_KK, (labels_N[::2].numpy(), logits_NK[::2].argmax(1).numpy()), 1)
    # columns_K[k]: the column that answers for the data's class k
    columns_K = torch.from_numpy(linear_sum_assignment(confusion_KK, maximize=True)[1])
    reordered_NK = logits_NK[1::2][:, columns_K]
    names = [class_names[label] for label in outputs_K[columns_K].argsort().tolist()]
    return Cause(
        _balanced_accuracy(reordered_NK, labels_N[1::2]) if len(reordered_NK) else 0.0,
        f"the class order; set teacher.class_names to {names}",
    )


def _conversions(model: nn.Module, num_channels: int) -> Iterator[tuple[nn.Module, str]]:
    """Yield the teacher with one or two of its conversions changed, and how to write that."""
    if not isinstance(model, NormalizedModel):
        return
    order = None if model.output_order is None else model.output_order.tolist()
    std = (1 / model.scale.flatten()).tolist()
    mean = (-model.shift.flatten() / model.scale.flatten()).tolist()
    other_color: Literal["rgb", "bgr"] = "rgb" if model.color_order == "bgr" else "bgr"
    has_colors = num_channels == 3 and model.color_order != "gray"
    if has_colors:
        changed = NormalizedModel(
            model.network, mean=mean, std=std, color_order=other_color, output_order=order
        )
        yield (
            changed.to(model.scale.device),
            f"the colour order; set teacher.color_order to {other_color}",
        )
    for name, (known_mean, known_std) in NORMALIZATIONS.items():
        new_mean, new_std = known_mean[: len(mean)], known_std[: len(std)]
        text = (
            f"the input normalisation; set teacher.model.normalization to that of {name} (mean "
            f"{[round(m, 4) for m in new_mean]}, std {[round(s, 5) for s in new_std]})"
        )
        for color in (model.color_order, other_color) if has_colors else (model.color_order,):
            changed = NormalizedModel(
                model.network, mean=new_mean, std=new_std, color_order=color, output_order=order
            )
            also = "" if color == model.color_order else f", and teacher.color_order to {color}"
            yield changed.to(model.scale.device), text + also
