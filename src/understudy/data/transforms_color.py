"""View transforms that change values in place: color_jitter, grayscale, reduced_depth, low_light.

Same rules as in ``transforms_geometry``. On pictures of one channel, what needs colour does
nothing: ``grayscale`` and the saturation and hue of ``color_jitter``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import adjust_brightness_accumulative, adjust_hue, adjust_saturation

from understudy.data.pixels import look_up, per_sample, rounded
from understudy.data.random import Draws


def color_jitter(
    images_NCHW: torch.Tensor,
    draws: Draws,
    *,
    brightness: Sequence[float],
    contrast: Sequence[float],
    saturation: Sequence[float],
    hue: Sequence[float],
) -> torch.Tensor:
    """Change brightness, contrast, saturation (factors) and hue (turns), in this order.

    Contrast is the distance from the picture's mean grey; saturation and hue are those of HSV.
    """
    is_color = images_NCHW.shape[1] == 3
    factors = [
        torch.from_numpy(draws.between(column, low_high).astype(np.float32)).to(images_NCHW.device)
        for column, low_high in enumerate((brightness, contrast, saturation, hue))
    ]
    colors = images_NCHW.float() * (1 / 255)
    if brightness != [1, 1]:
        colors = adjust_brightness_accumulative(colors, factors[0])
    if contrast != [1, 1]:
        mean = _mean_gray(rounded(colors * 255))
        factor = factors[1].view(-1, 1, 1, 1)
        colors = (colors * factor + mean * (1 - factor)).clamp_(0, 1)
    if is_color and saturation != [1, 1]:
        colors = adjust_saturation(colors, factors[2])
    if is_color and hue != [0, 0]:
        # On the CPU wherever the images are: it divides by constants, see pixels.py.
        turned = adjust_hue(colors.cpu(), factors[3].cpu() * (2 * math.pi))
        colors = turned.to(images_NCHW.device)
    return rounded(colors * 255)


def _mean_gray(images_NCHW: torch.Tensor) -> torch.Tensor:
    """Return the mean grey of every picture between 0 and 1, float32 [N, 1, 1, 1].

    A sum of whole numbers is exact; a float mean may round differently in another batch.
    """
    gray = rgb_to_grayscale(images_NCHW) if images_NCHW.shape[1] == 3 else images_NCHW
    total = gray.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    return total.float() * (1 / (255 * gray[0].numel()))


def grayscale(images_NCHW: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Replace every channel by the grey value (ITU-R BT.601, in whole numbers)."""
    del draws
    if images_NCHW.shape[1] == 1:
        return images_NCHW
    gray: torch.Tensor = rgb_to_grayscale(images_NCHW)
    return gray.expand_as(images_NCHW).contiguous()


def reduced_depth(images_NCHW: torch.Tensor, draws: Draws, *, bits: Sequence[int]) -> torch.Tensor:
    """Keep the highest bits of red, green and blue, spread over 0..255 again, as a display does.

    A picture of one channel keeps as many bits as green would.
    """
    del draws
    if images_NCHW.shape[1] == 1:
        bits = [bits[1]]
    values = np.arange(256)
    tables = []
    for num_bits in bits:
        largest = 2**num_bits - 1
        tables.append(((values >> (8 - num_bits)) * 255 + largest // 2) // largest)
    table_CV = torch.from_numpy(np.stack(tables).astype(np.uint8)).to(images_NCHW.device)
    channels = [table_CV[channel][images_NCHW[:, channel].long()] for channel in range(len(tables))]
    return torch.stack(channels, dim=1)


def low_light(
    images_NCHW: torch.Tensor,
    draws: Draws,
    *,
    gamma: Sequence[float],
    gain: Sequence[float],
    photons: Sequence[float],
) -> torch.Tensor:
    """Darken by gain * value^gamma and add the shot noise of a sensor that counts photons.

    A white pixel before darkening counts ``photons`` on average. The Poisson count of mean m is
    drawn as m + sqrt(m) * normal, cut at 0: the right mean and variance from a few photons on,
    and black stays black.
    """
    values = np.arange(256) / 255
    dark_NV = draws.between(1, gain)[:, None] * values ** draws.between(0, gamma)[:, None]
    dark_NV = np.minimum(dark_NV, 1.0)
    num_photons = np.maximum(draws.between(2, photons), 1)
    deviation_NV = np.sqrt(dark_NV / num_photons[:, None])
    dark = look_up(images_NCHW, torch.from_numpy((dark_NV * 255).astype(np.float32)))
    if photons[1] == 0:
        return rounded(dark)
    deviation = look_up(images_NCHW, torch.from_numpy((deviation_NV * 255).astype(np.float32)))
    normals = draws.normals(images_NCHW[0].numel()).to(images_NCHW.device)
    return rounded(dark + deviation * normals.view(images_NCHW.shape))


def gaussian_noise(
    images_NCHW: torch.Tensor, draws: Draws, *, sigma: Sequence[float]
) -> torch.Tensor:
    """Add normal noise to every value, of a standard deviation drawn per sample (white is 1)."""
    deviation = per_sample((draws.between(0, sigma) * 255).astype(np.float32), images_NCHW)
    normals = draws.normals(images_NCHW[0].numel()).to(images_NCHW.device)
    return rounded(images_NCHW.float() + deviation * normals.view(images_NCHW.shape))
