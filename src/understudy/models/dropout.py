"""Dropout whose mask costs little on a CPU.

``torch.nn.Dropout`` spends most of a small network's training step in a scalar Mersenne twister.
Here each element gets one byte of SFC64 output, eight elements a draw, and is dropped when the byte
is below ``round(256 * rate)``; the rate is therefore met to within 1/512, and the kept values are
scaled by the inverse of the keep probability that is really used, so the expectation is exact
(Srivastava et al. 2014, "Dropout", in the inverted form).

Masks are a pure function of (seed, step, layer, call): the training loop calls
``set_dropout_step`` before each step and has nothing else to save for an exact resume.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.errors import ModelError, problem

NUM_BYTE_VALUES = 256


class FastDropout(nn.Module):
    """Drop elements with probability ``rate`` in training; identity in evaluation.

    Args:
        rate: in [0, 1); on CPUs rounded to a multiple of 1/256 (``realised_rate``).

    On other devices, and inside ``torch.compile`` or an export, it is ``torch``'s own dropout.

    Raises:
        ModelError: for a rate outside [0, 1), or one that rounds to dropping everything.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        threshold = round(rate * NUM_BYTE_VALUES)
        if not 0 <= rate < 1 or threshold == NUM_BYTE_VALUES:
            raise ModelError(
                problem(
                    f"a dropout rate of {rate}",
                    expected="a number from 0 to 255/256",
                    mend="Choose a smaller rate.",
                )
            )
        self.rate = rate
        self.threshold = threshold
        self.seed = 0
        self.layer = 0
        self.step = 0
        self.num_calls = 0

    @property
    def realised_rate(self) -> float:
        """The drop probability of the CPU mask: the multiple of 1/256 nearest to ``rate``."""
        return self.threshold / NUM_BYTE_VALUES

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return features
        if features.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(features, self.rate)
        mask = self.draw_mask(features)
        result: Tensor = _Dropout.apply(features, mask, self._scale())  # type: ignore[no-untyped-call]
        return result

    def draw_mask(self, features: Tensor) -> Tensor:
        """Return the next mask: uint8, 1 where kept, with the shape and strides of ``features``.

        A second call within a step (gradient accumulation, two passes) gives another mask.
        """
        key = (self.seed, self.step, self.layer, self.num_calls)
        self.num_calls += 1
        num_words = -(-features.numel() // 8)
        words = np.random.SFC64(np.random.SeedSequence(key)).random_raw(num_words)
        drawn = words.view(np.uint8)[: features.numel()]
        kept = np.greater_equal(drawn, np.uint8(self.threshold)).view(np.uint8)
        # Drawn in memory order, so that a channels-last tensor needs no copy.
        strides = torch.empty_like(features, device="meta").stride()
        return torch.from_numpy(kept).as_strided(features.shape, strides)

    def _scale(self) -> float:
        return 1 / (1 - self.realised_rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class LeakyReLUDropout(FastDropout):
    """Leaky ReLU followed by dropout, in fewer passes over memory than the two modules take.

    Args:
        rate: drop probability, as in ``FastDropout``.
        negative_slope: factor on negative inputs.
    """

    def __init__(self, rate: float, *, negative_slope: float = 0.01) -> None:
        super().__init__(rate)
        self.negative_slope = negative_slope

    def forward(self, features: Tensor) -> Tensor:
        falls_back = features.device.type != "cpu" or torch.compiler.is_compiling()
        if not self.training or self.rate == 0 or falls_back:
            return super().forward(F.leaky_relu(features, self.negative_slope))
        result: Tensor = _LeakyReLUDropout.apply(  # type: ignore[no-untyped-call]
            features, self.draw_mask(features), self._scale(), self.negative_slope
        )
        return result

    def extra_repr(self) -> str:
        return f"rate={self.rate}, negative_slope={self.negative_slope}"


class _Dropout(torch.autograd.Function):
    """``features * mask * scale`` in one pass; the mask is kept as bytes for the gradient."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return _scaled_product(features, mask.to(features.dtype), scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return _scaled_product(gradients[0], mask.to(gradients[0].dtype), ctx.scale), None, None


class _LeakyReLUDropout(torch.autograd.Function):
    """``features * factor`` with ``factor = mask * scale * (1 or slope)``, also the gradient's."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, mask: Tensor, scale: float, negative_slope: float
    ) -> Tensor:
        kept = mask.to(features.dtype)
        factor = torch.ops.aten.leaky_relu_backward(kept, features, negative_slope, False)
        # The factor replaces the saved input: one tensor is kept, as for the activation alone.
        ctx.save_for_backward(factor)
        ctx.scale = scale
        return _scaled_product(features, factor, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (factor,) = ctx.saved_tensors
        return _scaled_product(gradients[0], factor, ctx.scale), None, None, None


def _scaled_product(features: Tensor, factor: Tensor, scale: float) -> Tensor:
    # addcmul applies the scale within the same pass over memory; mul by a scalar takes another.
    return torch.addcmul(features.new_zeros(()), features, factor, value=scale)


def set_dropout_step(model: nn.Module, *, seed: int, step: int) -> None:
    """Make the masks of the coming step a function of (seed, step, layer) alone.

    Args:
        model: every ``FastDropout`` in it is set; numbered in the order of ``modules()``.
        seed: at least 0; give each process of a data-parallel run its own.
        step: at least 0; the number of the optimiser step.
    """
    layers = (module for module in model.modules() if isinstance(module, FastDropout))
    for layer, module in enumerate(layers):
        module.seed = seed
        module.step = step
        module.layer = layer
        module.num_calls = 0
