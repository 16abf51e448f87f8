"""The one evaluator: teacher, student, control and the exported file all go through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from understudy.errors import DataError, ModelError, problem
from understudy.evaluate.calibration import (
    NUM_BINS,
    CalibrationBin,
    brier_score,
    calibration_bins,
    expected_calibration_error,
    negative_log_likelihood,
)
from understudy.progress import Progress, silent

if TYPE_CHECKING:
    from understudy.data.sources import ImageSource


@dataclass(frozen=True)
class Metrics:
    """What one model does on one split.

    Attributes:
        accuracy: share of samples whose largest logit is the label's (the first, on a tie).
        per_class_accuracy: K values, None for a class without a sample in the split.
        nll: mean negative log-likelihood of the label, in nats.
        brier: multi-class Brier score, in [0, 2].
        ece: expected calibration error over ``calibration_bins``, in [0, 1].
        confusion: K rows (true class) of K counts (predicted class).
        agreement_with_teacher: share of samples with the teacher's predicted class, or None.
        calibration_bins: equally wide bins of confidence.
        num_samples: size of the split.
    """

    accuracy: float
    per_class_accuracy: tuple[float | None, ...]
    nll: float
    brier: float
    ece: float
    confusion: tuple[tuple[int, ...], ...]
    agreement_with_teacher: float | None
    calibration_bins: tuple[CalibrationBin, ...]
    num_samples: int

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as plain lists, dicts and numbers."""
        return {
            **asdict(self),
            "per_class_accuracy": list(self.per_class_accuracy),
            "confusion": [list(row) for row in self.confusion],
            "calibration_bins": [asdict(one) for one in self.calibration_bins],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the metrics that ``to_json`` wrote."""
        return cls(
            **{
                **values,
                "per_class_accuracy": tuple(values["per_class_accuracy"]),
                "confusion": tuple(tuple(row) for row in values["confusion"]),
                "calibration_bins": tuple(CalibrationBin(**v) for v in values["calibration_bins"]),
            }
        )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode and give every module its own mode back afterwards.

    ``model.train()`` afterwards would wake modules that their owner keeps frozen in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def predict_logits(
    model: nn.Module | Callable[[Tensor], Tensor],
    source: ImageSource,
    indices: Tensor,
    *,
    batch_size: int = 500,
    device: torch.device | str | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Return float32 logits [n, K] on the CPU for the untouched images at ``indices``, in order.

    Args:
        model: takes uint8 images NCHW and returns logits in the data's class order, such as a
            ``NormalizedModel`` or a black-box teacher. A module is run in evaluation mode and left
            in the mode it came in.
        device: where to run; a module is moved there. By default where its parameters are.
        progress: told the number of images done.

    Raises:
        DataError: ``indices`` is empty.
    """
    num_samples = len(indices)
    if num_samples == 0:
        raise DataError(
            problem(
                "there are no samples to evaluate",
                expected="a split with at least one sample",
                mend="Raise data.validation_fraction or data.test_fraction.",
            )
        )
    run_device = torch.device("cpu") if device is None else torch.device(device)
    mode: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(model, nn.Module):
        mode = eval_mode(model)
        if device is None:
            run_device = next((p.device for p in model.parameters()), run_device)
        else:
            model.to(run_device)
    logits: list[Tensor] = []
    num_done = 0
    with mode, torch.inference_mode():
        for images_NCHW in source.iter_images(torch.split(indices, batch_size)):
            logits.append(model(images_NCHW.to(run_device)).float().cpu())
            num_done += len(images_NCHW)
            progress(num_done, num_samples)
    # A copy outside inference mode: the result may be used where gradients flow.
    return torch.cat(logits).clone()


def evaluate_logits(
    logits_NK: Tensor,
    labels_N: Tensor,
    *,
    class_names: Sequence[str],
    teacher_logits_NK: Tensor | None = None,
    num_bins: int = NUM_BINS,
) -> Metrics:
    """Return the metrics of logits against int64 labels; sums are taken in float64.

    Raises:
        DataError: shapes or labels do not fit each other or the class names.
        ModelError: logits are not all finite.
    """
    _check_fit(logits_NK, labels_N, class_names=class_names, teacher_logits_NK=teacher_logits_NK)
    num_samples, num_classes = logits_NK.shape
    labels_N = labels_N.long()
    log_probabilities_NK = logits_NK.double().log_softmax(dim=1)
    probabilities_NK = log_probabilities_NK.exp()
    # From the logits themselves: two near logits can round to equal probabilities.
    predicted_N = logits_NK.argmax(dim=1)
    confusion = torch.bincount(labels_N * num_classes + predicted_N, minlength=num_classes**2)
    confusion_KK = confusion.reshape(num_classes, num_classes)
    class_counts = confusion_KK.sum(dim=1).tolist()
    class_correct = confusion_KK.diagonal().tolist()
    agreement = None
    if teacher_logits_NK is not None:
        agreement = (teacher_logits_NK.argmax(dim=1) == predicted_N).double().mean().item()
    bins = calibration_bins(probabilities_NK, labels_N, num_bins=num_bins)
    return Metrics(
        accuracy=sum(class_correct) / num_samples,
        per_class_accuracy=tuple(
            correct / count if count else None
            for correct, count in zip(class_correct, class_counts, strict=True)
        ),
        nll=negative_log_likelihood(log_probabilities_NK, labels_N),
        brier=brier_score(probabilities_NK, labels_N),
        ece=expected_calibration_error(bins),
        confusion=tuple(tuple(row) for row in confusion_KK.tolist()),
        agreement_with_teacher=agreement,
        calibration_bins=bins,
        num_samples=num_samples,
    )


def _check_fit(
    logits_NK: Tensor,
    labels_N: Tensor,
    *,
    class_names: Sequence[str],
    teacher_logits_NK: Tensor | None,
) -> None:
    """Raise with everything that is wrong: shapes and labels first, then non-finite values."""
    num_classes = len(class_names)
    expected_shape = (len(labels_N), num_classes)
    named = {"model": logits_NK}
    if teacher_logits_NK is not None:
        named["teacher"] = teacher_logits_NK
    problems = [
        problem(
            f"the {owner}'s logits have shape {tuple(logits.shape)}",
            expected=f"{expected_shape}: {len(labels_N)} labels, {num_classes} class names",
            mend="Give logits, labels and class names of the same split and classes.",
        )
        for owner, logits in named.items()
        if tuple(logits.shape) != expected_shape
    ]
    if len(labels_N) == 0:
        problems.append(
            problem(
                "the split is empty",
                expected="at least one sample",
                mend="Raise data.validation_fraction or data.test_fraction.",
            )
        )
    elif not 0 <= int(labels_N.min()) <= int(labels_N.max()) < num_classes:
        problems.append(
            problem(
                f"labels run from {int(labels_N.min())} to {int(labels_N.max())}",
                expected=f"0 to {num_classes - 1}",
                mend="Check the label column and the class names.",
            )
        )
    if problems:
        raise DataError(*problems)
    for owner, logits in named.items():
        bad_N = ~torch.isfinite(logits).all(dim=1)
        if bad_N.any():
            problems.append(
                problem(
                    f"the {owner}'s logits are NaN or infinite for {int(bad_N.sum())} of "
                    f"{len(bad_N)} samples, first at position {int(bad_N.nonzero()[0])}",
                    expected="finite numbers",
                    mend="Check its weights for NaN and that its input normalisation has no zero "
                    "standard deviation; train it again with a lower learning rate.",
                )
            )
    if problems:
        raise ModelError(*problems)
