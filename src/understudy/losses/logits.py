"""Losses between student and teacher logits: pure functions, batch first, float32 inside."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.errors import ModelError, problem
from understudy.losses.shapes import check_labels, check_same_shape, float32_pair, unit_rows


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
    _check_logits(student_logits_NK, teacher_logits_NK)
    with float32_pair(student_logits_NK, teacher_logits_NK) as (student_NK, teacher_NK):
        log_student_NK = F.log_softmax(student_NK / temperature, dim=1)
        log_teacher_NK = F.log_softmax(teacher_NK / temperature, dim=1)
        return _mean_divergence(log_student_NK, log_teacher_NK) * temperature**2


def dkd(
    student_logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    labels_N: Tensor,
    *,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al. 2022, equation 7).

    ``T^2 * mean_n [target_weight * KL(b_t || b_s) + nontarget_weight * KL(q_t || q_s)]`` with, of
    the softened distribution ``p``, ``b = (p[label], 1 - p[label])`` (target class or not) and
    ``q = p / (1 - p[label])`` over the K - 1 other classes. Plain ``kl`` is the case where the
    second term is weighted by the teacher's own ``1 - p[label]`` (their equation 5), which silences
    it wherever the teacher is sure; here its weight is free.

    Args:
        student_logits_NK: [N, K], K at least 2, any floating type; computed in float32.
        teacher_logits_NK: [N, K]; no gradient flows into it.
        labels_N: [N], int64: the target classes.
        target_weight: the paper's alpha; 1 throughout the paper.
        nontarget_weight: the paper's beta; 8 its usual choice on CIFAR-100.
        temperature: T > 0; 4 is the paper's on CIFAR-100.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if the shapes do not fit, or there is one class only.
    """
    _check_logits(student_logits_NK, teacher_logits_NK, min_classes=2)
    check_labels(student_logits_NK, labels_N)
    with float32_pair(student_logits_NK, teacher_logits_NK) as (student_NK, teacher_NK):
        is_other_NK = torch.ones_like(student_NK, dtype=torch.bool)
        is_other_NK.scatter_(1, labels_N[:, None], False)

        def parts(logits_NK: Tensor) -> tuple[Tensor, Tensor]:
            log_p_NK = F.log_softmax(logits_NK / temperature, dim=1)
            log_others_NR = log_p_NK[is_other_NK].view(len(log_p_NK), -1)
            log_other_N1 = log_others_NR.logsumexp(dim=1, keepdim=True)
            log_binary_N2 = torch.cat([log_p_NK.gather(1, labels_N[:, None]), log_other_N1], dim=1)
            return log_binary_N2, log_others_NR - log_other_N1

        log_student_N2, log_student_NR = parts(student_NK)
        log_teacher_N2, log_teacher_NR = parts(teacher_NK)
        target = _mean_divergence(log_student_N2, log_teacher_N2)
        nontarget = _mean_divergence(log_student_NR, log_teacher_NR)
        return (target_weight * target + nontarget_weight * nontarget) * temperature**2


