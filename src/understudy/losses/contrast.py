"""Contrastive representation distillation, with the bank of past embeddings it draws from.

It follows the equations of Tian et al. 2020 and, where they leave something open, the authors' code
(the constant Z, both directions, momentum), with two differences from that code. The positive is
the current pair, as the equations have it, not the other side's older embedding of the same image,
which is random in the first epoch. And the whole batch shares one draw of N negatives, which costs
N x D instead of batch x N x D numbers (16384 negatives of width 128: 8 MiB a side); those of the
anchor's own image (or own class, where the memory has labels) are left out and the sum scaled back
to N.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.errors import ModelError, problem
from understudy.losses.shapes import check_same_shape, unit_rows


class ContrastMemory(nn.Module):
    """The latest embedding of every training image on both sides, for the negatives of ``crd``.

    Rows are unit vectors: random at first (from torch's global generator), and moved toward an
    image's new embedding each time it is seen. Everything is in buffers, so that the memory is
    saved and restored with the rest of a checkpoint: 8 bytes x num_samples x dim.

    In a run of several processes each has its own memory and fills the rows of the images it sees.

    Attributes:
        student_bank_MD, teacher_bank_MD: [M, D], float32.
        log_mean_student, log_mean_teacher: log of the mean of ``exp(score / temperature)`` against
            the bank of that side, from the first batch; NaN before.
        labels_M: [M], or None.
    """

    student_bank_MD: Tensor
    teacher_bank_MD: Tensor
    log_mean_student: Tensor
    log_mean_teacher: Tensor
    labels_M: Tensor | None

    def __init__(
        self,
        num_samples: int,
        dim: int,
        *,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        labels_M: Tensor | None = None,
    ) -> None:
        """Fill both banks with random directions.

        Args:
            num_samples: M, the number of training images; positions are 0..M-1.
            dim: D, the width of both embeddings; the paper's is 128.
            num_negatives: N, negatives drawn a batch; 16384, the paper's for CIFAR-100.
            temperature: 0.07, that of the authors' code.
            momentum: share of the old row kept at an update; 0.5, that of the authors' code.
            labels_M: [M], int64: negatives are then taken from other classes only (the paper's
                choice where labels are known); None: any other image.

        Raises:
            ModelError: a size is below 1, or labels_M is not [M].
        """
        super().__init__()
        if min(num_samples, dim, num_negatives) < 1:
            raise ModelError(
                problem(
                    f"a contrast memory of {num_samples} samples, width {dim} and "
                    f"{num_negatives} negatives",
                    expected="each at least 1",
                    mend="Give the number of training images and the embeddings' width.",
                )
            )
        if labels_M is not None and labels_M.shape != (num_samples,):
            raise ModelError(
                problem(
                    f"labels of shape {tuple(labels_M.shape)} for a bank of shape "
                    f"{(num_samples, dim)}",
                    expected="one label a sample",
                    mend="Give the labels of all training images in the order of their positions.",
                )
            )
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.momentum = momentum
        self.register_buffer("student_bank_MD", unit_rows(torch.randn(num_samples, dim)))
        self.register_buffer("teacher_bank_MD", unit_rows(torch.randn(num_samples, dim)))
        self.register_buffer("log_mean_student", torch.tensor(math.nan))
        self.register_buffer("log_mean_teacher", torch.tensor(math.nan))
        # Part of the data, not of what was learned.
        self.register_buffer("labels_M", labels_M, persistent=False)

    def draw(self) -> Tensor:
        """Return negatives_K: [num_negatives], positions drawn with repetition.

        From torch's global CPU generator, so that a run draws the same on every kind of device.
        """
        positions_K = torch.randint(len(self.student_bank_MD), (self.num_negatives,))
        return positions_K.to(self.student_bank_MD.device)

    def are_negatives(self, positions_N: Tensor, negatives_K: Tensor) -> Tensor:
        """Return [N, K], bool: which of the drawn images are negatives of which anchor."""
        if self.labels_M is None:
            return positions_N[:, None] != negatives_K
        return self.labels_M[positions_N][:, None] != self.labels_M[negatives_K]

    @torch.no_grad()
    def update(self, student_ND: Tensor, teacher_ND: Tensor, positions_N: Tensor) -> None:
        """Move the rows at these (different) positions toward the embeddings."""
        for bank_MD, rows_ND in (
            (self.student_bank_MD, student_ND),
            (self.teacher_bank_MD, teacher_ND),
        ):
            old_ND = bank_MD[positions_N]
            mixed_ND = self.momentum * old_ND + (1 - self.momentum) * rows_ND.to(old_ND.dtype)
            bank_MD[positions_N] = unit_rows(mixed_ND)


def crd(
    student_embedding_ND: Tensor,
    teacher_embedding_ND: Tensor,
    positions_N: Tensor,
    memory: ContrastMemory,
    *,
    update: bool = True,
    negatives_K: Tensor | None = None,
) -> Tensor:
    """Contrastive representation distillation (Tian et al. 2020, equations 17 to 19).

    For an anchor ``a`` of one side, its image's embedding ``b`` on the other side, and N negatives
    ``b_k``, earlier embeddings of other images on the other side:
    ``-log h(a, b) - sum_k log(1 - h(a, b_k))`` with ``h(a, b) = e / (e + N Z / M)`` and
    ``e = exp(a . b / temperature)``; the mean over the batch, with the student's embeddings as
    anchors plus with the teacher's. M is the number of training images; ``Z / M``, absent from
    equation 19, is the mean of ``e`` over the negatives of the first batch, fixed from then on:
    without it the critic starts saturated.

    Both sides are made unit vectors here. **Gradients flow into both**: the teacher's embedding
    comes from a projection that is trained with the student. The teacher's network gets none as
    long as the features below that projection are detached. Never 0: chance level is about
    ``2 log(N + 1) + 2 N log(1 + 1 / N)``.

    Args:
        student_embedding_ND: [N, D], any floating type; computed in float32.
        teacher_embedding_ND: [N, D].
        positions_N: [N], int64, different positions of the images in the memory.
        memory: the bank; after the loss it takes in the embeddings (without gradient).
        update: False leaves the memory as it is.
        negatives_K: [any number], positions to use as negatives; None: ``memory.draw()``.

    Returns:
        Scalar, float32, at least 0.

    Raises:
        ModelError: if shapes do not fit, or a position is not in the memory.
    """
    _check(student_embedding_ND, teacher_embedding_ND, positions_N, memory)
    negatives_K = memory.draw() if negatives_K is None else negatives_K
    dtype = torch.promote_types(student_embedding_ND.dtype, torch.float32)
    with torch.autocast(student_embedding_ND.device.type, enabled=False):
        student_ND = unit_rows(student_embedding_ND.to(dtype))
        teacher_ND = unit_rows(teacher_embedding_ND.to(dtype))
        positive_N = (student_ND * teacher_ND).sum(dim=1) / memory.temperature
        is_negative_NK = memory.are_negatives(positions_N, negatives_K)
        loss = student_ND.new_zeros(())
        for anchors_ND, bank_MD, log_mean in (
            (student_ND, memory.teacher_bank_MD, memory.log_mean_teacher),
            (teacher_ND, memory.student_bank_MD, memory.log_mean_student),
        ):
            score_NK = anchors_ND @ bank_MD[negatives_K].to(dtype).T / memory.temperature
            estimate = _log_mean_exp(score_NK.detach(), is_negative_NK)
            log_z = torch.where(log_mean.isnan(), estimate, log_mean.to(dtype))
            loss = loss + _critic_loss(positive_N, score_NK, is_negative_NK, log_z)
            if update:
                log_mean.copy_(log_z)
        if update:
            memory.update(student_ND, teacher_ND, positions_N)
        return loss


def _critic_loss(
    positive_N: Tensor, score_NK: Tensor, is_negative_NK: Tensor, log_z: Tensor
) -> Tensor:
    num_negatives = score_NK.shape[1]
    # log_z is still NaN in a batch without any negative, whose sum is empty.
    offset = log_z.nan_to_num(0) + math.log(num_negatives)
    log_not_NK = F.logsigmoid(offset - score_NK) * is_negative_NK
    scale_N = num_negatives / is_negative_NK.sum(dim=1).clamp_min(1)
    return -(F.logsigmoid(positive_N - offset) + log_not_NK.sum(dim=1) * scale_N).mean()


def _log_mean_exp(score_NK: Tensor, is_negative_NK: Tensor) -> Tensor:
    """Log of the mean of exp(score) over the negatives; NaN where there are none."""
    count = is_negative_NK.sum()
    total = score_NK.masked_fill(~is_negative_NK, -torch.inf).flatten().logsumexp(dim=0)
    return torch.where(count > 0, total - count.to(total.dtype).log(), torch.nan)


def _check(student: Tensor, teacher: Tensor, positions_N: Tensor, memory: ContrastMemory) -> None:
    check_same_shape(
        student,
        teacher,
        what="embeddings",
        expected="equal shapes [N, dim]",
        mend="Give both sides a projection to the same width.",
    )
    num_samples, dim = memory.student_bank_MD.shape
    if student.ndim != 2 or student.shape[1] != dim or positions_N.shape != student.shape[:1]:
        raise ModelError(
            problem(
                f"embeddings of shape {tuple(student.shape)} with positions of shape "
                f"{tuple(positions_N.shape)} for a bank of shape {(num_samples, dim)}",
                expected=f"[N, {dim}] and [N]",
                mend="Make the memory as wide as the embeddings; give each row its position.",
            )
        )
    if len(positions_N) and not 0 <= int(positions_N.min()) <= int(positions_N.max()) < num_samples:
        raise ModelError(
            problem(
                f"positions from {int(positions_N.min())} to {int(positions_N.max())}",
                expected=f"0 to {num_samples - 1}",
                mend="Count positions within the training split, not within the whole data.",
            )
        )
