"""Which samples an epoch shows: from the easiest to all of them, or those that are learnt already.

An epoch has as many places as there are training samples, so it makes as many updates with a
curriculum as without; where fewer samples are shown they come round again, in the same view.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed
from torch import Tensor, nn

from understudy.data.batches import epoch_order
from understudy.runtime import derive_seed
from understudy.train.distill_settings import Curriculum

# Shares of training are rounded by less than this.
ROUNDING = 1e-9


def teacher_difficulty(
    logits_NK: Tensor, labels_N: Tensor, *, by: Literal["margin", "entropy", "loss"]
) -> Tensor:
    """Return how hard each sample is for the teacher, float32 [N], larger being harder.

    From its distribution p at temperature 1: "margin" is ``max_{k != y} ln p_k - ln p_y``, how far
    the best other class is above the label y; "entropy" is that of p; "loss" is ``-ln p_y``. Where
    there is no label (below 0), y is the teacher's own answer.

    Args:
        logits_NK: of two classes or more.
        labels_N: int64.
    """
    log_p_NK = logits_NK.float().log_softmax(dim=1)
    if by == "entropy":
        return -(log_p_NK.exp() * log_p_NK).sum(dim=1)
    targets_N1 = answered_labels(logits_NK, labels_N)[:, None]
    label_log_p_N = log_p_NK.gather(1, targets_N1)[:, 0]
    if by == "loss":
        return -label_log_p_N
    others_NK = log_p_NK.scatter(1, targets_N1, -torch.inf)
    return others_NK.amax(dim=1) - label_log_p_N


def answered_labels(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Return the labels, and the class of the largest logit where there is none (below 0)."""
    return torch.where(labels_N >= 0, labels_N, logits_NK.argmax(dim=1))


def pacing_share(
    progress: float, *, pacing: str, start: float, full_at: float, num_steps: int = 1
) -> float:
    """Return the share of the samples that is shown at this progress of training.

    With t = progress / full_at, and all samples from t = 1 on:

    - "linear": ``start + (1 - start) t`` and
    - "root": ``sqrt(start^2 + (1 - start^2) t)``, the competence functions of Platanios et al.
      2019, "Competence-based curriculum learning for neural machine translation";
    - "step": ``start^(1 - floor(num_steps t) / num_steps)``, the fixed exponential pacing of
      Hacohen and Weinshall 2019, "On the power of curriculum learning in training deep networks":
      after equal steps the share grows by the same factor, here the one that reaches all samples
      after ``num_steps``.

    Args:
        progress: share of training done, in [0, 1].
        pacing: one of the three.
        start: share at the beginning, in (0, 1].
        full_at: progress from which on all are shown, in (0, 1].
        num_steps: for "step".
    """
    t = progress / full_at
    if t >= 1:
        return 1.0
    if pacing == "linear":
        return start + (1 - start) * t
    if pacing == "root":
        return math.sqrt(start**2 + (1 - start**2) * t)
    if pacing == "step":
        return float(start ** (1 - math.floor(num_steps * t + ROUNDING) / num_steps))
    raise ValueError(f"unknown pacing {pacing!r}")


