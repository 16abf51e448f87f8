"""Losses between spatial attention maps: where a network looks, whatever its width.

Either side of each is a feature map [N, C, H, W] or a ready attention map [N, H, W]; one layer is a
tensor on each side, several are lists of equal length, summed over the layers. Float32 inside.

Why ``salient_attention`` is as it is. But for the share b that it spreads evenly, it is
``-log(share of the student's attention inside the salient region)`` plus the divergence between the
target q and the student's attention within the region. The first keeps the student off the
background, but leaves it free where it looks there. The second grows steeply when the student gives
up any part of the region, where a squared difference hardly changes: a student that looks at
several parts of an object keeps some when others are covered. b keeps both finite. Nearest in the
literature: attention maps and their transfer, Zagoruyko and Komodakis 2017; looking at the whole
object instead of its most telling part, Li et al. 2018 ("Tell Me Where to Look", GAIN) and Choe and
Shim 2019 (ADL), who hide that part where this loss cuts it off. Its defaults were chosen on maps of
a CIFAR-10 ResNet-56: in the last stage the peak, 4 times the mean in the median picture, is cut off
and the region has 0.4 of the positions; in the first stages it has 0.7, so a deep layer says more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.errors import ModelError, problem
from understudy.losses.features import Layers, pair_layers
from understudy.losses.shapes import check_same_batch, float32_pair, unit_rows


def attention_map(features_NCHW: Tensor, *, power: float = 2.0) -> Tensor:
    """Mean over the channels of the activations' magnitudes to a power, not normalised.

    ``mean_c |a_c|^p``: Zagoruyko and Komodakis 2017, section 3.1, F_sum^p with p = 2, of which
    they report the best results; the mean in place of their sum, as in their code, differs by a
    factor that every normalisation takes out.

    Args:
        features_NCHW: [N, C, H, W], any floating type; computed in float32.
        power: p, at least 1.

    Returns:
        [N, H, W], float32, at least 0.

    Raises:
        ModelError: if it is no map, or the power is below 1 (whose gradient is infinite at 0).
    """
    if features_NCHW.ndim != 4 or power < 1:
        raise ModelError(
            problem(
                f"features of shape {tuple(features_NCHW.shape)} and power {power}",
                expected="shape [N, C, H, W] and a power of at least 1",
                mend="Tap a layer with channels and positions.",
            )
        )
    with torch.autocast(features_NCHW.device.type, enabled=False):
        wide_NCHW = features_NCHW.to(torch.promote_types(features_NCHW.dtype, torch.float32))
        powers = wide_NCHW.square() if power == 2 else wide_NCHW.abs().pow(power)
        return powers.mean(dim=1)


def attention_transfer(student: Layers, teacher: Layers, *, power: float = 2.0) -> Tensor:
    """Mean squared difference between attention maps of unit length.

    ``mean_np (s_np / |s_n| - t_np / |t_n|)^2`` with the attention maps s and t (``attention_map``)
    flattened over their positions p. Zagoruyko and Komodakis 2017, eq. 2, whose norm of the
    difference is the mean of its squares in the authors' code; their weights (1000 and the like)
    belong to this form.

    Args:
        student: [N, C, H, W] or [N, H, W], or a list of such.
        teacher: the same batch, H and W; any number of channels; no gradient flows into it.
        power: p of the attention maps that are made here; 2 as in the paper's experiments.

    Returns:
        Scalar, float32, between 0 and 4 / (H W) for each layer; 0 exactly where the maps are equal.
        Scaling either side does not change it. A map of zeros stays zero, without gradient.

    Raises:
        ModelError: if batch, height, width or the numbers of layers differ.
    """
    losses = []
    for student_map, teacher_map in pair_layers(student, teacher):
        _check_attention(student_map, teacher_map)
        with float32_pair(student_map, teacher_map) as (s, t):
            student_NP, teacher_NP = (_attention_rows(side, power) for side in (s, t))
            losses.append(F.mse_loss(unit_rows(student_NP), unit_rows(teacher_NP)))
    return torch.stack(losses).sum()


def salient_attention(
    student: Layers,
    teacher: Layers,
    *,
    salient_share: float = 0.8,
    peak_limit: float = 3.0,
    background: float = 0.01,
) -> Tensor:
    """Pull the student's attention into all of the regions that the teacher finds salient.

    For every picture, with both attention maps (``attention_map``, p = 2) over P positions:

    1. The teacher's map is cut off at ``peak_limit`` times its mean, so that no single spot
       stands for the object.
    2. The salient region is the fewest positions, highest first, that hold ``salient_share`` of
       what is left (equal values together); the rest is set to zero and the sum to one: q.
    3. The student's map with sum one is r. A share ``background`` of both is spread evenly over
       the positions: ``q' = (1 - b) q + b / P``, and r' likewise.
    4. The loss is ``KL(q' || r') = sum_p q'_p log(q'_p / r'_p)``, mean over the batch.

    The formula and its defaults are ours; the module's text gives the reasons and the nearest
    papers.

    Args:
        student: [N, C, H, W] or [N, H, W] (values below zero count as zero), or a list of such.
        teacher: the same batch, H and W; any number of channels; no gradient flows into it.
        salient_share: of the teacher's cut-off attention, in (0, 1].
        peak_limit: in units of the teacher's mean, above 0; infinity cuts nothing.
        background: b, in (0, 1).

    Returns:
        Scalar, float32, at least 0 up to rounding, at most ``log(P / b)``; 0 where the student's
        distribution is q. Scaling either side does not change it. A student's map of zeros counts
        as evenly spread, without gradient; a picture whose teacher's map is zero adds nothing.

    Raises:
        ModelError: if batch, height, width or the numbers of layers differ, or an argument is out
            of its range.
    """
    _check_arguments(salient_share, peak_limit, background)
    losses = []
    for student_map, teacher_map in pair_layers(student, teacher):
        _check_attention(student_map, teacher_map)
        with float32_pair(student_map, teacher_map) as (s, t):
            target_NP, seen_N = _salient(_attention_rows(t, 2.0), salient_share, peak_limit)
            student_NP, _ = _shares(_attention_rows(s, 2.0))
            even = background / student_NP.shape[1]
            target_NP = (1 - background) * target_NP + even
            log_student_NP = ((1 - background) * student_NP + even).log()
            divergence_N = (target_NP * (target_NP.log() - log_student_NP)).sum(dim=1)
            losses.append((divergence_N * seen_N).mean())
    return torch.stack(losses).sum()


def _salient(
    attention_NP: Tensor, salient_share: float, peak_limit: float
) -> tuple[Tensor, Tensor]:
    """Return q, the shares of the salient region, and which rows had any attention."""
    shares_NP, seen_N = _shares(attention_NP)
    cut_NP, _ = _shares(shares_NP.clamp(max=peak_limit / shares_NP.shape[1]))
    sorted_NP = cut_NP.sort(dim=1, descending=True).values
    # A position is needed while those before it hold less than the share.
    before_NP = sorted_NP.cumsum(dim=1) - sorted_NP
    num_needed_N1 = (before_NP < salient_share).sum(dim=1, keepdim=True).clamp(min=1)
    lowest_N1 = sorted_NP.gather(1, num_needed_N1 - 1)
    region_NP, _ = _shares(cut_NP.masked_fill(cut_NP < lowest_N1, 0))
    return region_NP, seen_N


def _shares(attention_NP: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows with sum one, and which of them had any; those of zeros become even."""
    positive_NP = attention_NP.clamp(min=0)
    # Divided by the largest first, so that the sum neither overflows nor vanishes.
    largest_N1 = positive_NP.detach().amax(dim=1, keepdim=True)
    is_zero_N1 = largest_N1 == 0
    scaled_NP = (positive_NP / largest_N1.masked_fill(is_zero_N1, 1)).masked_fill(is_zero_N1, 1)
    return scaled_NP / scaled_NP.sum(dim=1, keepdim=True), ~is_zero_N1[:, 0]


def _attention_rows(side: Tensor, power: float) -> Tensor:
    """Return [N, P]: of a feature map its attention, of an attention map itself."""
    return (attention_map(side, power=power) if side.ndim == 4 else side).flatten(1)


def _check_attention(student: Tensor, teacher: Tensor) -> None:
    check_same_batch(student, teacher, what="maps")
    are_maps = {student.ndim, teacher.ndim} <= {3, 4}
    if not are_maps or student.shape[-2:] != teacher.shape[-2:]:
        raise ModelError(
            problem(
                f"student maps of shape {tuple(student.shape)} and teacher maps of shape "
                f"{tuple(teacher.shape)}",
                expected="[N, C, H, W] or [N, H, W] of the same H and W",
                mend="Pool the larger one to the smaller one's height and width first.",
            )
        )


def _check_arguments(salient_share: float, peak_limit: float, background: float) -> None:
    if not (0 < salient_share <= 1 and peak_limit > 0 and 0 < background < 1):
        raise ModelError(
            problem(
                f"salient_share {salient_share}, peak_limit {peak_limit}, background {background}",
                expected="salient_share in (0, 1], peak_limit above 0, background in (0, 1)",
                mend="Leave them out for the defaults.",
            )
        )
