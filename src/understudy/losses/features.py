"""Losses between feature maps or embeddings: pure functions, float32 inside.

One layer is a tensor on each side; several are lists of equal length, summed over the layers. Maps
are [N, C, H, W], tokens [N, T, C], vectors [N, D]. Resolutions and, where a loss says so, widths
must agree: adapters and poolings come before the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.errors import ModelError, problem
from understudy.losses.shapes import check_same_batch, check_same_shape, float32_pair, unit_rows

Layers = Tensor | Sequence[Tensor]

# Chen et al. 2021, the authors' code; the whole map comes first, with weight 1.
REVIEW_LEVELS = (4, 2, 1)
_ADAPTER = "Put an adapter behind the student's that gives it the teacher's width."
_POOL = "Pool the larger one to the smaller one's height and width first."


def pair_layers(student: Layers, teacher: Layers) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of layers to compare.

    Raises:
        ModelError: if one side is a tensor and the other a list, if the lists' lengths differ, or
            if they are empty.
    """
    students, teachers = _layer_list(student), _layer_list(teacher)
    mixed = isinstance(student, Tensor) != isinstance(teacher, Tensor)
    if mixed or not students or len(students) != len(teachers):
        raise ModelError(
            problem(
                f"student layers: {_count(student)}, teacher layers: {_count(teacher)}",
                expected="a tensor each, or lists of equal length",
                mend="Give each layer of the student its layer of the teacher.",
            )
        )
    return list(zip(students, teachers, strict=True))


def check_same_positions(student: Tensor, teacher: Tensor, *, what: str) -> None:
    """Raise ModelError, naming both shapes, unless batch and positions agree.

    Positions are the H and W of maps [N, C, H, W] and the T of tokens [N, T, C]; the channels may
    differ. ``what`` both are, in the plural.
    """
    check_same_batch(student, teacher, what=what)
    if student.ndim != teacher.ndim or _positions(student) != _positions(teacher):
        raise ModelError(
            problem(
                f"student {what} of shape {tuple(student.shape)} and teacher {what} of shape "
                f"{tuple(teacher.shape)}",
                expected="equal positions, [N, C, H, W] of the same H and W",
                mend=_POOL,
            )
        )


def hint(student: Layers, teacher: Layers) -> Tensor:
    """Mean squared error between the layers.

    ``mean((s - t)^2)`` over every entry. Romero et al. 2015 ("FitNets"), eq. 3, has half the
    squared norm of the difference; the mean, of which later work reports its weights, does not
    grow with the layer. Their regressor is the adapter in front.

    Args:
        student: [N, C, H, W], [N, T, C] or [N, D], or a list of such.
        teacher: the same shape; no gradient flows into it.

    Returns:
        Scalar, float32, at least 0; 0 exactly where the layers are equal.

    Raises:
        ModelError: if shapes, or the numbers of layers, differ.
    """
    losses = []
    for student_map, teacher_map in pair_layers(student, teacher):
        check_same_shape(student_map, teacher_map, what="layers")
        with float32_pair(student_map, teacher_map) as (s, t):
            losses.append(F.mse_loss(s, t))
    return torch.stack(losses).sum()


def nst(student: Layers, teacher: Layers) -> Tensor:
    """Neuron selectivity transfer: channels of both sides as samples of one distribution.

    With every channel of a picture flattened over its P positions and divided by its norm, s_i and
    t_j, the squared maximum mean discrepancy is
    ``mean_ii'(k(t_i, t_i')) + mean_jj'(k(s_j, s_j')) - 2 mean_ij(k(t_i, s_j))`` with the kernel
    ``k(x, y) = (x . y)^2``: Huang and Wang 2017, section 4, polynomial kernel with d = 2 and c = 0
    as in their experiments. Mean over the batch. A dead channel, all zero, has kernel 0 with all.

    With this kernel the discrepancy equals the squared Frobenius distance between the two P x P
    matrices ``mean_i s_i s_i^T`` and ``mean_j t_j t_j^T`` (the paper's Gram matrices); whichever of
    the two forms takes fewer multiplications is computed.

    Args:
        student: [N, C, H, W] or [N, T, C], or a list of such.
        teacher: the same batch and positions, any number of channels; no gradient flows into it.

    Returns:
        Scalar, float32; at least 0, and 0 between equal distributions, up to rounding. It does not
        change when a channel of either side is scaled, nor with the order of the channels.

    Raises:
        ModelError: if batch, positions or the numbers of layers differ.
    """
    losses = []
    for student_map, teacher_map in pair_layers(student, teacher):
        check_same_positions(student_map, teacher_map, what="feature maps")
        _check_ndim(student_map, teacher_map, allowed=(3, 4), expected="[N, C, H, W] or [N, T, C]")
        with float32_pair(student_map, teacher_map) as (s, t):
            losses.append(_squared_discrepancy(_unit_channels(s), _unit_channels(t)))
    return torch.stack(losses).sum()


