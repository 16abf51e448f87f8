"""The pictures, labels and teacher outputs of each update: a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from understudy.data.batches import (
    Batch,
    epoch_order,
    index_batches,
    iter_view_batches,
    rank_share,
)
from understudy.data.sources import ImageSource
from understudy.data.views import Views
from understudy.errors import DataError, InputError, problem
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.settings import TrainSettings


class TeacherSource(Protocol):
    """Answers with the teacher's outputs for samples of a view, wherever they come from."""

    def outputs(self, batch: Batch, *, view: int) -> TeacherOutputs:
        """Return logits in the data's class order, and the features that were asked for."""
        ...


class SampleOrder(Protocol):
    """Decides which samples an epoch shows, and in which order: a curriculum.

    A module: what it remembers is saved with the training.

    Attributes:
        watches_losses: whether it wants to be told the student's losses.
    """

    watches_losses: bool

    def order(self, *, seed: int, epoch: int) -> Tensor:
        """Return the sample numbers of the epoch, as many as the training split has."""
        ...

    def observe(self, indices_N: Tensor, losses_N: Tensor) -> None:
        """Take note of the student's losses of these samples; it counts from the next epoch on."""
        ...

    def end_epoch(self, *, epoch: int) -> None:
        """Let what was observed in this epoch count."""
        ...


@dataclass(frozen=True)
class ViewPlan:
    """Which view each epoch shows: view ``e mod num_views`` in epoch ``e``.

    With ``num_last`` the last so many views wait for epoch ``first_last_epoch``: from it on they
    alone come in turn, before it the others.
    """

    num_views: int
    num_last: int = 0
    first_last_epoch: int = 0

    def __post_init__(self) -> None:
        most = self.num_views - (self.first_last_epoch > 0)
        if self.num_last > most:
            raise InputError(
                problem(
                    f"{self.num_last} of {self.num_views} views are for the last epochs",
                    expected=f"at most {most}",
                    mend="Take fewer, or more views.",
                )
            )

    @classmethod
    def of(cls, settings: TrainSettings, num_views: int) -> ViewPlan:
        """Return the plan of a training with these settings."""
        last = settings.last_views
        if last is None:
            return cls(num_views)
        return cls(num_views, last.num_views, settings.num_epochs - last.num_epochs)

    def view(self, epoch: int) -> int:
        """Return the view of an epoch."""
        num_first = self.num_views - self.num_last
        if self.num_last and epoch >= self.first_last_epoch:
            return num_first + (epoch - self.first_last_epoch) % self.num_last
        return epoch % num_first


@dataclass(frozen=True)
class Feed:
    """Batches of every epoch, each epoch in an order of its own.

    Nothing here has state: an epoch continued from batch ``b`` is the epoch from the start without
    its first ``b`` batches, which is what makes a resumed run equal to an unbroken one.

    Attributes:
        source: the pictures.
        views: how they are shown; None shows them as they are.
        indices_N: the samples to train on, int64.
        batch_size: samples a batch over all processes; an incomplete last batch is left out.
        view_plan: which view each epoch shows.
        seed: of the order.
        teacher: where the teacher's outputs come from; None trains without (the control).
        curriculum: which samples an epoch shows; None shows all of them in a random order.
    """

    source: ImageSource
    views: Views | None
    indices_N: Tensor
    batch_size: int
    view_plan: ViewPlan
    seed: int
    teacher: TeacherSource | None = None
    curriculum: SampleOrder | None = None

    def __post_init__(self) -> None:
        if len(self.indices_N) < self.batch_size:
            raise DataError(
                problem(
                    f"the training split holds {len(self.indices_N)} samples",
                    expected=f"at least one batch of {self.batch_size}",
                    mend="Lower this training's batch_size or give more data.",
                )
            )

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return len(self.indices_N) // self.batch_size

    def epoch(
        self, epoch: int, *, start_batch: int = 0, rank: int = 0, num_processes: int = 1
    ) -> Iterator[tuple[Batch, TeacherOutputs | None]]:
        """Yield (batch, teacher outputs or None) from batch ``start_batch`` of this epoch on.

        With several processes each gets its even share of the same global batches.
        """
        view = self.view_plan.view(epoch)
        if self.curriculum is None:
            order_N = epoch_order(self.indices_N, seed=self.seed, epoch=epoch)
        else:
            order_N = self.curriculum.order(seed=self.seed, epoch=epoch)
        batches = index_batches(order_N, self.batch_size, drop_last=True)[start_batch:]
        if num_processes > 1:
            batches = rank_share(batches, rank=rank, num_processes=num_processes)
        for batch in iter_view_batches(self.source, self.views, batches, view=view):
            answer = None if self.teacher is None else self.teacher.outputs(batch, view=view)
            yield batch, answer


def split_update(
    batch: Batch,
    teacher: TeacherOutputs | None,
    *,
    size: int,
    device: torch.device,
    labelled_share: float,
) -> Iterator[tuple[Batch, TeacherOutputs | None]]:
    """Yield an update's batch on the device, in parts of ``size`` samples.

    Args:
        labelled_share: of the update's samples, over all processes, so many have a label.
    """
    for start in range(0, len(batch.labels_N), size):
        rows = slice(start, start + size)
        fields = {
            name: None if value is None else value[rows].to(device)
            for name, value in vars(batch).items()
        }
        part = Batch(**fields)  # type: ignore[arg-type]
        # A part weighs as many samples as it has. Its mean over the labelled ones is to weigh as
        # many labels.
        share = int(batch.labelled_N[rows].sum()) / len(part.labels_N)
        if share != labelled_share:
            part = replace(part, label_factor=share / labelled_share)
        yield part, None if teacher is None else rows_of(teacher, rows, device)


def rows_of(teacher: TeacherOutputs, rows: slice, device: torch.device) -> TeacherOutputs:
    """Return some rows of a teacher's outputs on the device."""
    top_k = teacher.top_k
    return TeacherOutputs(
        teacher.logits_NK[rows].to(device),
        {key: value[rows].to(device) for key, value in teacher.features.items()},
        None if top_k is None else (top_k[0][rows].to(device), top_k[1][rows].to(device)),
    )
