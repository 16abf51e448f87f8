"""Losses on relations among the images of a batch: student and teacher widths may differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from understudy.losses.shapes import check_same_batch, float32_pair, unit_rows

# Angles (vertex, image, image) and components of differences (vertex, image, width) held at once:
# 16 MiB each in float32.
MAX_ANGLE_ELEMENTS = 2**22


def similarity_preserving(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Similarities between the images of a batch (Tung and Mori 2019, equation 4).

    ``1/N^2 * || G_t - G_s ||_F^2`` with ``G = A A^T`` of the flattened activations ``A`` [N, D],
    each row of G divided by its Euclidean norm. A positive scale of either side changes nothing.
    The paper takes the last convolution's maps and the weight 3000. Batch of one: 0.

    Args:
        student_embedding: [N, ...], embeddings or maps, any floating type; computed in float32.
        teacher_embedding: [N, ...], of any width; no gradient flows into it.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if the batch sizes differ.
    """
    check_same_batch(student_embedding, teacher_embedding, what="embeddings")
    with float32_pair(student_embedding, teacher_embedding) as (student, teacher):

        def similarities(rows_ND: Tensor) -> Tensor:
            # The scale has no influence and is taken out, lest the products overflow or vanish.
            largest = rows_ND.detach().abs().amax()
            rows_ND = rows_ND / largest.masked_fill(largest == 0, 1)
            return unit_rows(rows_ND @ rows_ND.T)

        return F.mse_loss(similarities(student.flatten(1)), similarities(teacher.flatten(1)))