def review(student: Layers, teacher: Layers) -> Tensor:
    """Hierarchical context loss of knowledge review, between maps that are fused already.

    ``sum_l w_l mean((pool_l(s) - pool_l(t))^2) / sum_l w_l`` where level 0 is the map itself with
    weight 1 and the next are its adaptive average pools to 4 x 4, 2 x 2 and 1 x 1 with weights 1/2,
    1/4, 1/8; a level that is not smaller than the map is left out and the next takes its weight.
    Chen et al. 2021 ("Distilling Knowledge via Knowledge Review"), section 3.4 (which gives no
    equation); levels and weights as in the authors' code.

    Args:
        student: [N, C, H, W], or a list of such: what the fusion of the student's layers gives.
        teacher: the same shapes; no gradient flows into it.

    Returns:
        Scalar, float32, at least 0; 0 exactly where the maps are equal.

    Raises:
        ModelError: if shapes, or the numbers of layers, differ, or one is no map.
    """
    losses = []
    for student_map, teacher_map in pair_layers(student, teacher):
        check_same_shape(student_map, teacher_map, what="feature maps")
        _check_ndim(student_map, teacher_map, allowed=(4,), expected="[N, C, H, W]")
        with float32_pair(student_map, teacher_map) as (s, t):
            # Pooling is linear, so the difference is pooled once instead of both sides.
            difference_NCHW = s - t
            loss, weight, total = difference_NCHW.square().mean(), 1.0, 1.0
            for level in REVIEW_LEVELS:
                if level < min(difference_NCHW.shape[2:]):
                    weight /= 2
                    total += weight
                    pooled = F.adaptive_avg_pool2d(difference_NCHW, level)
                    loss = loss + weight * pooled.square().mean()
            losses.append(loss / total)
    return torch.stack(losses).sum()


def vid_variance(num_channels: int, *, initial: float = 5.0, eps: float = 1e-5) -> nn.Parameter:
    """Return the raw variances of ``vid``, a parameter [C] to train with the student.

    Args:
        num_channels: the teacher's.
        initial: variance to begin with; 5.0 as in the supplement of Ahn et al. 2019.
        eps: as given to ``vid``.

    Raises:
        ModelError: unless initial > eps.
    """
    if initial <= eps:
        raise ModelError(
            problem(
                f"an initial variance of {initial}",
                expected=f"more than eps = {eps}",
                mend="Choose a larger initial variance.",
            )
        )
    # The inverse of softplus, without the overflow of exp(x) - 1 at large x.
    above = initial - eps
    return nn.Parameter(torch.full((num_channels,), above + math.log(-math.expm1(-above))))


def vid(
    student_mean: Layers, teacher: Layers, raw_variance_C: Layers, *, eps: float = 1e-5
) -> Tensor:
    """Variational information distillation: negative log likelihood of the teacher's layer.

    ``mean(log(v_c) / 2 + (t - m)^2 / (2 v_c))`` over every entry, with the variance of channel c
    ``v_c = softplus(a_c) + eps``: Ahn et al. 2019, eq. 5 for maps and eq. 6 for vectors, without
    their constant ``log(2 pi) / 2`` and as a mean where they have a sum, like the code that the
    authors pass on. A channel that the student cannot predict gets a large variance and so a small
    weight. Their eps is 1e-5.

    Args:
        student_mean: [N, C, H, W], [N, T, C] or [N, C]: what the regressor behind the student's
            layer gives; or a list of such.
        teacher: the same shape; no gradient flows into it.
        raw_variance_C: [C], the trained a_c (``vid_variance``), or a list, one for each layer.
        eps: keeps the variance from zero.

    Returns:
        Scalar, float32; negative where the prediction is good and the variance below 1. Its
        minimum over v_c is at the mean squared error of channel c.

    Raises:
        ModelError: if shapes, or the numbers of layers, differ.
    """
    pairs = pair_layers(student_mean, teacher)
    variances = [raw for _, raw in pair_layers(student_mean, raw_variance_C)]
    losses = []
    for (mean_map, teacher_map), raw_C in zip(pairs, variances, strict=True):
        check_same_shape(mean_map, teacher_map, what="layers", mend=_ADAPTER)
        _check_ndim(mean_map, teacher_map, allowed=(2, 3, 4), expected="[N, C, H, W] or [N, C]")
        channel_dim = 1 if mean_map.ndim == 4 else mean_map.ndim - 1
        if tuple(raw_C.shape) != (mean_map.shape[channel_dim],):
            raise ModelError(
                problem(
                    f"variances of shape {tuple(raw_C.shape)} for layers of shape "
                    f"{tuple(mean_map.shape)}",
                    expected=f"shape ({mean_map.shape[channel_dim]},), one for each channel",
                    mend="Make them with vid_variance(num_channels).",
                )
            )
        with float32_pair(mean_map, teacher_map) as (mean, t):
            variance_C = F.softplus(raw_C.to(mean.dtype)) + eps
            variance = variance_C[:, None, None] if mean.ndim == 4 else variance_C
            losses.append(((t - mean).square() / variance + variance.log()).mean() / 2)
    return torch.stack(losses).sum()