def dist(
    student_logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST: predictions that correlate with the teacher's (Huang et al. 2022, equations 8 to 10).

    ``T^2 * (inter_weight * mean_n d(s[n], t[n]) + intra_weight * mean_k d(s[:, k], t[:, k]))`` with
    the softened probabilities ``s`` and ``t`` and Pearson's distance ``d = 1 - correlation``: among
    the classes of one image, and among the images of the batch for one class. A positive scale and
    a shift of the probabilities cost nothing, so that a small student need not copy a strong
    teacher's exact confidence. The factor T squared is that of the authors' code.

    Where the teacher's vector is constant (a batch of one image, for instance, has nothing to
    compare within a class) the correlation is undefined and the distance counts as 0; where only
    the student's is constant, as 1, without gradient.

    Args:
        student_logits_NK: [N, K], any floating type; computed in float32.
        teacher_logits_NK: [N, K]; no gradient flows into it.
        inter_weight: the paper's beta, for the classes of an image; 1 in the authors' code.
        intra_weight: the paper's gamma, for the images of a class; 1 in the authors' code.
        temperature: T > 0; 1 for the paper's ImageNet models (4, with weights of 2, on CIFAR-100).

    Returns:
        Scalar, float32, at least 0 up to rounding.

    Raises:
        ModelError: if the shapes differ.
    """
    _check_logits(student_logits_NK, teacher_logits_NK)
    with float32_pair(student_logits_NK, teacher_logits_NK) as (student_NK, teacher_NK):
        p_student_NK = F.softmax(student_NK / temperature, dim=1)
        p_teacher_NK = F.softmax(teacher_NK / temperature, dim=1)
        inter = _pearson_distance(p_student_NK, p_teacher_NK)
        intra = _pearson_distance(p_student_NK.T, p_teacher_NK.T)
        return (inter_weight * inter + intra_weight * intra) * temperature**2


def standardized_kl(
    student_logits_NK: Tensor, teacher_logits_NK: Tensor, *, temperature: float = 2.0
) -> Tensor:
    """``kl`` of standardised logits (Sun et al. 2024, algorithms 1 and 2).

    ``T^2 * mean_n KL(softmax(z_t / T) || softmax(z_s / T))`` with each row's logits standardised,
    ``z = (logits - mean) / deviation``, so that a shift or a positive scale of either side's
    logits changes nothing. The deviation is the population's (divided by K), as in the paper; its
    code divides by K - 1, which acts like a temperature ``sqrt(K / (K - 1))`` times as high.
    Constant logits have no direction: z is 0 there, a uniform distribution, and the student gets no
    gradient.

    Args:
        student_logits_NK: [N, K], any floating type; computed in float32.
        teacher_logits_NK: [N, K]; no gradient flows into it.
        temperature: T > 0, the paper's base temperature; 2 is its default. Because z has deviation
            1, a temperature that suits ``kl`` is too high here, and the paper gives this term
            a larger weight (9 on CIFAR-100).

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if the shapes differ.
    """
    _check_logits(student_logits_NK, teacher_logits_NK)
    with float32_pair(student_logits_NK, teacher_logits_NK) as (student_NK, teacher_NK):
        scale = math.sqrt(student_NK.shape[1])
        student_z_NK = _centred_unit_rows(student_NK) * scale
        teacher_z_NK = _centred_unit_rows(teacher_NK) * scale
        return kl(student_z_NK, teacher_z_NK, temperature=temperature)


def mse_logits(student_logits_NK: Tensor, teacher_logits_NK: Tensor) -> Tensor:
    """Mean squared error of logits (Ba and Caruana 2014, equation 1).

    ``mean_n mean_k (s - t)^2``. The paper sums over classes and halves, ``1/2 sum_k``: K / 2 times
    this value. The limit of ``kl`` for a high temperature is the same error of centred logits,
    halved (Hinton, Vinyals and Dean 2015, section 2.1); here the common shift counts too.

    Args:
        student_logits_NK: [N, K], any floating type; computed in float32.
        teacher_logits_NK: [N, K]; no gradient flows into it.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if the shapes differ.
    """
    _check_logits(student_logits_NK, teacher_logits_NK)
    with float32_pair(student_logits_NK, teacher_logits_NK) as (student_NK, teacher_NK):
        return F.mse_loss(student_NK, teacher_NK)


def top_k_kl(
    student_logits_NK: Tensor,
    teacher_values_Nk: Tensor,
    teacher_indices_Nk: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """``kl`` from stored top-k outputs: the teacher's k largest logits and their classes.

    ``T^2 * mean_n sum_{j<k} p_t log(p_t / p_s)`` with ``p = softmax(k logits / T)`` of the same k
    classes on both sides: the distributions *given that the class is among the k* (``kl`` of
    Hinton, Vinyals and Dean 2015 where k = K). Nothing is assumed of the other classes, so the
    term is exact at every temperature, while the rest's mass at temperature T is not known from
    its mass at 1. How much the student gives to the other classes is left to its other losses
    (cross-entropy, usually); to teach an evenly spread rest, use ``kl`` with the store's dense
    form.

    Args:
        student_logits_NK: [N, K], any floating type; computed in float32.
        teacher_values_Nk: [N, k], logits; no gradient flows into them.
        teacher_indices_Nk: [N, k], integers, the classes of the values, different within a row.
        temperature: T > 0.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if the shapes do not fit.
    """
    student, values, indices = student_logits_NK, teacher_values_Nk, teacher_indices_Nk
    same_rows = student.ndim == values.ndim == 2 and len(student) == len(values)
    if not same_rows or values.shape != indices.shape or values.shape[1] > student.shape[1]:
        raise ModelError(
            problem(
                f"student logits of shape {tuple(student.shape)}, teacher values of shape "
                f"{tuple(values.shape)} and teacher indices of shape {tuple(indices.shape)}",
                expected="[N, K], [N, k] and [N, k] with k at most K",
                mend="Take the values and their classes from the same stored rows.",
            )
        )
    return kl(student.gather(1, indices.long()), values, temperature=temperature)


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
    A picture without a label (-1), or mixed with one, does not count.

    Args:
        student_logits_NK: [N, K], any floating type; computed in float32.
        labels_N: [N], int64; -1 where there is none.
        partner_labels_N: [N], int64, or None where nothing is mixed.
        label_weight_N: [N], float32 in [0, 1], or None where nothing is mixed.
        label_smoothing: share of the target spread evenly over classes (Szegedy et al. 2016).

    Returns:
        Scalar, float32, the mean over the batch's labelled pictures; 0 where there are none.
    """
    labelled_N = labels_N >= 0
    if partner_labels_N is not None:
        labelled_N = labelled_N & (partner_labels_N >= 0)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": -1}
    with torch.autocast(student_logits_NK.device.type, enabled=False):
        logits_NK = student_logits_NK.to(
            torch.promote_types(student_logits_NK.dtype, torch.float32)
        )
        if not labelled_N.any():
            return logits_NK[:0].sum()
        if partner_labels_N is None or label_weight_N is None:
            return F.cross_entropy(logits_NK, labels_N, **options)
        own_N = F.cross_entropy(logits_NK, labels_N, reduction="none", **options)
        partner_N = F.cross_entropy(logits_NK, partner_labels_N, reduction="none", **options)
        return (label_weight_N * own_N + (1 - label_weight_N) * partner_N)[labelled_N].mean()


