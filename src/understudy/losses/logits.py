"""Losses between student and teacher logits: pure functions, batch first, float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.errors import ModelError, problem


def _check_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ModelError(
            problem(
                f"student logits of shape {tuple(student.shape)} and teacher logits of shape "
                f"{tuple(teacher.shape)}",
                expected="equal shapes [N, num_classes]",
                mend="Give both networks the same number of classes.",
            )
        )


def kl(student_logits_NK: Tensor, teacher_logits_NK: Tensor, *, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's to the student's softened distribution.

    ``T^2 * mean_n sum_k p_t log(p_t / p_s)`` with ``p = softmax(logits / T)``. The factor T squared
    keeps gradients of comparable size when the temperature changes (Hinton, Vinyals and Dean 2015,
    section 2).

    Args:
        student_logits_NK: [N, K], any floating type; computed in float32.
        teacher_logits_NK: [N, K]; no gradient flows into it.
        temperature: T > 0.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if the shapes differ.
    """
    _check_same_shape(student_logits_NK, teacher_logits_NK)
    with torch.autocast(student_logits_NK.device.type, enabled=False):
        dtype = torch.promote_types(student_logits_NK.dtype, torch.float32)
        log_student_NK = F.log_softmax(student_logits_NK.to(dtype) / temperature, dim=1)
        log_teacher_NK = F.log_softmax(teacher_logits_NK.detach().to(dtype) / temperature, dim=1)
        divergence = F.kl_div(
            log_student_NK, log_teacher_NK, reduction="batchmean", log_target=True
        )
        return divergence * temperature**2


def cross_entropy(
    student_logits_NK: Tensor,
    labels_N: Tensor,
    *,
    partner_labels_N: Tensor | None = None,
    label_weight_N: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy with labels, of mixed pictures too.

    A picture mixed of two (mixup, Zhang et al. 2018; CutMix, Yun et al. 2019) has the loss
    ``w * CE(own label) + (1 - w) * CE(partner's label)``, with ``w`` the share of its own picture.

    Args:
        student_logits_NK: [N, K], any floating type; computed in float32.
        labels_N: [N], int64.
        partner_labels_N: [N], int64, or None where nothing is mixed.
        label_weight_N: [N], float32 in [0, 1], or None where nothing is mixed.
        label_smoothing: share of the target spread evenly over classes (Szegedy et al. 2016).

    Returns:
        Scalar, float32, the mean over the batch.
    """
    with torch.autocast(student_logits_NK.device.type, enabled=False):
        logits_NK = student_logits_NK.to(
            torch.promote_types(student_logits_NK.dtype, torch.float32)
        )
        if partner_labels_N is None or label_weight_N is None:
            return F.cross_entropy(logits_NK, labels_N, label_smoothing=label_smoothing)
        own_N = F.cross_entropy(
            logits_NK, labels_N, label_smoothing=label_smoothing, reduction="none"
        )
        partner_N = F.cross_entropy(
            logits_NK, partner_labels_N, label_smoothing=label_smoothing, reduction="none"
        )
        return (label_weight_N * own_N + (1 - label_weight_N) * partner_N).mean()
