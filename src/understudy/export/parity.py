"""Proof that an exported file computes what the trained model computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import InputError, ModelError, ParityError, problem
from understudy.export.onnx_file import portable_copy
from understudy.export.onnx_run import open_session, run_images

DEFAULT_TOLERANCE = 1e-4
BATCH_SIZE = 100
NUM_SINGLE_IMAGES = 8


@dataclass(frozen=True)
class Parity:
    """The trained model in PyTorch (float32, CPU) against its file in ONNX Runtime.

    Attributes:
        max_abs_difference: largest |difference| of any logit of any image.
        mean_abs_difference: mean |difference|.
        top1_agreement: share of images with the same predicted class. Within the tolerance it can
            be below 1 only where two logits are nearer to each other than twice the tolerance.
        num_images: images compared.
        tolerance: the largest difference allowed, in logits: the relative tolerance asked for
            times the largest |logit| of the trained model, or times 1 where that is smaller.
        passed: both differences are at most the tolerance.
        batch_max_abs_difference: largest |difference| between images run through the file one at a
            time and the same images in a batch.
    """

    max_abs_difference: float
    mean_abs_difference: float
    top1_agreement: float
    num_images: int
    tolerance: float
    passed: bool
    batch_max_abs_difference: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as a plain dict."""
        return asdict(self)


def check_parity(
    model: nn.Module,
    path: Path,
    images_NCHW: Tensor,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
) -> Parity:
    """Compare ``model`` with its exported file on real images.

    The model is given the uint8 images as in training and evaluation, the file what its users
    give it: float32 pixels in [0, 1]. So a normalisation that is missing from the file, or in it
    twice, shows.

    Args:
        images_NCHW: uint8, at least one; test images rather than noise, because a network's
            outputs on noise can agree where those on pictures do not.
        tolerance: relative to the largest |logit| (at least 1) of the model on these images.

    Raises:
        ParityError: the file does not run on these images or returns non-finite or misshapen
            logits. A difference above the tolerance is not raised: see ``require_parity``.
        ModelError: the model itself returns non-finite logits.
        InputError: there are no images, or they are not uint8 NCHW.
    """
    check_images(images_NCHW)
    model_NK = model_logits(model, images_NCHW)
    session = open_session(path)
    try:
        file_NK, single_NK = file_logits(lambda some: run_images(session, some), images_NCHW)
    # ONNX Runtime's exceptions have no common base but Exception.
    except Exception as error:
        raise not_running(path, images_NCHW, error) from error
    check_file_logits(path, file_NK, single_NK, expected_shape=model_NK.shape)
    return compare_logits(model_NK, file_NK, single_NK, tolerance=tolerance)


def compare_logits(
    model_NK: Tensor, file_NK: Tensor, single_NK: Tensor, *, tolerance: float
) -> Parity:
    """Compare the logits of a model, of its file in batches, and of its file one image at a time.

    Args:
        single_NK: of the first images.
        tolerance: relative, as for ``check_parity``.
    """
    difference_NK = (file_NK.double() - model_NK.double()).abs()
    max_difference = difference_NK.max().item()
    batch_difference_NK = (single_NK.double() - file_NK[: len(single_NK)].double()).abs()
    max_batch_difference = batch_difference_NK.max().item()
    allowed = tolerance * max(1.0, model_NK.abs().max().item())
    return Parity(
        max_abs_difference=max_difference,
        mean_abs_difference=difference_NK.mean().item(),
        top1_agreement=(file_NK.argmax(1) == model_NK.argmax(1)).double().mean().item(),
        num_images=len(model_NK),
        tolerance=allowed,
        passed=max_difference <= allowed and max_batch_difference <= allowed,
        batch_max_abs_difference=max_batch_difference,
    )


def require_parity(parity: Parity, path: Path) -> None:
    """Raise ParityError where parity failed, saying by how much."""
    if parity.passed:
        return
    raise ParityError(
        problem(
            f"{path} differs from the trained model by up to {parity.max_abs_difference:.3g} "
            f"(and by {parity.batch_max_abs_difference:.3g} between batch 1 and a batch) on "
            f"{parity.num_images} images, top-1 agreement {parity.top1_agreement:.2%}",
            expected=f"at most {parity.tolerance:.3g}",
            mend="Export the model again; if this stays, one of its layers is translated wrongly.",
        )
    )


def check_images(images_NCHW: Tensor) -> None:
    """Raise InputError unless these are uint8 images NCHW, at least one."""
    if images_NCHW.ndim != 4 or len(images_NCHW) == 0 or images_NCHW.dtype != torch.uint8:
        raise InputError(
            problem(
                f"parity was asked for on {images_NCHW.dtype} of {tuple(images_NCHW.shape)}",
                expected="uint8 images [n, C, H, W], n at least 1",
                mend="Give images of the test split.",
            )
        )


def check_file_logits(
    path: Path, file_NK: Tensor, single_NK: Tensor, *, expected_shape: torch.Size
) -> None:
    """Raise ParityError unless the file's logits are finite and of this shape."""
    num_bad = _num_bad(torch.cat([file_NK, single_NK]))
    if file_NK.shape != expected_shape or num_bad:
        what = f"logits of shape {tuple(file_NK.shape)}"
        if file_NK.shape == expected_shape:
            what = f"NaN or infinity for {num_bad} of {len(file_NK) + len(single_NK)} images"
        raise ParityError(
            problem(
                f"{path} returns {what}",
                expected=f"finite logits of shape {tuple(expected_shape)}, as the trained model",
                mend="Export the model again; if this stays, one of its layers is translated "
                "wrongly.",
            )
        )


def model_logits(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    """Return the logits [n, K] of a trained model for uint8 images, in float32 on the CPU.

    Raises:
        ModelError: they are not finite.
    """
    portable = portable_copy(model)
    with torch.inference_mode():
        logits = [portable(images).float() for images in torch.split(images_NCHW.cpu(), BATCH_SIZE)]
    logits_NK = torch.cat(logits)
    if not torch.isfinite(logits_NK).all():
        raise ModelError(
            problem(
                f"the model returns NaN or infinity for {_num_bad(logits_NK)} of "
                f"{len(logits_NK)} images",
                expected="finite logits",
                mend="Check its weights for NaN; train it again with a lower learning rate.",
            )
        )
    return logits_NK


def file_logits(run: Callable[[Tensor], Tensor], images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of all images in batches, and of the first few one at a time."""
    batched = [run(some) for some in torch.split(images_NCHW, BATCH_SIZE)]
    single = [run(one) for one in torch.split(images_NCHW[:NUM_SINGLE_IMAGES], 1)]
    return torch.cat(batched), torch.cat(single)


def not_running(path: Path, images_NCHW: Tensor, error: Exception) -> ParityError:
    """Return the error for a file that its runtime loads but does not run."""
    return ParityError(
        problem(
            f"{path} does not run on images of shape {tuple(images_NCHW.shape[1:])} ({error})",
            expected="the images and any batch size that the trained model takes",
            mend="Export the model again with the data's image shape.",
        )
    )


def _num_bad(logits_NK: Tensor) -> int:
    return int((~torch.isfinite(logits_NK)).any(dim=1).sum())
