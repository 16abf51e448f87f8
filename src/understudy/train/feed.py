"""The pictures, labels and teacher outputs of each update: a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

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
from understudy.errors import DataError, problem


class TeacherSource(Protocol):
    """Answers with the teacher's outputs for samples of a view, wherever they come from."""

    def outputs(self, indices_N: Tensor, *, view: int) -> Tensor:
        """Return logits_NK, float32, in the data's class order."""
        ...


@dataclass(frozen=True)
class Feed:
    """Batches of every epoch. Epoch ``e`` shows view ``e mod num_views`` in an order of its own.

    Nothing here has state: an epoch continued from batch ``b`` is the epoch from the start without
    its first ``b`` batches, which is what makes a resumed run equal to an unbroken one.

    Attributes:
        source: the pictures.
        views: how they are shown; None shows them as they are.
        indices_N: the samples to train on, int64.
        batch_size: samples a batch over all processes; an incomplete last batch is left out.
        num_views: number of different views; later epochs show them again.
        seed: of the order.
        teacher: where the teacher's outputs come from; None trains without (the control).
    """

    source: ImageSource
    views: Views | None
    indices_N: Tensor
    batch_size: int
    num_views: int
    seed: int
    teacher: TeacherSource | None = None

    def __post_init__(self) -> None:
        if len(self.indices_N) < self.batch_size:
            raise DataError(
                problem(
                    f"the training split holds {len(self.indices_N)} samples",
                    expected=f"at least one batch of {self.batch_size}",
                    mend="Lower training.batch_size or give more data.",
                )
            )

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return len(self.indices_N) // self.batch_size

    def epoch(
        self, epoch: int, *, start_batch: int = 0, rank: int = 0, num_processes: int = 1
    ) -> Iterator[tuple[Batch, Tensor | None]]:
        """Yield (batch, teacher_logits_NK or None) from batch ``start_batch`` of this epoch on.

        With several processes each gets its even share of the same global batches.
        """
        view = epoch % self.num_views
        order_N = epoch_order(self.indices_N, seed=self.seed, epoch=epoch)
        batches = index_batches(order_N, self.batch_size, drop_last=True)[start_batch:]
        if num_processes > 1:
            batches = rank_share(batches, rank=rank, num_processes=num_processes)
        for batch in iter_view_batches(self.source, self.views, batches, view=view):
            teacher_logits_NK = None
            if self.teacher is not None:
                teacher_logits_NK = self.teacher.outputs(batch.indices_N, view=view)
            yield batch, teacher_logits_NK