def _mean_divergence(log_student_NK: Tensor, log_teacher_NK: Tensor) -> Tensor:
    return F.kl_div(log_student_NK, log_teacher_NK, reduction="batchmean", log_target=True)


def _centred_unit_rows(rows_NK: Tensor) -> Tensor:
    """Rows less their mean, of norm 1; a row that is constant but for rounding becomes 0."""
    centred_NK = rows_NK - rows_NK.mean(dim=1, keepdim=True)
    rounding_N1 = 16 * torch.finfo(rows_NK.dtype).eps * rows_NK.abs().amax(dim=1, keepdim=True)
    is_constant_N1 = centred_NK.abs().amax(dim=1, keepdim=True) <= rounding_N1
    return unit_rows(centred_NK.masked_fill(is_constant_N1, 0))


def _pearson_distance(student_RC: Tensor, teacher_RC: Tensor) -> Tensor:
    """Mean over rows of 1 - correlation; 0 for a row in which the teacher is constant."""
    teacher_unit_RC = _centred_unit_rows(teacher_RC)
    correlation_R = (_centred_unit_rows(student_RC) * teacher_unit_RC).sum(dim=1)
    is_defined_R = teacher_unit_RC.any(dim=1)
    return ((1 - correlation_R) * is_defined_R).mean()


def _check_logits(student: Tensor, teacher: Tensor, *, min_classes: int = 1) -> None:
    check_same_shape(
        student,
        teacher,
        what="logits",
        expected="equal shapes [N, num_classes]",
        mend="Give both networks the same number of classes.",
    )
    if student.ndim != 2 or student.shape[1] < min_classes:
        raise ModelError(
            problem(
                f"student and teacher logits of shape {tuple(student.shape)}",
                expected=f"[N, num_classes] with at least {min_classes} classes",
                mend="Flatten other dimensions into the batch.",
            )
        )
