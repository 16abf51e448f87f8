"""Dropout whose mask costs little on a CPU.

``torch.nn.Dropout`` spends most of a small network's training step in a scalar Mersenne twister.
Here a 32-bit hash of a counter gives four elements a byte each, and an element is dropped when its
byte is below ``round(256 * rate)``; the rate is therefore met to within 1/512, and the kept values
are scaled by the inverse of the keep probability that is really used, so the expectation is exact
(Srivastava et al. 2014, "Dropout", in the inverted form).

Masks are a pure function of (seed, step, layer, call): the training loop calls
``set_dropout_step`` before each step and has nothing else to save for an exact resume. The native
kernels compute them where they are used, in the forward and again in the backward pass; numpy draws
the same masks where there are no kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from understudy.errors import ModelError, problem
from understudy.models.native import MaskArguments, address, kernels

NUM_BYTE_VALUES = 256
# Words hashed together in numpy: few enough to stay in the second-level cache.
_WORDS_A_BLOCK = 16_384
# Fewer elements than this are not worth waking the other threads for.
_MIN_PARALLEL_ELEMENTS = 32_768

MaskKey = tuple[int, int]


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
        self.negative_slope = 1.0
        self.seed = 0
        self.layer = 0
        self.step = 0
        self.num_calls = 0

    @property
    def realised_rate(self) -> float:
        """The drop probability of the CPU mask: the multiple of 1/256 nearest to ``rate``."""
        return self.threshold / NUM_BYTE_VALUES

    def forward(self, features: Tensor) -> Tensor:
        uses_torch = features.device.type != "cpu" or torch.compiler.is_compiling()
        if not self.training or self.rate == 0 or uses_torch:
            if self.negative_slope != 1:
                features = F.leaky_relu(features, self.negative_slope)
            return F.dropout(features, self.rate) if self.training and self.rate else features
        mask = self.next_mask()
        if _suits_kernels(features, mask):
            result: Tensor = _NativeDropout.apply(features, mask)  # type: ignore[no-untyped-call]
        else:
            result = _Dropout.apply(features, mask)  # type: ignore[no-untyped-call]
        return result

    def next_mask(self) -> Mask:
        """Return the mask of the next call within this step.

        Each call (gradient accumulation, two passes) has another mask.
        """
        key = mask_key(self.seed, self.step, self.layer, self.num_calls)
        self.num_calls += 1
        return Mask(key, self.threshold, self.negative_slope)

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

    def extra_repr(self) -> str:
        return f"rate={self.rate}, negative_slope={self.negative_slope}"


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


def mask_key(*parts: int) -> MaskKey:
    """Return two 32-bit words that differ wherever the parts differ."""
    first, second = np.random.SeedSequence(parts).generate_state(2)
    return int(first), int(second)


def draw_words(num_words: int, key: MaskKey) -> NDArray[np.uint32]:
    """Return hashes of 0, 1, ...: the same numbers as ``keep_masks`` of ``kernels.c``.

    lowbias32 (Wellons 2018, "Prospecting for Hash Functions") of Weyl's sequence from the key's
    first word, with its second word after the first step.
    """
    words = np.empty(num_words, np.uint32)
    scratch = np.empty(min(num_words, _WORDS_A_BLOCK), np.uint32)
    steps = np.arange(len(scratch), dtype=np.uint32) * np.uint32(0x9E3779B9)
    for start in range(0, num_words, _WORDS_A_BLOCK):
        h = words[start : start + _WORDS_A_BLOCK]
        t = scratch[: len(h)]
        offset = (start * 0x9E3779B9 + key[0]) & 0xFFFFFFFF
        np.add(steps[: len(h)], np.uint32(offset), out=h)
        h ^= np.right_shift(h, 16, out=t)
        h ^= np.uint32(key[1])
        h *= np.uint32(0x7FEB352D)
        h ^= np.right_shift(h, 15, out=t)
        h *= np.uint32(0x846CA68B)
        h ^= np.right_shift(h, 16, out=t)
    return words


@dataclass(frozen=True)
class Mask:
    """One layer's leaky ReLU and dropout in one step: a factor for each element, computed anew.

    Attributes:
        key: of the hash.
        threshold: how many of a byte's 256 values drop an element.
        negative_slope: 1 for dropout alone.
    """

    key: MaskKey
    threshold: int
    negative_slope: float

    @property
    def scale(self) -> float:
        """Factor on kept elements: the inverse of the keep probability."""
        return NUM_BYTE_VALUES / (NUM_BYTE_VALUES - self.threshold)

    def arguments(self) -> MaskArguments:
        """Return the mask as the kernels take it."""
        return MaskArguments(
            *self.key, self.threshold, self.scale, self.scale * self.negative_slope
        )

    def kept(self, features: Tensor) -> Tensor:
        """Return uint8, 1 where kept, with the shape and strides of a dense ``features``."""
        num_words = -(-features.numel() // 4)
        drawn = draw_words(num_words, self.key).astype("<u4", copy=False).view(np.uint8)
        kept = np.greater_equal(drawn[: features.numel()], np.uint8(self.threshold))
        # Drawn in memory order, so that a channels-last tensor needs no copy.
        strides = torch.empty_like(features, device="meta").stride()
        return torch.from_numpy(kept.view(np.uint8)).as_strided(features.shape, strides)

    def multiply(self, source: Tensor, sign: Tensor) -> Tensor:
        """Return ``source`` times the factors, by the kernels.

        Args:
            source: float32 of the shape of ``sign``; copied where the layouts differ, but taken as
                it is where it came from a sum over pixels.
            sign: dense float32; positive where the leaky ReLU's input is. The result of this
                function will do as well, as no factor is negative.
        """
        library = kernels()
        assert library is not None
        result = torch.empty_like(sign)
        if source.stride() != sign.stride() and _is_pooled(source, sign):
            num_images, num_channels, height, width = sign.shape
            pointers = address(source), address(sign), address(result)
            sizes = (num_images, height * width, num_channels, torch.get_num_threads())
            library.leaky_dropout_pooled(*pointers, *sizes, self.arguments())
            return result
        if source.stride() != sign.stride():
            source = torch.empty_like(sign).copy_(source)
        num_elements = sign.numel()
        num_threads = torch.get_num_threads() if num_elements >= _MIN_PARALLEL_ELEMENTS else 1
        pointers = address(source), address(sign), address(result)
        library.leaky_dropout(*pointers, num_elements, num_threads, self.arguments())
        return result


def leaky_relu_mask(negative_slope: float) -> Mask:
    """Return the mask of a leaky ReLU without dropout."""
    return Mask((0, 0), 0, negative_slope)


class _NativeDropout(torch.autograd.Function):
    """Dropout (and leaky ReLU) by the kernels: no mask is stored, it is computed again."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, mask: Mask) -> Tensor:
        result = mask.multiply(features, features)
        ctx.save_for_backward(result)
        ctx.mask = mask
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        return ctx.mask.multiply(gradients[0], result), None


