"""Proof that the files of any target compute what the trained model computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from understudy.errors import InputError, ParityError, problem
from understudy.export.parity import (
    DEFAULT_TOLERANCE,
    check_file_logits,
    check_images,
    compare_logits,
    file_logits,
    model_logits,
    not_running,
)
from understudy.export.target import (
    Artifact,
    Precision,
    find_target,
    open_artifact,
    run_artifact,
)

DEFAULT_MIN_AGREEMENT = 0.95


@dataclass(frozen=True)
class ArtifactParity:
    """The trained model in PyTorch (float32, CPU) against its files in the target's runtime.

    Attributes:
        max_abs_difference: largest |difference| of any logit of any image.
        mean_abs_difference: mean |difference|.
        top1_agreement: share of images with the same predicted class.
        num_images: images compared.
        tolerance: the largest difference that float32 files may have, in logits; see ``Parity``.
        min_agreement: the least top-1 agreement that int8 files may have.
        passed: float32: the differences are at most the tolerance. int8: the agreement is at least
            ``min_agreement``; the differences are those of quantisation, and only told.
        batch_max_abs_difference: largest |difference| between images run one at a time and the
            same images in a batch; 0 by construction for files that take one image at a time.
    """

    target: str
    precision: Precision
    max_abs_difference: float
    mean_abs_difference: float
    top1_agreement: float
    num_images: int
    tolerance: float
    min_agreement: float
    passed: bool
    batch_max_abs_difference: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as a plain dict."""
        return asdict(self)


def check_artifact_parity(
    model: nn.Module,
    artifact: Artifact,
    images_NCHW: Tensor,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    min_agreement: float = DEFAULT_MIN_AGREEMENT,
    num_threads: int = 1,
) -> ArtifactParity:
    """Compare ``model`` with the files that a target made of it, on real images.

    The model is given the uint8 images as in training, the files float32 pixels in [0, 1].

    Args:
        images_NCHW: uint8 test images, at least one; see ``check_parity``.
        tolerance: for float32, relative to the largest |logit| (at least 1) of the model.
        min_agreement: for int8, in [0, 1].

    Raises:
        ParityError: the files do not run on these images or return non-finite or misshapen logits.
            For what is beyond the limits see ``require_artifact_parity``.
        ModelError: the model itself returns non-finite logits.
        InputError: the images are not uint8 NCHW, the runtime cannot load the files, or nothing
            here runs them.
        MissingExtraError: the target's runtime is not installed.
    """
    check_images(images_NCHW)
    if not find_target(artifact.target).RUNS_HERE:
        raise InputError(
            problem(
                f"parity was asked for of {artifact.folder}, files of {artifact.target}",
                expected="files that a runtime in this process runs",
                mend=" ".join(artifact.notes) or "Check them where they run.",
            )
        )
    model_NK = model_logits(model, images_NCHW)
    running = open_artifact(artifact, num_threads=num_threads)
    try:
        file_NK, single_NK = file_logits(lambda some: run_artifact(running, some), images_NCHW)
    # Every runtime has exceptions of its own, most without a base of theirs.
    except Exception as error:
        raise not_running(artifact.path, images_NCHW, error) from error
    return parity_of_logits(
        artifact, model_NK, file_NK, single_NK, tolerance=tolerance, min_agreement=min_agreement
    )


def parity_of_logits(
    artifact: Artifact,
    model_NK: Tensor,
    file_NK: Tensor,
    single_NK: Tensor,
    *,
    tolerance: float,
    min_agreement: float,
) -> ArtifactParity:
    """Compare logits that are there already; ``single_NK`` are of the first images alone.

    Raises:
        ParityError: non-finite or misshapen logits.
    """
    check_file_logits(artifact.path, file_NK, single_NK, expected_shape=model_NK.shape)
    parity = compare_logits(model_NK, file_NK, single_NK, tolerance=tolerance)
    agrees = parity.top1_agreement >= min_agreement
    return ArtifactParity(
        target=artifact.target,
        precision=artifact.precision,
        max_abs_difference=parity.max_abs_difference,
        mean_abs_difference=parity.mean_abs_difference,
        top1_agreement=parity.top1_agreement,
        num_images=parity.num_images,
        tolerance=parity.tolerance,
        min_agreement=min_agreement,
        passed=parity.passed if artifact.precision == "float32" else agrees,
        batch_max_abs_difference=parity.batch_max_abs_difference,
    )


def require_artifact_parity(parity: ArtifactParity, artifact: Artifact) -> None:
    """Raise ParityError where parity failed, saying by how much."""
    if parity.passed:
        return
    limit = f"a difference of at most {parity.tolerance:.3g}"
    if parity.precision == "int8":
        limit = f"a top-1 agreement of at least {parity.min_agreement:.2%}"
    raise ParityError(
        problem(
            f"{artifact.path} ({parity.target}, {parity.precision}) differs from the trained model "
            f"by up to {parity.max_abs_difference:.3g} (and by "
            f"{parity.batch_max_abs_difference:.3g} between batch 1 and a batch) on "
            f"{parity.num_images} images, top-1 agreement {parity.top1_agreement:.2%}",
            expected=limit,
            mend="Export the model again; if this stays, `find_divergence` names the first layer "
            "that differs"
            + (", and keeping that layer in float32 helps." if parity.precision == "int8" else "."),
        )
    )
