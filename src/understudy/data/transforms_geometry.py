"""View transforms that move pixels: pad_crop, flip, random_resized_crop, affine, cutout.

Every transform takes uint8 images NCHW and the draws of these samples, and returns uint8 images of
the same shape. What the parameters mean stands in ``view_spec.TRANSFORM_PARAMETERS``; whether a
sample is changed at all (``probability``) is decided by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from understudy.data.pixels import (
    FloatArray,
    IntArray,
    crop_windows,
    padded,
    rectangle_mask,
    sample_bilinear,
    to_positions,
)
from understudy.data.random import Draws


def pad_crop(images_NCHW: torch.Tensor, draws: Draws, *, padding: int, mode: str) -> torch.Tensor:
    """Pad every side and cut out a window of the old size; every offset is equally likely."""
    height, width = images_NCHW.shape[2:]
    num_offsets = 2 * padding + 1
    return crop_windows(
        padded(images_NCHW, padding, mode),
        draws.whole(0, num_offsets),
        draws.whole(1, num_offsets),
        height=height,
        width=width,
    )


def flip(images_NCHW: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Mirror left and right."""
    del draws
    return images_NCHW.flip(3)


def random_resized_crop(
    images_NCHW: torch.Tensor, draws: Draws, *, scale: Sequence[float], ratio: Sequence[float]
) -> torch.Tensor:
    """Cut out a rectangle and enlarge it to the old size, bilinear.

    ``scale`` is its share of the area (uniform), ``ratio`` its width over its height (uniform in
    the logarithm); sides are cut to the picture's. The corner may lie between pixels.
    """
    height, width = images_NCHW.shape[2:]
    area = draws.between(0, scale) * height * width
    ratios = np.exp(draws.between(1, np.log(ratio).tolist()))
    crop_height = np.minimum(np.sqrt(area / ratios), height)
    crop_width = np.minimum(np.sqrt(area * ratios), width)
    top = draws.uniforms_NK[:, 2] * (height - crop_height)
    left = draws.uniforms_NK[:, 3] * (width - crop_width)
    y_NH = top[:, None] + (np.arange(height) + 0.5) * (crop_height / height)[:, None] - 0.5
    x_NW = left[:, None] + (np.arange(width) + 0.5) * (crop_width / width)[:, None] - 0.5
    x_N1W, y_NH1 = to_positions(x_NW)[:, None, :], to_positions(y_NH)[:, :, None]
    return sample_bilinear(images_NCHW, x_N1W, y_NH1, mode="edge")


def affine(
    images_NCHW: torch.Tensor,
    draws: Draws,
    *,
    rotation: Sequence[float],
    translate: Sequence[float],
    scale: Sequence[float],
    shear: Sequence[float],
    mode: str,
) -> torch.Tensor:
    """Shear along the rows, magnify and rotate about the centre, then shift; bilinear.

    A positive rotation turns the picture counter-clockwise as seen. ``translate`` is drawn for
    each axis alone, as a share of the width and the height.
    """
    height, width = images_NCHW.shape[2:]
    angle = np.deg2rad(draws.between(0, rotation))
    shift_x = draws.between(1, translate) * width
    shift_y = draws.between(2, translate) * height
    magnification = draws.between(3, scale)
    slant = np.tan(np.deg2rad(draws.between(4, shear)))
    # Output to source: undo the shift, then rotation and magnification, then the shear.
    cos, sin = np.cos(angle) / magnification, np.sin(angle) / magnification
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    x_N1W = (x - shift_x[:, None])[:, None, :]
    y_NH1 = (y - shift_y[:, None])[:, :, None]
    source_y = _column(sin) * x_N1W + _column(cos) * y_NH1
    source_x = _column(cos) * x_N1W - _column(sin) * y_NH1 - _column(slant) * source_y
    return sample_bilinear(
        images_NCHW,
        to_positions(source_x + (width - 1) / 2),
        to_positions(source_y + (height - 1) / 2),
        mode=mode,
    )


def _column(values_N: FloatArray) -> FloatArray:
    return values_N[:, None, None]


def cutout(images_NCHW: torch.Tensor, draws: Draws, *, size: float, fill: int) -> torch.Tensor:
    """Blank out a square whose centre is any pixel (DeVries and Taylor, 2017).

    Its side is ``size`` times the shorter side of the picture, at least one pixel; what lies
    outside of the picture is cut off, as in the paper.
    """
    height, width = images_NCHW.shape[2:]
    side = max(1, round(size * min(height, width)))
    top = draws.whole(0, height) - side // 2
    left = draws.whole(1, width) - side // 2
    mask = rectangle_mask(top, top + side, left, left + side, like=images_NCHW)
    return images_NCHW.masked_fill(mask, fill)


def rectangle_area(
    top: IntArray, bottom: IntArray, left: IntArray, right: IntArray, *, height: int, width: int
) -> IntArray:
    """Return how many pixels of a picture lie in each rectangle."""
    rows = np.clip(bottom, 0, height) - np.clip(top, 0, height)
    columns = np.clip(right, 0, width) - np.clip(left, 0, width)
    area: IntArray = rows * columns
    return area