class CurriculumOrder(nn.Module):
    """Shows the easiest samples first, and all of them from ``full_at`` on.

    Progress counts in whole epochs: epoch e of E stands at e / E. A share of the samples is the
    easiest share of every group (class), so that none is absent; ties go by sample number.

    With the teacher's difficulty the order of samples is fixed. With the student's own loss it is
    that of the samples' last looks, averaged exponentially over epochs, each epoch's losses
    counting from the next one on; a sample that was not shown keeps the loss it had. Nothing is
    known at first, so epoch 0 shows all samples, and one that no batch has held yet is shown.

    Self-paced (Kumar, Packer and Koller 2010, "Self-paced learning for latent variable models"):
    shown are the samples whose loss is at most a threshold, which is multiplied by a constant
    factor each epoch. It starts in epoch 1 at the ``start`` quantile of the losses of epoch 0, and
    the factor is the one that brings it to the largest of them at ``full_at``, from where on all
    samples are shown whatever their loss. The easiest ``start`` of each class is always shown.

    An epoch's order is a function of the buffers, the seed and the epoch, and what is observed
    during an epoch waits in buffers of its own: a training resumed within an epoch has the same
    order as an unbroken one.

    Args:
        settings: difficulty, pacing and their numbers.
        indices_N: numbers of the training samples, ascending, int64.
        groups_N: the class of each, 0 or above.
        num_epochs: of the training.
        difficulty_N: of each, larger being harder; None for the student's own loss.
    """

    indices_N: Tensor
    groups_N: Tensor
    difficulty_N: Tensor
    first_losses: Tensor
    pending_sums_N: Tensor
    pending_counts_N: Tensor

    def __init__(
        self,
        settings: Curriculum,
        indices_N: Tensor,
        groups_N: Tensor,
        *,
        num_epochs: int,
        difficulty_N: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.num_epochs = settings, num_epochs
        self.watches_losses = settings.difficulty == "student_loss"
        assert self.watches_losses == (difficulty_N is None), "difficulty from one side"
        self.full_epoch = math.ceil(settings.full_at * num_epochs - ROUNDING)
        num_samples = len(indices_N)
        not_known_N = torch.full((num_samples,), torch.nan)
        self.register_buffer("indices_N", indices_N, persistent=False)
        self.register_buffer("groups_N", groups_N, persistent=False)
        self.register_buffer("difficulty_N", not_known_N if difficulty_N is None else difficulty_N)
        # Threshold at the start and largest loss, both of epoch 0.
        self.register_buffer("first_losses", torch.full((2,), torch.nan, dtype=torch.float64))
        num_watched = num_samples if self.watches_losses else 0
        self.register_buffer("pending_sums_N", torch.zeros(num_watched, dtype=torch.float64))
        self.register_buffer("pending_counts_N", torch.zeros(num_watched, dtype=torch.int64))

    def order(self, *, seed: int, epoch: int) -> Tensor:
        """Return the sample numbers of the epoch: the shown ones, shuffled anew in each round.

        Where all are shown it is the order that a training without a curriculum has.
        """
        shown_N = self.indices_N[self.shown(epoch=epoch)]
        num_rounds = math.ceil(len(self.indices_N) / len(shown_N))
        seeds = [seed, *(derive_seed(seed, "round", number) for number in range(1, num_rounds))]
        rounds = [epoch_order(shown_N, seed=round_seed, epoch=epoch) for round_seed in seeds]
        return torch.cat(rounds)[: len(self.indices_N)]

    def shown(self, *, epoch: int) -> Tensor:
        """Return which samples the epoch shows, bool [N]."""
        settings = self.settings
        knows_nothing = self.watches_losses and epoch == 0
        if epoch >= self.full_epoch or knows_nothing:
            return torch.ones_like(self.groups_N, dtype=torch.bool)
        # A loss that is not known yet counts as the smallest.
        values_N = self.difficulty_N.nan_to_num(nan=-torch.inf, posinf=torch.inf)
        if settings.pacing == "self_paced":
            easiest_N = easiest_of_each(values_N, self.groups_N, share=settings.start)
            return easiest_N | (values_N <= self.threshold(epoch=epoch))
        share = pacing_share(
            epoch / self.num_epochs,
            pacing=settings.pacing,
            start=settings.start,
            full_at=settings.full_at,
            num_steps=settings.num_steps,
        )
        return easiest_of_each(values_N, self.groups_N, share=share)

    def threshold(self, *, epoch: int) -> float:
        """Return the self-paced threshold of an epoch from 1 on."""
        smallest = torch.finfo(torch.float32).tiny
        start, largest = (max(value, smallest) for value in self.first_losses.tolist())
        num_growths = max(1, self.full_epoch - 1)
        return float(start * (largest / start) ** ((epoch - 1) / num_growths))

    def observe(self, indices_N: Tensor, losses_N: Tensor) -> None:
        """Take note of the student's losses of these samples, of all processes.

        The processes show equally many samples in each call. Every one of them takes note of all,
        because only the first one's state is saved.
        """
        indices_N, losses_N = of_all_processes(indices_N, losses_N.double())
        rows_N = torch.searchsorted(self.indices_N, indices_N)
        self.pending_sums_N.index_add_(0, rows_N, losses_N)
        self.pending_counts_N.index_add_(0, rows_N, torch.ones_like(rows_N))

    def end_epoch(self, *, epoch: int) -> None:
        """Let the losses observed in this epoch count."""
        if not self.watches_losses:
            return
        seen_N = self.pending_counts_N > 0
        means_N = (self.pending_sums_N / self.pending_counts_N).float()
        former_N = torch.where(self.difficulty_N.isnan(), means_N, self.difficulty_N)
        memory = self.settings.memory
        averaged_N = memory * former_N + (1 - memory) * means_N
        self.difficulty_N.copy_(torch.where(seen_N, averaged_N, self.difficulty_N))
        self.pending_sums_N.zero_()
        self.pending_counts_N.zero_()
        if epoch == 0:
            ascending = self.difficulty_N[seen_N].double().sort().values
            at_start = math.ceil(self.settings.start * len(ascending) - ROUNDING) - 1
            self.first_losses.copy_(torch.stack([ascending[at_start], ascending[-1]]))


def easiest_of_each(values_N: Tensor, groups_N: Tensor, *, share: float) -> Tensor:
    """Return which samples are the easiest share of their group, at least one: bool [N].

    Args:
        values_N: difficulties, larger being harder; ties go by position.
        groups_N: int64, 0 or above.
        share: in (0, 1]; of n samples ``ceil(share * n)`` are chosen.
    """
    by_value_N = values_N.argsort(stable=True)
    by_group_N = by_value_N[groups_N[by_value_N].argsort(stable=True)]
    counts_G = groups_N.bincount()
    starts_G = counts_G.cumsum(0) - counts_G
    ranks_N = torch.arange(len(values_N)) - starts_G[groups_N[by_group_N]]
    num_chosen_G = (counts_G.double() * share - ROUNDING).ceil()
    chosen_N = torch.empty_like(groups_N, dtype=torch.bool)
    chosen_N[by_group_N] = ranks_N < num_chosen_G[groups_N[by_group_N]]
    return chosen_N


def of_all_processes(indices_N: Tensor, losses_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples and losses of all processes, in the order of the processes.

    Args:
        indices_N: int64, equally many in each process.
        losses_N: float64.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return indices_N, losses_N
    on_gpu = torch.distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    gathered = []
    for own_N in (indices_N.to(device), losses_N.to(device)):
        parts = [torch.empty_like(own_N) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own_N.contiguous())
        gathered.append(torch.cat(parts).cpu())
    return gathered[0], gathered[1]
