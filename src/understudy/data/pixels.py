"""Pixel operations that views are made of: the same bits in any batch and on any device.

A picture must not change with the pictures beside it or with the processor. Operations are
therefore copies, whole-number arithmetic, tensor operations of one rounding each (+, -, *, and /
between tensors: a GPU multiplies by the reciprocal of a constant divisor), or sums of products
that are exact in their type. That is why warps and block transforms are not taken from a library
as they are: matrix inverses, matrix products, float means and `grid_sample` may round differently
on another device or in another batch. All images are uint8 NCHW.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import filter2d
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Source positions are whole numbers of 1/65536 pixel, blending weights of 1/256.
POSITION_BITS = 16
WEIGHT_BITS = 8

# A kernel's weights are whole numbers that add up to this. Products of 8-bit pixels and 8-bit
# weights and their sums are exact in float32, and stay so where a convolution rounds its inputs
# to TF32 or bfloat16.
KERNEL_SUM = 256


def per_sample(values: NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    """Return one value per sample as a tensor on ``like``'s device, shape [N, 1, 1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device).view(-1, 1, 1, 1)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Return values on the scale 0 to 255 as uint8, rounded half to even and clamped."""
    return values.round().clamp_(0, 255).to(torch.uint8)


def with_rows(images_NCHW: torch.Tensor, rows_M: IntArray, changed: torch.Tensor) -> torch.Tensor:
    """Return a copy of the images in which the chosen rows are the changed ones."""
    result = images_NCHW.clone()
    if result.device.type == "cpu":
        # Five times as fast as torch's indexed copy of bytes.
        result.numpy()[rows_M] = changed.numpy()
    else:
        result[torch.from_numpy(rows_M).to(result.device)] = changed
    return result


def crop_windows(
    images_NCHW: torch.Tensor, top_N: IntArray, left_N: IntArray, *, height: int, width: int
) -> torch.Tensor:
    """Return one window of height x width per image, whose top left corner is (top, left)."""
    crop = copied_windows if images_NCHW.device.type == "cpu" else gathered_windows
    return crop(images_NCHW, top_N, left_N, height=height, width=width)


def gathered_windows(
    images_NCHW: torch.Tensor, top_N: IntArray, left_N: IntArray, *, height: int, width: int
) -> torch.Tensor:
    """``crop_windows`` by one gather of pixels, on any device."""
    num, num_channels, _, source_width = images_NCHW.shape
    rows_NH = top_N[:, None] + np.arange(height)
    columns_NW = left_N[:, None] + np.arange(width)
    index = (rows_NH * source_width)[:, :, None] + columns_NW[:, None]
    index_N1P = torch.from_numpy(index.reshape(num, 1, -1)).to(images_NCHW.device)
    window = images_NCHW.flatten(2).gather(2, index_N1P.expand(-1, num_channels, -1))
    return window.view(num, num_channels, height, width)


def copied_windows(
    images_NCHW: torch.Tensor, top_N: IntArray, left_N: IntArray, *, height: int, width: int
) -> torch.Tensor:
    """``crop_windows`` on the CPU by copying rows of bytes, two to three times as fast."""
    source = np.ascontiguousarray(images_NCHW.numpy())
    num, num_channels, source_height, source_width = source.shape
    planes_NC1 = np.arange(num * num_channels).reshape(num, num_channels, 1)
    rows_NCH = planes_NC1 * source_height + (top_N[:, None] + np.arange(height))[:, None]
    starts_NCH = rows_NCH * source_width + left_N[:, None, None]
    # Every run of `width` bytes of the source, as one element each; the runs overlap.
    runs: NDArray[np.void] = np.ndarray(
        (source.size - width + 1,), dtype=f"V{width}", buffer=source.data, strides=(1,)
    )
    windows = runs[starts_NCH].view(np.uint8)
    return torch.from_numpy(windows.reshape(num, num_channels, height, width))


def mirrored(positions: IntArray, last: int) -> IntArray:
    """Return positions folded into 0..last by reflection at 0 and at ``last``."""
    if last == 0:
        return np.zeros_like(positions)
    folded: IntArray = np.abs(positions) % (2 * last)
    return np.minimum(folded, 2 * last - folded)


def padded(images_NCHW: torch.Tensor, padding: int, mode: str) -> torch.Tensor:
    """Return images with ``padding`` more pixels on every side, "zero" or "reflect".

    To reflect, ``padding`` must be less than the shorter side.
    """
    larger = F.pad(images_NCHW, (padding, padding, padding, padding))
    if mode == "zero" or padding == 0:
        return larger
    # Not F.pad's own reflection: that one does not know uint8.
    far = padding + 1
    larger[..., :padding] = larger[..., far : far + padding].flip(3)
    larger[..., -padding:] = larger[..., -far - padding : -far].flip(3)
    larger[:, :, :padding] = larger[:, :, far : far + padding].flip(2)
    larger[:, :, -padding:] = larger[:, :, -far - padding : -far].flip(2)
    return larger


