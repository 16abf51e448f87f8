"""Inputs in the layout that the native kernels take."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)
