"""The forms in which features are read by losses and kept by the store: maps, means, attention."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from understudy.errors import ModelError, problem

Shape = tuple[int, ...]
FeatureKind = Literal["map", "pooled", "attention"]


def as_kind(features: Tensor, kind: FeatureKind) -> Tensor:
    """Return features in the form that a loss reads or the store keeps.

    - "map": unchanged, [N, C, H, W], tokens [N, T, C] or a vector [N, D].
    - "pooled": the mean over positions, [N, C], in float32 at least; a vector unchanged.
    - "attention": [N, H, W], the mean over channels of squares, not normalised (Zagoruyko and
      Komodakis 2017, "Paying More Attention to Attention", section 3.1, with p = 2), in float32 at
      least. Tokens are laid out as by ``tokens_to_map``.

    Raises:
        ModelError: other dimensions, or the attention of a vector.
    """
    num_dims = features.dim()
    if num_dims not in (2, 3, 4) or (kind == "attention" and num_dims == 2):
        has_none = " for attention: a vector has no positions" if num_dims == 2 else ""
        raise ModelError(
            problem(
                f"features of shape {tuple(features.shape)}{has_none}",
                expected="a map [N, C, H, W], tokens [N, T, C] or, not for attention, [N, D]",
                mend="Tap another layer, or choose another kind.",
            )
        )
    if kind == "map" or num_dims == 2:
        return features
    if kind == "pooled":
        return features.mean(dim=(2, 3) if num_dims == 4 else 1, dtype=full_dtype(features))
    map_NCHW = features if num_dims == 4 else tokens_to_map(features)
    # Squares leave the range of float16 at 256.
    return map_NCHW.to(full_dtype(map_NCHW)).square().mean(dim=1)


def kind_shape(shape: Shape, kind: FeatureKind) -> Shape:
    """Return the shape of ``as_kind`` for features of this shape, both without the batch.

    Raises:
        ModelError: as ``as_kind``.
    """
    return tuple(as_kind(torch.empty(1, *shape, device="meta"), kind).shape[1:])


def tokens_to_map(tokens_NTC: Tensor) -> Tensor:
    """Return [N, C, H, W] of the tokens of a square grid, row by row.

    Where T is not a square but T - 1 is, the first token belongs to no position (the class token
    of Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words") and is left out.

    Raises:
        ModelError: neither T nor T - 1 is a square.
    """
    num_tokens = tokens_NTC.shape[1]
    for num_left_out in (0, 1):
        side = math.isqrt(num_tokens - num_left_out)
        if side > 0 and side**2 == num_tokens - num_left_out:
            grid_NCT = tokens_NTC[:, num_left_out:].transpose(1, 2)
            return grid_NCT.reshape(*grid_NCT.shape[:2], side, side)
    raise ModelError(
        problem(
            f"{num_tokens} tokens, shape {tuple(tokens_NTC.shape)}",
            expected="those of a square grid, with or without a class token before them",
            mend="Use kind pooled, or tap a layer that gives a map.",
        )
    )


def full_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or what is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