def to_positions(pixels: FloatArray) -> IntArray:
    """Return pixel coordinates (pixel centres at whole numbers) as fixed-point positions."""
    positions: IntArray = np.rint(pixels * 2**POSITION_BITS).astype(np.int64)
    return positions


def sample_bilinear(
    images_NCHW: torch.Tensor, x_NHW: IntArray, y_NHW: IntArray, *, mode: str
) -> torch.Tensor:
    """Return images read at fixed-point positions with bilinear weights, uint8 NCHW.

    ``x_NHW`` and ``y_NHW`` come from ``to_positions`` and may have sizes of 1 that broadcast.
    ``mode`` says what lies outside: "zero", "reflect" or "edge". All arithmetic is in whole
    numbers, so the result is the same on every device.
    """
    num, num_channels, height, width = images_NCHW.shape
    x_NHW, y_NHW = np.broadcast_arrays(
        _bounded(x_NHW, width, mode=mode), _bounded(y_NHW, height, mode=mode)
    )
    # One black pixel before and two after every row and column: what is outside reads as zero,
    # and the right and lower neighbours of the last position exist.
    framed = F.pad(images_NCHW, (1, 2, 1, 2)).flatten(2)
    row_size = width + 3
    corner = ((y_NHW >> POSITION_BITS) + 1) * row_size + (x_NHW >> POSITION_BITS) + 1
    shift, mask = POSITION_BITS - WEIGHT_BITS, 2**WEIGHT_BITS - 1
    right = torch.from_numpy(((x_NHW >> shift) & mask).astype(np.int32)).to(images_NCHW.device)
    lower = torch.from_numpy(((y_NHW >> shift) & mask).astype(np.int32)).to(images_NCHW.device)
    index_N1P = torch.from_numpy(corner.reshape(num, 1, -1)).to(images_NCHW.device)
    index_NCP = index_N1P.expand(-1, num_channels, -1)
    right_N1P, lower_N1P = right.view(num, 1, -1), lower.view(num, 1, -1)
    upper_row = _blend_neighbours(framed, index_NCP, right_N1P)
    lower_row = _blend_neighbours(framed, index_NCP + row_size, right_N1P)
    blended = (upper_row << WEIGHT_BITS) + (lower_row - upper_row) * lower_N1P
    half = 1 << (2 * WEIGHT_BITS - 1)
    pixels = ((blended + half) >> (2 * WEIGHT_BITS)).to(torch.uint8)
    return pixels.view(num, num_channels, *corner.shape[1:])


def _blend_neighbours(
    pixels_NCQ: torch.Tensor, index_NCP: torch.Tensor, right_N1P: torch.Tensor
) -> torch.Tensor:
    left = pixels_NCQ.gather(2, index_NCP).int()
    right = pixels_NCQ.gather(2, index_NCP + 1).int()
    return (left << WEIGHT_BITS) + (right - left) * right_N1P


def _bounded(positions: IntArray, size: int, *, mode: str) -> IntArray:
    one = 1 << POSITION_BITS
    last = (size - 1) * one
    if mode == "reflect":
        return mirrored(positions, last)
    if mode == "edge":
        return np.clip(positions, 0, last)
    return np.clip(positions, -one, last + one)


def look_up(images_NCHW: torch.Tensor, table_NV: torch.Tensor) -> torch.Tensor:
    """Return ``table_NV[n, pixel]`` for every pixel of image n; the table has 256 columns."""
    index_NP = images_NCHW.flatten(1).long()
    return table_NV.to(images_NCHW.device).gather(1, index_NP).view(images_NCHW.shape)


def filtered(images_NCHW: torch.Tensor, kernels_NKK: FloatArray) -> torch.Tensor:
    """Return every image correlated with its own kernel; the edge pixel continues outwards.

    Kernels have an odd size and add up to 1. They are rounded to multiples of 1/256; the centre
    takes the rest, so that brightness is kept.
    """
    weights_NKK = np.rint(kernels_NKK * KERNEL_SUM)
    centre = kernels_NKK.shape[1] // 2
    weights_NKK[:, centre, centre] += KERNEL_SUM - weights_NKK.sum(axis=(1, 2))
    weights = torch.from_numpy(weights_NKK.astype(np.float32)).to(images_NCHW.device)
    sums: torch.Tensor = filter2d(images_NCHW.float(), weights, border_type="replicate")
    return rounded(sums / KERNEL_SUM)


def rectangle_mask(
    top_N: IntArray, bottom_N: IntArray, left_N: IntArray, right_N: IntArray, *, like: torch.Tensor
) -> torch.Tensor:
    """Return bool [N, 1, H, W], true from top to before bottom and from left to before right."""
    rows, columns = np.arange(like.shape[2]), np.arange(like.shape[3])
    inside_NH = (rows >= top_N[:, None]) & (rows < bottom_N[:, None])
    inside_NW = (columns >= left_N[:, None]) & (columns < right_N[:, None])
    mask = inside_NH[:, None, :, None] & inside_NW[:, None, None, :]
    return torch.from_numpy(mask).to(like.device)
