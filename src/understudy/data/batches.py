"""Batches of a view of the data: which samples, in which order, with which partners."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.data.images import ImageSource
from understudy.data.views import Views
from understudy.errors import InputError, problem
from understudy.runtime import derive_seed


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures as a network sees them, with what is needed to judge its answer.

    Attributes:
        indices_N: sample numbers in the source, int64.
        images_NCHW: uint8.
        labels_N: int64; -1 where there is none.
        partner_labels_N: labels of the samples that were mixed in; None without mixing.
        label_weight_N: float32, the own label's share, the partner's being the rest; None without
            mixing.
        label_factor: what a mean over the labelled samples counts where this is a part of an
            update, so that each label of the update counts alike; None: 1.
    """

    indices_N: Tensor
    images_NCHW: Tensor
    labels_N: Tensor
    partner_labels_N: Tensor | None = None
    label_weight_N: Tensor | None = None
    label_factor: float | None = None

    @property
    def labelled_N(self) -> Tensor:  # noqa: N802
        """Whether a sample has a label, bool; a mixed one where its partner has one, too."""
        labelled_N = self.labels_N >= 0
        if self.partner_labels_N is not None:
            labelled_N = labelled_N & (self.partner_labels_N >= 0)
        return labelled_N


def epoch_order(indices_N: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Return ``indices_N`` in the order of this epoch: a function of the arguments alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch order", epoch))
    return indices_N[torch.randperm(len(indices_N), generator=generator)]


def index_batches(order_N: Tensor, batch_size: int, *, drop_last: bool) -> list[Tensor]:
    """Return consecutive batches; ``drop_last`` leaves out an incomplete one at the end."""
    if batch_size < 1:
        raise InputError(
            problem(
                f"the batch size is {batch_size}",
                expected="at least 1",
                mend="Give a positive number.",
            )
        )
    if drop_last:
        order_N = order_N[: len(order_N) // batch_size * batch_size]
    return list(torch.split(order_N, batch_size)) if len(order_N) else []


def rank_share(index_batches: Iterable[Tensor], *, rank: int, num_processes: int) -> list[Tensor]:
    """Return one process's part of every global batch; together the parts are that batch.

    Raises InputError if a batch cannot be shared evenly: with uneven parts the mean over the
    processes' gradients would not be the gradient of the whole batch.
    """
    shares = []
    for batch_N in index_batches:
        if len(batch_N) % num_processes:
            raise InputError(
                problem(
                    f"a batch of {len(batch_N)} samples is shared by {num_processes} processes",
                    expected="a batch size that the number of processes divides",
                    mend="Change training.batch_size, or the number of processes.",
                )
            )
        shares.append(batch_N.chunk(num_processes)[rank])
    return shares


def iter_view_batches(
    source: ImageSource, views: Views | None, index_batches: Iterable[Tensor], *, view: int
) -> Iterator[Batch]:
    """Yield one view of each batch, in order; ``views`` None shows the pictures untouched.

    Partners are asked of the source together with the samples, so that streamed pictures are read
    ahead for both.
    """
    waiting: deque[tuple[Tensor, Tensor | None]] = deque()

    def requests() -> Iterator[Tensor]:
        for indices_N in index_batches:
            partners_N = None if views is None else views.partners(indices_N, view)
            waiting.append((indices_N, partners_N))
            yield indices_N if partners_N is None else torch.cat([indices_N, partners_N])

    for images_NCHW in source.iter_images(requests()):
        indices_N, partners_N = waiting.popleft()
        yield _batch(source, views, images_NCHW, indices_N, partners_N, view)


def _batch(
    source: ImageSource,
    views: Views | None,
    images_NCHW: Tensor,
    indices_N: Tensor,
    partners_N: Tensor | None,
    view: int,
) -> Batch:
    labels_N = source.labels_N[indices_N]
    if views is None:
        return Batch(indices_N, images_NCHW, labels_N)
    own_NCHW, partner_NCHW, partner_labels_N = images_NCHW, None, None
    if partners_N is not None:
        own_NCHW, partner_NCHW = torch.split(images_NCHW, len(indices_N))
        partner_labels_N = source.labels_N[partners_N]
    shown_NCHW, label_weight_N = views.apply(own_NCHW, indices_N, view, partner_NCHW)
    return Batch(indices_N, shown_NCHW, labels_N, partner_labels_N, label_weight_N)
