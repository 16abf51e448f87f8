"""Candidate students: networks drawn from the families' widths, depths, kernels and strides.

Importing this does not import torch: a candidate is a name and arguments of the model catalog.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from understudy.runtime import derive_seed

Architecture = tuple[str, dict[str, Any]]
# Fewer pixels a side than this are not halved again.
SMALLEST_SIDE = 4
WIDTHS = (8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256)


def drawn_architectures(
    families: tuple[str, ...], *, seed: int, side: int, largest: int = WIDTHS[-1]
) -> Iterator[Architecture]:
    """Yield architectures without end, families in turn; one may come again.

    The n-th one is a function of seed and n alone.

    Args:
        families: names of ``FAMILIES``.
        side: height or width of the pictures, the smaller one: how often it may be halved.
        largest: width that no layer exceeds; at least the smallest of ``WIDTHS``.
    """
    number = 0
    while True:
        generator = random.Random(derive_seed(seed, "design", number))
        name = families[number % len(families)]
        yield name, FAMILIES[name](generator, side, largest)
        number += 1


def strides_of(generator: random.Random, num_stages: int, side: int) -> list[int]:
    """Return a stride for each stage: some of them halve the picture, never below 4 pixels."""
    most = max(0, min(num_stages, int(math.log2(max(1, side / SMALLEST_SIDE)))))
    fewest = min(most, 1)
    halved = set(generator.sample(range(num_stages), generator.randint(fewest, most)))
    return [2 if stage in halved else 1 for stage in range(num_stages)]


def growing_widths(generator: random.Random, count: int, *, largest: int) -> list[int]:
    """Return widths that do not shrink from stage to stage."""
    known = [width for width in WIDTHS if width <= largest]
    return sorted(generator.choices(known, k=count))


def separable(generator: random.Random, side: int, largest: int) -> dict[str, Any]:
    """Draw a depthwise-separable network."""
    num_stages = generator.randint(3, 6)
    widths = growing_widths(generator, num_stages, largest=min(128, largest))
    # The stem looks at every pixel; later stages halve.
    strides = [1, *strides_of(generator, num_stages - 1, side)]
    return {
        "stages": [list(pair) for pair in zip(widths, strides, strict=True)],
        "depth": generator.randint(1, 3),
        "kernel": generator.choice((3, 3, 5)),
        "residual": generator.random() < 0.5,
    }


def inverted(generator: random.Random, side: int, largest: int) -> dict[str, Any]:
    """Draw an inverted residual network: stages of like blocks, some run more than once."""
    num_stages = generator.randint(2, 4)
    stem, *widths = growing_widths(generator, num_stages + 1, largest=min(96, largest))
    strides = strides_of(generator, num_stages, side)
    blocks = []
    for before, width, stride in zip([stem, *widths], widths, strides, strict=False):
        expansion = generator.choice((1, 1, 2, 3))
        # What the first block does to a stage is another matter than what the others do in it.
        first_kernel, kernel = generator.choice((3, 3, 5)), generator.choice((3, 3, 5))
        depth = generator.randint(1, 4)
        passes = generator.choice((1, 1, 2, 3, 4))
        keeps_shape = stride == 1 and width == before
        blocks.append([width, stride, expansion, first_kernel, passes if keeps_shape else 1])
        blocks += [[width, 1, expansion, kernel, passes] for _ in range(depth - 1)]
    return {
        "stem": [stem, 1],
        "blocks": blocks,
        "squeeze": generator.choice((0, 4, 8)),
        "head": generator.choice((0, 0, 32, 64)),
        "activation": generator.choice(("relu", "hardswish")),
    }


def resnet(generator: random.Random, side: int, largest: int) -> dict[str, Any]:
    """Draw a residual network of basic blocks."""
    growth = generator.choice((1.5, 2.0))
    firsts = [first for first in (6, 8, 12, 16, 24, 32) if first * growth**2 <= largest]
    first = generator.choice([4, *firsts])
    return {
        "depth": generator.choice((8, 14, 20)),
        "widths": [first, round(first * growth), round(first * growth**2)],
        "shortcut": generator.choice(("pad", "conv")),
    }


def paper_student(generator: random.Random, side: int, largest: int) -> dict[str, Any]:
    """Draw a network of two full convolutions."""
    return {
        "channels": generator.choice([w for w in WIDTHS if w <= min(64, largest)]),
        "hidden": generator.choice((16, 30, 64)),
        "dropout": generator.choice((0.0, 0.1, 0.2)),
    }


FAMILIES: dict[str, Callable[[random.Random, int, int], dict[str, Any]]] = {
    "separable": separable,
    "inverted": inverted,
    "resnet": resnet,
    "paper_student": paper_student,
}
