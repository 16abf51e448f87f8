"""View transforms that mix a picture with its partner's: mixup and cutmix.

They return the mixed uint8 images and the weight of each sample's own label, float32 [N].
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import betaincinv

from understudy.data.pixels import IntArray, per_sample, rectangle_mask
from understudy.data.random import Draws
from understudy.data.transforms_geometry import rectangle_area

# Mixing weights are whole multiples of 1/65536: the blend is exact and so is the label weight.
WEIGHT_BITS = 16


def mixup(
    images_NCHW: torch.Tensor, partner_images_NCHW: torch.Tensor, draws: Draws, *, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend with a weight from Beta(alpha, alpha) (Zhang, Cisse, Dauphin, Lopez-Paz, 2018)."""
    one = 1 << WEIGHT_BITS
    weights = np.rint(betaincinv(alpha, alpha, draws.uniforms_NK[:, 0]) * one).astype(np.int32)
    own_weight = per_sample(weights, images_NCHW)
    own, partner = images_NCHW.int(), partner_images_NCHW.int()
    blended = (partner << WEIGHT_BITS) + (own - partner) * own_weight
    mixed = ((blended + one // 2) >> WEIGHT_BITS).to(torch.uint8)
    return mixed, torch.from_numpy((weights / one).astype(np.float32))


def cutmix(
    images_NCHW: torch.Tensor, partner_images_NCHW: torch.Tensor, draws: Draws, *, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace a rectangle by the partner's pixels (Yun et al., 2019, "CutMix").

    Its share of the area is 1 - w with w from Beta(alpha, alpha), its centre any pixel; it is cut
    at the border. The label weight is the share of pixels that remain, counted.
    """
    height, width = images_NCHW.shape[2:]
    side_share = np.sqrt(1 - betaincinv(alpha, alpha, draws.uniforms_NK[:, 0]))
    top, bottom = _interval(draws.whole(1, height), np.rint(side_share * height).astype(np.int64))
    left, right = _interval(draws.whole(2, width), np.rint(side_share * width).astype(np.int64))
    mask = rectangle_mask(top, bottom, left, right, like=images_NCHW)
    area = rectangle_area(top, bottom, left, right, height=height, width=width)
    own_weight = ((height * width - area) / (height * width)).astype(np.float32)
    return torch.where(mask, partner_images_NCHW, images_NCHW), torch.from_numpy(own_weight)


def _interval(centre: IntArray, side: IntArray) -> tuple[IntArray, IntArray]:
    start = centre - side // 2
    return start, start + side
