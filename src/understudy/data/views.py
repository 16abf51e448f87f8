"""Replayable views: view v of sample i is a pure function of (spec, seed, v, i, pixels).

Nothing else enters: not the batch a sample comes in, its order, the process, the device or what
was drawn before. That is what makes a teacher's output on an augmented picture storable once and
exact ever after. Images are uint8 and are rounded to uint8 after every transform, so that whoever
asks for a view sees the same picture bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from understudy.data.pixels import with_rows
from understudy.data.random import Draws, draw_words, stream_key, uniforms
from understudy.data.transforms_blur import jpeg_blocking, motion_blur
from understudy.data.transforms_color import (
    color_jitter,
    gaussian_noise,
    grayscale,
    low_light,
    reduced_depth,
)
from understudy.data.transforms_geometry import affine, cutout, flip, pad_crop, random_resized_crop
from understudy.data.transforms_mix import cutmix, mixup
from understudy.data.view_spec import check_spec, normalized_spec
from understudy.errors import DataError, RecipeError, problem

# Counts up whenever the same spec and seed give other pixels than before.
PIXELS_VERSION = 1

# Changes one picture: (images, draws, **parameters) -> images.
VIEW_TRANSFORMS: dict[str, Callable[..., torch.Tensor]] = {
    "pad_crop": pad_crop,
    "flip": flip,
    "random_resized_crop": random_resized_crop,
    "affine": affine,
    "color_jitter": color_jitter,
    "grayscale": grayscale,
    "reduced_depth": reduced_depth,
    "low_light": low_light,
    "motion_blur": motion_blur,
    "gaussian_noise": gaussian_noise,
    "jpeg_blocking": jpeg_blocking,
    "cutout": cutout,
}

# Mixes two pictures: (images, partner images, draws, **parameters) -> (images, own label weight).
VIEW_MIXINGS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "mixup": mixup,
    "cutmix": cutmix,
}

# Uniform draws per sample, besides the one that decides whether the sample is changed.
NUM_DRAWS = {
    "pad_crop": 2,
    "flip": 0,
    "random_resized_crop": 4,
    "affine": 5,
    "color_jitter": 4,
    "grayscale": 0,
    "reduced_depth": 0,
    "low_light": 3,
    "motion_blur": 2,
    "gaussian_noise": 1,
    "jpeg_blocking": 1,
    "cutout": 2,
    "mixup": 1,
    "cutmix": 3,
}
WORDS_PER_BLOCK = 4
# Which samples and views a transform changes, as against how it changes them.
COMMON_PARAMETERS = ("probability", "until_view")


@dataclass(frozen=True)
class _Step:
    name: str
    probability: float
    parameters: dict[str, Any]
    key: tuple[int, int]
    num_blocks: int
    until_view: int | None


@dataclass(frozen=True)
class _Chain:
    """Steps in a row, with the key and the number of each block that they draw."""

    steps: tuple[_Step, ...]
    keys_2B: NDArray[np.uint64]
    blocks_B: NDArray[np.uint64]


class Views:
    """The augmented views of a data set's samples, as ``spec`` describes them.

    ``partner_pool`` is an int64 tensor of the sample indices that mixing may draw partners from
    (the training samples). Raises RecipeError with all problems of the spec, DataError if the spec
    mixes and the pool is empty.

    A sample is mixed at most once: with both mixup and cutmix in the spec, the second may only
    change what the first has left. The partner of a sample depends on seed, view and sample; its
    picture is its own same view, with the transforms that stand before the mixing. Transforms
    after the mixing change the mixed picture and leave the label weight as it is.
    """

    def __init__(
        self, spec: Sequence[Mapping[str, Any]], *, seed: int, partner_pool: torch.Tensor
    ) -> None:
        problems = check_spec(spec)
        if problems:
            raise RecipeError(*problems)
        self.spec = normalized_spec(spec)
        self.seed = seed
        names = [name for entry in self.spec for name in entry]
        self.mixes = any(name in VIEW_MIXINGS for name in names)
        self._partner_pool = partner_pool.cpu().to(torch.int64).numpy()
        self._pool_hash = hashlib.sha256(self._partner_pool.tobytes()).hexdigest()
        if self.mixes and len(self._partner_pool) == 0:
            raise DataError(
                problem(
                    "mixing has no samples to draw partners from",
                    expected="at least one training sample",
                    mend="Leave mixup and cutmix out of the views, or check the splits.",
                )
            )
        steps = [_step(position, entry, seed) for position, entry in enumerate(self.spec)]
        mixing = [position for position, name in enumerate(names) if name in VIEW_MIXINGS]
        first, after = (mixing[0], mixing[-1] + 1) if mixing else (len(steps), len(steps))
        self._before, self._mixings = _chain(steps[:first]), _chain(steps[first:after])
        self._after = _chain(steps[after:])
        self._fitting_shapes: set[tuple[int, ...]] = set()
        self._partner_key = stream_key(seed, "views", "partner")

    def fingerprint(self, view: int) -> str:
        """Return a hex hash of all that the pixels of this view depend on, besides sample and data.

        What other views do does not count: another ``until_view`` leaves the hash of every view
        that it does not change.
        """
        spec = [_in_view(entry, view) for entry in self.spec]
        while spec and not spec[-1]:
            spec.pop()
        mixes = any(name in VIEW_MIXINGS for entry in spec for name in entry)
        content = {
            "pixels_version": PIXELS_VERSION,
            "spec": spec,
            "seed": self.seed,
            "partner_pool": self._pool_hash if mixes else None,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def partners(self, indices_N: torch.Tensor, view: int) -> torch.Tensor | None:
        """Return the sample that each one is mixed with, int64 [N] on the CPU; None if none is.

        Also a sample that this view leaves unmixed has a partner; its label weight is then 1.
        """
        if not self.mixes:
            return None
        key_21 = np.array([self._partner_key], np.uint64).T
        block_1 = np.zeros(1, np.uint64)
        words = draw_words(key_21, _as_indices(indices_N), view, block_1)[:, 0].astype(np.float64)
        # 53 random bits as a number below 1: every sample of the pool is equally likely.
        shares = words[:, 0] * 2.0**-32 + np.floor(words[:, 1] / 2048) * 2.0**-53
        rows = (shares * len(self._partner_pool)).astype(np.int64)
        return torch.from_numpy(self._partner_pool[rows])

    def apply(
        self,
        images_NCHW: torch.Tensor,
        indices_N: torch.Tensor,
        view: int,
        partner_images_NCHW: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (images, label weights): this view of untouched uint8 images NCHW.

        ``partner_images_NCHW`` are the untouched images of ``partners(indices_N, view)``, needed
        if ``mixes``. The weights of the own labels are float32 [N] on the images' device, or None
        without mixing. The inputs are not changed. Raises DataError for images it cannot use.
        """
        self._check(images_NCHW, indices_N, view, partner_images_NCHW)
        partners_N = self.partners(indices_N, view)
        indices = _as_indices(indices_N)
        if partners_N is None or partner_images_NCHW is None:
            return _transformed(images_NCHW, self._before, indices, view), None
        both = _transformed(
            torch.cat([images_NCHW, partner_images_NCHW]),
            self._before,
            np.concatenate([indices, partners_N.numpy()]),
            view,
        )
        own, partner = both[: len(images_NCHW)], both[len(images_NCHW) :]
        mixed, label_weight_N = _mixed(own, partner, self._mixings, indices, view)
        return _transformed(mixed, self._after, indices, view), label_weight_N

    def _check(
        self,
        images_NCHW: torch.Tensor,
        indices_N: torch.Tensor,
        view: int,
        partner_images_NCHW: torch.Tensor | None,
    ) -> None:
        shape = tuple(images_NCHW.shape)
        problems = []
        if images_NCHW.dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3):
            problems.append(
                problem(
                    f"views are given {images_NCHW.dtype} images of shape {shape}",
                    expected="uint8 images [N, C, H, W] of 1 or 3 channels",
                    mend="Give the images as they come from the data source.",
                )
            )
        elif self.spec and shape[1:] not in self._fitting_shapes:
            problems += check_spec(self.spec, image_shape=(shape[1], shape[2], shape[3]))
            if not problems:
                self._fitting_shapes.add(shape[1:])
        if not 0 <= view < 2**32:
            problems.append(
                problem(f"view is {view}", expected="0 to 2^32 - 1", mend="Count views from 0.")
            )
        if len(indices_N) != shape[0]:
            problems.append(
                problem(
                    f"views are given {shape[0]} images and {len(indices_N)} indices",
                    expected="one sample index per image",
                    mend="Give the indices that the images were read with.",
                )
            )
        if self.mixes and (partner_images_NCHW is None or partner_images_NCHW.shape != shape):
            problems.append(
                problem(
                    "views that mix are given no partner images, or not one per image",
                    expected="the images of views.partners(indices, view)",
                    mend="Read them from the same data source.",
                )
            )
        if problems:
            raise DataError(*problems)