def rkd(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    """Relational knowledge distillation (Park et al. 2019, section 3.2).

    ``distance_weight * mean_{i != j} huber(d_s(i, j) / mean d_s, d_t(i, j) / mean d_t)
    + angle_weight * mean_{i, j, k different} huber(cos_s(i, j, k), cos_t(i, j, k))`` with the
    Euclidean distance ``d``, its mean over the pairs of different images, ``cos`` of the angle at
    image j between i and k, and ``huber(x, y) = (x - y)^2 / 2`` up to 1, ``|x - y| - 1/2`` beyond.
    Shift, rotation and positive scale of either side change nothing. The paper sums over the
    tuples; like its authors' code this takes the mean, here over tuples of different images only
    (the code's mean counts the tuples that repeat one, all 0 too).

    Images at the same place have no direction: their angles count as cosine 0, without gradient.
    Fewer than two images have no distance, fewer than three no angle: those terms are 0.

    Memory: a dozen blocks of N^2 max(N, D) numbers (N = 128: 8 MiB each) up to
    ``MAX_ANGLE_ELEMENTS``. Beyond, the angles are done in groups of vertices of that size, computed
    again for the gradient, so that memory stays flat. Time grows with N^3 D.

    Args:
        student_embedding: [N, ...], any floating type; computed in float32.
        teacher_embedding: [N, ...], of any width; no gradient flows into it.
        distance_weight: 25, the paper's for image classification.
        angle_weight: 50, likewise; 0 leaves the cubic part out.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if the batch sizes differ.
    """
    check_same_batch(student_embedding, teacher_embedding, what="embeddings")
    with float32_pair(student_embedding, teacher_embedding) as (student, teacher):
        student_ND, teacher_ND = student.flatten(1), teacher.flatten(1)
        loss = distance_weight * _distance_difference(student_ND, teacher_ND)
        if angle_weight:
            loss = loss + angle_weight * _angle_difference(student_ND, teacher_ND)
        return loss


def pkt(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Probabilistic knowledge transfer (Passalis and Tefas 2018, section 3).

    ``mean_i sum_{j != i} p_t(j | i) log(p_t(j | i) / p_s(j | i))`` with ``p(j | i)`` the kernel
    ``(cos(x_i, x_j) + 1) / 2`` divided by its sum over all ``j != i``. The scale of any embedding
    changes nothing. The paper sums over i. Its authors' code takes the mean over the N x N table
    with ``j = i`` included, which is about 1/N of this value: weights published for it (30000) are
    to be divided by the batch size.

    A kernel below 1e-7 (opposite directions) counts as 1e-7. Fewer than three images have no
    choice of neighbour: 0.

    Args:
        student_embedding: [N, ...], any floating type; computed in float32.
        teacher_embedding: [N, ...], of any width; no gradient flows into it.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if the batch sizes differ.
    """
    check_same_batch(student_embedding, teacher_embedding, what="embeddings")
    with float32_pair(student_embedding, teacher_embedding) as (student, teacher):
        num_images = len(student)
        is_other_NN = ~torch.eye(num_images, dtype=torch.bool, device=student.device)

        def log_neighbours(rows_ND: Tensor) -> Tensor:
            units_ND = unit_rows(rows_ND)
            kernel_NN = ((units_ND @ units_ND.T + 1) / 2).clamp_min(1e-7)
            kernel_NR = kernel_NN[is_other_NN].view(num_images, num_images - 1)
            return (kernel_NR / kernel_NR.sum(dim=1, keepdim=True)).log()

        return F.kl_div(
            log_neighbours(student.flatten(1)),
            log_neighbours(teacher.flatten(1)),
            reduction="batchmean",
            log_target=True,
        )


def correlation_congruence(
    student_embedding: Tensor, teacher_embedding: Tensor, *, gamma: float = 0.4, order: int = 2
) -> Tensor:
    """Correlation congruence (Peng et al. 2019, section 3).

    ``1/N^2 * || C_t - C_s ||_F^2`` with the correlation matrix ``C[i, j] = k(x_i, x_j)`` of the
    embeddings divided by their norms, and ``k`` the Gaussian kernel ``exp(-gamma ||x - y||^2)`` in
    its Taylor expansion around 0,
    ``k(x, y) = exp(-2 gamma) * sum_{p <= order} (2 gamma)^p / p! * (x . y)^p``. The scale of any
    embedding changes nothing. Batch of one: 0.

    Args:
        student_embedding: [N, ...], any floating type; computed in float32.
        teacher_embedding: [N, ...], of any width; no gradient flows into it.
        gamma: the kernel's width; 0.4, the paper's choice.
        order: the last term of the expansion; 2, the paper's choice.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if the batch sizes differ.
    """
    check_same_batch(student_embedding, teacher_embedding, what="embeddings")
    with float32_pair(student_embedding, teacher_embedding) as (student, teacher):

        def correlations(rows_ND: Tensor) -> Tensor:
            units_ND = unit_rows(rows_ND)
            cosines_NN = units_ND @ units_ND.T
            kernel_NN = torch.ones_like(cosines_NN)
            for power in range(1, order + 1):
                factor = (2 * gamma) ** power / math.factorial(power)
                kernel_NN = kernel_NN + factor * cosines_NN**power
            return math.exp(-2 * gamma) * kernel_NN

        return F.mse_loss(correlations(student.flatten(1)), correlations(teacher.flatten(1)))


def _distance_difference(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    def distances(rows_ND: Tensor) -> Tensor:
        # Each pair once. Its gradient is 0 where the distance is.
        distance_P = F.pdist(rows_ND)
        mean = distance_P.sum() / max(1, len(distance_P))
        return distance_P / torch.where(mean > 0, mean, 1)

    student_P, teacher_P = distances(student_ND), distances(teacher_ND)
    return F.smooth_l1_loss(student_P, teacher_P, reduction="sum") / max(1, len(student_P))


def _angle_difference(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    num_images = len(student_ND)
    width = max(num_images, student_ND.shape[1], teacher_ND.shape[1])
    group_size = max(1, MAX_ANGLE_ELEMENTS // (num_images * width))
    total = student_ND.new_zeros(())
    for start in range(0, num_images, group_size):
        group = slice(start, start + group_size)
        if group_size >= num_images:
            total = total + _angle_sum(student_ND, teacher_ND, group)
        else:
            part = checkpoint(
                _angle_sum,
                student_ND,
                teacher_ND,
                group,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            total = total + part
    num_angles = num_images * (num_images - 1) * (num_images - 2)
    return total / max(1, num_angles)


def _angle_sum(student_ND: Tensor, teacher_ND: Tensor, group: slice) -> Tensor:
    """Sum of the differences of all angles at the vertices of the group."""

    def cosines(rows_ND: Tensor) -> Tensor:
        difference_VND = rows_ND - rows_ND[group, None]
        direction_VND = unit_rows(difference_VND.flatten(0, 1)).view_as(difference_VND)
        return direction_VND @ direction_VND.mT

    huber_VNN = F.smooth_l1_loss(cosines(student_ND), cosines(teacher_ND), reduction="none")
    # An image with itself makes no angle. With the vertex itself the cosines are 0 on both sides.
    is_same_NN = torch.eye(len(student_ND), dtype=torch.bool, device=student_ND.device)
    return huber_VNN.masked_fill(is_same_NN, 0).sum()