class _Dropout(torch.autograd.Function):
    """``features * factor`` with ``factor = kept * scale * (1 or slope)``, also the gradient's."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, mask: Mask) -> Tensor:
        kept = mask.kept(features)
        factor = kept.to(features.dtype)
        if mask.negative_slope == 1:
            ctx.save_for_backward(kept)  # a byte an element is enough
        else:
            factor = torch.ops.aten.leaky_relu_backward(
                factor, features, mask.negative_slope, False
            )
            # The factor replaces the saved input: one tensor is kept, as for the activation alone.
            ctx.save_for_backward(factor)
        ctx.scale = mask.scale
        return _scaled_product(features, factor, mask.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        gradient = gradients[0]
        return _scaled_product(gradient, factor.to(gradient.dtype), ctx.scale), None


def _scaled_product(features: Tensor, factor: Tensor, scale: float) -> Tensor:
    # addcmul applies the scale within the same pass over memory; mul by a scalar takes another.
    return torch.addcmul(features.new_zeros(()), features, factor, value=scale)


def _suits_kernels(features: Tensor, mask: Mask) -> bool:
    # The backward pass tells the side of the activation by the sign of its result.
    fits = features.dtype == torch.float32 and mask.negative_slope >= 0 and _is_dense(features)
    return fits and kernels() is not None


def _is_dense(features: Tensor) -> bool:
    return features.is_contiguous() or (
        features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)
    )


def _is_pooled(source: Tensor, sign: Tensor) -> bool:
    """Whether all pixels of a picture share a row of ``source``, in the kernel's layout."""
    if sign.dim() != 4 or not sign.is_contiguous(memory_format=torch.channels_last):
        return False
    num_channels, num_pixels = sign.shape[1], sign.shape[2] * sign.shape[3]
    fits = num_channels % 16 == 0 and num_pixels * num_channels % 64 == 0
    return fits and source.stride() == (num_channels, 1, 0, 0)
