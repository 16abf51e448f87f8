"""A few samples shown as often as many: for what trains on the labelled part of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.data.batches import epoch_order
from understudy.runtime import derive_seed


class RepeatedOrder:
    """An order of ``num_samples`` samples an epoch, taken from fewer, all of them equally often.

    Several passes over the samples, each in an order of its own; the last one is cut short. So a
    network that trains on a part of the data makes as many updates as one that trains on all.

    Args:
        indices_N: the samples to show, int64, at least one.
        num_samples: length of an epoch.
    """

    watches_losses = False

    def __init__(self, indices_N: Tensor, num_samples: int) -> None:
        self.indices_N, self.num_samples = indices_N, num_samples

    def order(self, *, seed: int, epoch: int) -> Tensor:
        """Return the sample numbers of the epoch: a function of the arguments alone."""
        num_passes = -(-self.num_samples // len(self.indices_N))
        passes = [
            epoch_order(self.indices_N, seed=derive_seed(seed, "pass", number), epoch=epoch)
            for number in range(num_passes)
        ]
        return torch.cat(passes)[: self.num_samples]

    def observe(self, indices_N: Tensor, losses_N: Tensor) -> None:
        """Nothing is remembered."""

    def end_epoch(self, *, epoch: int) -> None:
        """Nothing is remembered."""
