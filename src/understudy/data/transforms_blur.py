"""View transforms that mix neighbouring pixels: motion_blur and jpeg_blocking.

Same rules as in ``transforms_geometry``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from understudy.data.pixels import FloatArray, filtered, rounded
from understudy.data.random import Draws

# Steps along the line of a blur, per pixel of the longest line.
STEPS_PER_PIXEL = 8

# The transform matrix is rounded to multiples of 2^-13. Products with pixels and with quantised
# coefficients are then whole numbers below 2^53: exact in float64 in any order of summation.
MATRIX_SCALE = 2**13

# ITU-T T.81 (JPEG), Annex K, tables K.1 and K.2.
LUMINANCE_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)


def motion_blur(
    images_NCHW: torch.Tensor, draws: Draws, *, length: Sequence[float], angle: Sequence[float]
) -> torch.Tensor:
    """Average along a straight line of random length (pixels) and angle (degrees)."""
    kernels_NKK = motion_kernels(
        draws.between(0, length), draws.between(1, angle), longest=length[1]
    )
    return filtered(images_NCHW, kernels_NKK)


def motion_kernels(lengths_N: FloatArray, angles_N: FloatArray, *, longest: float) -> FloatArray:
    """Return kernels [N, K, K] that add up to 1: the line, shared out to the four pixels around.

    A line of length 1 is a point and changes nothing. K is odd and depends on ``longest`` alone.
    """
    half = math.ceil((longest - 1) / 2)
    # One more row and column at the end: the neighbour, of weight 0, of a point on the last one.
    kernels = np.zeros((len(lengths_N), 2 * half + 2, 2 * half + 2))
    num_steps = STEPS_PER_PIXEL * 2 * max(half, 1) + 1
    along_NS = np.linspace(-0.5, 0.5, num_steps) * (lengths_N[:, None] - 1)
    radians = np.deg2rad(angles_N)[:, None]
    x_NS = np.clip(half + along_NS * np.cos(radians), 0, 2 * half)
    y_NS = np.clip(half - along_NS * np.sin(radians), 0, 2 * half)
    column, row = np.floor(x_NS).astype(np.int64), np.floor(y_NS).astype(np.int64)
    right, lower = x_NS - column, y_NS - row
    sample = np.arange(len(lengths_N))[:, None]
    np.add.at(kernels, (sample, row, column), (1 - right) * (1 - lower))
    np.add.at(kernels, (sample, row, column + 1), right * (1 - lower))
    np.add.at(kernels, (sample, row + 1, column), (1 - right) * lower)
    np.add.at(kernels, (sample, row + 1, column + 1), right * lower)
    return kernels[:, :-1, :-1] / num_steps


def jpeg_blocking(
    images_NCHW: torch.Tensor, draws: Draws, *, quality: Sequence[float]
) -> torch.Tensor:
    """Quantise the 8x8 block transform as JPEG does, without chroma subsampling (4:4:4).

    ``quality`` (1 to 100, whole) scales the tables of Annex K as the Independent JPEG Group's
    software does. Sides that are no multiple of 8 are filled up with the edge pixel.
    """
    height, width = images_NCHW.shape[2:]
    qualities = np.floor(draws.between(0, quality) + 0.5)
    planes = _to_ycbcr(images_NCHW.double()) if images_NCHW.shape[1] == 3 else images_NCHW.double()
    # Filling up needs float here: padding with the edge pixel is not there for uint8.
    framed = F.pad(planes.round().clamp_(0, 255), (0, -width % 8, 0, -height % 8), "replicate")
    num, num_channels, full_height, full_width = framed.shape
    blocks = framed.view(num, num_channels, full_height // 8, 8, full_width // 8, 8)
    pixels = blocks.transpose(3, 4).reshape(num, num_channels, -1, 64)
    basis = torch.from_numpy(_cosine_basis()).to(images_NCHW.device)
    steps = _quantisation_steps(qualities, num_channels).to(images_NCHW.device)
    coefficients = (pixels - 128) @ basis.T
    coefficients = (coefficients / MATRIX_SCALE**2 / steps).round() * steps
    restored = ((coefficients @ basis) / MATRIX_SCALE**2 + 128).round().clamp_(0, 255)
    restored = restored.view(num, num_channels, full_height // 8, full_width // 8, 8, 8)
    planes = restored.transpose(3, 4).reshape(framed.shape)[:, :, :height, :width]
    return rounded(_to_rgb(planes) if num_channels == 3 else planes)


def _quantisation_steps(qualities_N: FloatArray, num_channels: int) -> torch.Tensor:
    """Return float64 [N, C, 1, 64], whole numbers from 1 to 255."""
    coarse = qualities_N < 50
    scale_N = np.where(coarse, np.floor(5000 / qualities_N), 200 - 2 * qualities_N)
    tables_C = np.array([LUMINANCE_TABLE] + [CHROMINANCE_TABLE] * (num_channels - 1), np.float64)
    tables_C64 = tables_C.reshape(num_channels, 1, 64)
    steps_NC64 = np.floor((tables_C64 * scale_N[:, None, None, None] + 50) / 100)
    return torch.from_numpy(np.clip(steps_NC64, 1, 255))


@cache
def _cosine_basis() -> FloatArray:
    """Return the 64 basis pictures of the orthonormal DCT-II, whole numbers [64, 64]."""
    frequency, position = np.arange(8)[:, None], np.arange(8)
    matrix = 0.5 * np.cos((2 * position + 1) * frequency * math.pi / 16)
    matrix[0] /= math.sqrt(2)
    whole = np.rint(matrix * MATRIX_SCALE)
    return np.kron(whole, whole).astype(np.float64)


def _to_ycbcr(planes: torch.Tensor) -> torch.Tensor:
    """Return luma and colour differences around 128 (JFIF 1.02) of float64 planes 0 to 255."""
    red, green, blue = planes.unbind(1)
    luma = red * 0.299 + green * 0.587 + blue * 0.114
    return torch.stack(
        (luma, (blue - luma) * (1 / 1.772) + 128, (red - luma) * (1 / 1.402) + 128), dim=1
    )


def _to_rgb(planes: torch.Tensor) -> torch.Tensor:
    luma, blue_difference, red_difference = planes.unbind(1)
    red = luma + (red_difference - 128) * 1.402
    blue = luma + (blue_difference - 128) * 1.772
    green = (luma - red * 0.299 - blue * 0.114) * (1 / 0.587)
    return torch.stack((red, green, blue), dim=1)