def _step(position: int, entry: Mapping[str, Mapping[str, Any]], seed: int) -> _Step:
    [(name, parameters)] = entry.items()
    return _Step(
        name=name,
        probability=parameters["probability"],
        parameters={k: value for k, value in parameters.items() if k not in COMMON_PARAMETERS},
        key=stream_key(seed, "views", position, name),
        num_blocks=-(-(1 + NUM_DRAWS[name]) // WORDS_PER_BLOCK),
        until_view=parameters.get("until_view"),
    )


def _in_view(entry: Mapping[str, dict[str, Any]], view: int) -> dict[str, dict[str, Any]]:
    """Return a transform as it is in this view; {} keeps the place of one that is not in it."""
    [(name, parameters)] = entry.items()
    until_view = parameters.get("until_view")
    if until_view is not None and view >= until_view:
        return {}
    return {name: {key: value for key, value in parameters.items() if key != "until_view"}}


def _chain(steps: Sequence[_Step]) -> _Chain:
    keys = [step.key for step in steps for _ in range(step.num_blocks)]
    blocks = [block for step in steps for block in range(step.num_blocks)]
    return _Chain(tuple(steps), np.array(keys, np.uint64).T, np.array(blocks, np.uint64))


def _draw(
    chain: _Chain, indices_N: NDArray[np.int64], view: int
) -> list[tuple[_Step, NDArray[np.bool_], Draws]]:
    """Return every step, which samples it changes, bool [N], and what it drew.

    One pass for all steps: for a batch of small pictures the cost is in the number of calls.
    """
    words_NB4 = draw_words(chain.keys_2B, indices_N, view, chain.blocks_B)
    uniforms_NK = uniforms(words_NB4).reshape(len(indices_N), -1)
    drawn = []
    start = 0
    for step in chain.steps:
        stop = start + WORDS_PER_BLOCK * step.num_blocks
        own = Draws(uniforms_NK[:, start + 1 : stop], step.key, indices_N, view)
        in_view = step.until_view is None or view < step.until_view
        drawn.append((step, (uniforms_NK[:, start] < step.probability) & in_view, own))
        start = stop
    return drawn


def _transformed(
    images_NCHW: torch.Tensor, chain: _Chain, indices_N: NDArray[np.int64], view: int
) -> torch.Tensor:
    if not chain.steps or len(indices_N) == 0:
        return images_NCHW
    for step, changes_N, draws in _draw(chain, indices_N, view):
        transform = VIEW_TRANSFORMS[step.name]
        rows = np.flatnonzero(changes_N)
        if len(rows) == len(indices_N):
            images_NCHW = transform(images_NCHW, draws, **step.parameters)
        elif len(rows):
            some = images_NCHW.index_select(0, torch.from_numpy(rows).to(images_NCHW.device))
            changed = transform(some, draws.chosen(rows), **step.parameters)
            images_NCHW = with_rows(images_NCHW, rows, changed)
    return images_NCHW


def _mixed(
    images_NCHW: torch.Tensor,
    partner_images_NCHW: torch.Tensor,
    chain: _Chain,
    indices_N: NDArray[np.int64],
    view: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    device = images_NCHW.device
    label_weight_N = torch.ones(len(indices_N), device=device)
    if len(indices_N) == 0:
        return images_NCHW, label_weight_N
    unmixed_N = np.ones(len(indices_N), bool)
    for step, changes_N, draws in _draw(chain, indices_N, view):
        rows = np.flatnonzero(unmixed_N & changes_N)
        if len(rows) == 0:
            continue
        unmixed_N[rows] = False
        rows_M = torch.from_numpy(rows).to(device)
        mixed, weight_M = VIEW_MIXINGS[step.name](
            images_NCHW.index_select(0, rows_M),
            partner_images_NCHW.index_select(0, rows_M),
            draws.chosen(rows),
            **step.parameters,
        )
        images_NCHW = with_rows(images_NCHW, rows, mixed)
        label_weight_N[rows_M] = weight_M.to(device)
    return images_NCHW, label_weight_N


def _as_indices(indices_N: torch.Tensor) -> NDArray[np.int64]:
    indices: NDArray[np.int64] = indices_N.detach().cpu().to(torch.int64).numpy()
    return indices