def embedding_alignment(
    student: Layers, teacher: Layers, *, cosine_weight: float = 1.0, mse_weight: float = 1.0
) -> Tensor:
    """Direction and length of the student's embeddings toward the teacher's.

    ``cosine_weight * mean_n (1 - cos(s_n, t_n)) + mse_weight * mean_nd ((s_nd - t_nd)^2)``. The
    squared error is that of the raw embeddings: of normalised ones it would be the cosine term
    again, times 2 / D. So the first term aligns directions whatever the scale, and the second adds
    the length. A cosine term between hidden states is in Sanh et al. 2019 ("DistilBERT", section
    2), the squared error between embeddings in Jiao et al. 2020 ("TinyBERT", eq. 9); their sum with
    equal weights is ours.

    Args:
        student: [N, D], after the adapter where the widths differ; or a list of such.
        teacher: the same shape; no gradient flows into it.
        cosine_weight: of the first term.
        mse_weight: of the second.

    Returns:
        Scalar, float32, at least 0; 0 where the embeddings are equal, up to rounding. An embedding
        of zeros has no direction: its cosine counts as 0, without gradient.

    Raises:
        ModelError: if shapes, or the numbers of layers, differ: unequal widths need an adapter.
    """
    losses = []
    for student_ND, teacher_ND in pair_layers(student, teacher):
        check_same_shape(
            student_ND,
            teacher_ND,
            what="embeddings",
            expected="equal shapes [N, D]",
            mend=_ADAPTER,
        )
        _check_ndim(student_ND, teacher_ND, allowed=(2,), expected="[N, D]")
        with float32_pair(student_ND, teacher_ND) as (s, t):
            cosine_N = (unit_rows(s) * unit_rows(t)).sum(dim=1)
            losses.append(cosine_weight * (1 - cosine_N).mean() + mse_weight * F.mse_loss(s, t))
    return torch.stack(losses).sum()


def _squared_discrepancy(student_NCP: Tensor, teacher_NDP: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between rows, kernel (x . y)^2, mean over the batch."""
    num_student, num_positions = student_NCP.shape[1:]
    num_teacher = teacher_NDP.shape[1]
    over_positions = num_positions * (num_student + num_teacher)
    over_channels = num_student**2 + num_teacher**2 + num_student * num_teacher
    if over_positions <= over_channels:
        student_NPP = student_NCP.mT @ student_NCP / num_student
        teacher_NPP = teacher_NDP.mT @ teacher_NDP / num_teacher
        return (student_NPP - teacher_NPP).square().sum(dim=(1, 2)).mean()
    own = (student_NCP @ student_NCP.mT).square().mean()
    teachers = (teacher_NDP @ teacher_NDP.mT).square().mean()
    return own + teachers - 2 * (student_NCP @ teacher_NDP.mT).square().mean()


def _unit_channels(features: Tensor) -> Tensor:
    """Return [N, C, P]: every channel over its positions, divided by its norm."""
    channels_NCP = features.flatten(2) if features.ndim == 4 else features.mT
    return unit_rows(channels_NCP.flatten(0, 1)).view(channels_NCP.shape)


def _positions(features: Tensor) -> tuple[int, ...]:
    return tuple(features.shape[2:] if features.ndim == 4 else features.shape[1:-1])


def _check_ndim(student: Tensor, teacher: Tensor, *, allowed: Sequence[int], expected: str) -> None:
    if student.ndim not in allowed:
        raise ModelError(
            problem(
                f"a student layer of shape {tuple(student.shape)} and a teacher layer of shape "
                f"{tuple(teacher.shape)}",
                expected=expected,
                mend="Choose a layer of this kind, or another loss.",
            )
        )


def _layer_list(layers: Layers) -> list[Tensor]:
    return [layers] if isinstance(layers, Tensor) else list(layers)


def _count(layers: Layers) -> str:
    return "a tensor" if isinstance(layers, Tensor) else f"a list of {len(layers)}"
