"""What a teacher says of a whole class on average, as a table and as a loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.errors import ModelError, problem
from understudy.losses.shapes import check_labels, float32_pair


def class_prior(
    student_logits_NK: Tensor, teacher_prior_KK: Tensor, labels_N: Tensor, *, temperature: float
) -> Tensor:
    """Divergence from the teacher's mean soft distribution of the label's class to the student's.

    ``T^2 * mean_n KL(prior[label_n] || softmax(s_n / T))``. The prior says which classes the
    teacher finds alike on average, without its noise on a single image: a label smoothing that
    knows the classes (as in Zhang et al. 2021, "Delving deep into label smoothing", whose averages
    are the student's own).

    Args:
        student_logits_NK: [N, K], any floating type; computed in float32.
        teacher_prior_KK: [K, K], row c a distribution, as ``class_prior_table`` makes it with the
            same temperature; zeros are allowed; no gradient flows into it.
        labels_N: [N], int64.
        temperature: T > 0.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if the shapes do not fit.
    """
    num_classes = student_logits_NK.shape[-1]
    if student_logits_NK.ndim != 2 or teacher_prior_KK.shape != (num_classes, num_classes):
        raise ModelError(
            problem(
                f"student logits of shape {tuple(student_logits_NK.shape)} and a teacher prior of "
                f"shape {tuple(teacher_prior_KK.shape)}",
                expected="[N, num_classes] and [num_classes, num_classes]",
                mend="Make the prior with class_prior_table from a teacher of the same classes.",
            )
        )
    check_labels(student_logits_NK, labels_N)
    with float32_pair(student_logits_NK, teacher_prior_KK) as (student_NK, prior_KK):
        log_student_NK = F.log_softmax(student_NK / temperature, dim=1)
        # log_target=False: 0 log 0 counts as 0.
        divergence = F.kl_div(log_student_NK, prior_KK[labels_N], reduction="batchmean")
        return divergence * temperature**2


def class_prior_table(
    teacher_logits_NK: Tensor, labels_N: Tensor, *, num_classes: int, temperature: float
) -> Tensor:
    """Mean over each class's images of the teacher's softened distribution, for ``class_prior``.

    A class without images gets the uniform distribution: nothing is known of it, and nothing but
    spread is taught where it turns up after all.

    Args:
        teacher_logits_NK: [N, K], of the training images.
        labels_N: [N], int64, their classes.
        num_classes: K.
        temperature: T > 0, that of ``class_prior``.

    Returns:
        prior_KK: [K, K], float32 (float64 of float64 logits), rows sum to 1.

    Raises:
        ModelError: if the shapes do not fit.
    """
    if teacher_logits_NK.ndim != 2 or teacher_logits_NK.shape[1] != num_classes:
        raise ModelError(
            problem(
                f"teacher logits of shape {tuple(teacher_logits_NK.shape)} for {num_classes} "
                f"classes",
                expected=f"[N, {num_classes}]",
                mend="Use the outputs of a teacher of these classes.",
            )
        )
    check_labels(teacher_logits_NK, labels_N)
    dtype = torch.promote_types(teacher_logits_NK.dtype, torch.float32)
    # Sums of many float32 numbers would lose digits; the table is small.
    sums_KK = teacher_logits_NK.new_zeros((num_classes, num_classes), dtype=torch.float64)
    with torch.no_grad(), torch.autocast(teacher_logits_NK.device.type, enabled=False):
        # In pieces: the float64 copy of all outputs may be larger than the memory.
        for start in range(0, len(labels_N), 65_536):
            rows = slice(start, start + 65_536)
            p_nK = F.softmax(teacher_logits_NK[rows].double() / temperature, dim=1)
            sums_KK.index_add_(0, labels_N[rows], p_nK)
        counts_K1 = torch.bincount(labels_N, minlength=num_classes)[:, None]
        prior_KK = torch.where(counts_K1 > 0, sums_KK / counts_K1.clamp_min(1), 1 / num_classes)
        return prior_KK.to(dtype)
