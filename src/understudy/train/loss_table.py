"""Every loss that a recipe can name: what it reads, its weight and arguments by default.

Importing this module does not import torch. ``terms.py`` holds the functions under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Reads = Literal["logits", "map", "attention", "pooled"]


@dataclass(frozen=True)
class LossFacts:
    """What the recipe and the store have to know of a loss.

    Attributes:
        reads: "logits", or the kind of feature that it takes of the teacher.
        weight: used where the recipe gives none.
        equal_widths: student and teacher must have as many channels, so an adapter is needed where
            they have not.
        needs_labels: makes no sense where two pictures are mixed, or without labels.
        one_layer: takes exactly one pair of layers.
        needs_positions: compares where features lie, which vectors such as embeddings do not say.
        arguments: name to default; None takes the temperature of the distillation.
    """

    reads: Reads
    weight: float = 1.0
    equal_widths: bool = False
    needs_labels: bool = False
    one_layer: bool = False
    needs_positions: bool = False
    arguments: Mapping[str, float | None] = field(default_factory=dict)


# What an argument of that name may be in any loss, and whether of a number.
ARGUMENT_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("temperature", "gamma", "peak_limit"), ("above 0", lambda v: v > 0)),
    **dict.fromkeys(
        ("mid_channels", "num_negatives", "embedding_size"),
        ("a whole number from 1", lambda v: v >= 1 and v == int(v)),
    ),
    "salient_share": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "background": ("between 0 and 1", lambda v: 0 < v < 1),
}
WEIGHT_RANGE: tuple[str, Callable[[float], bool]] = ("0 or more", lambda v: v >= 0)


def argument_problem(name: str, value: float) -> str | None:
    """Return what an argument should be, where it is not; None: it is right."""
    expected, holds = ARGUMENT_RANGES.get(name, WEIGHT_RANGE)
    return None if holds(value) else expected


# Weights: those of Tian et al. 2020 ("Contrastive representation distillation", appendix) where the
# loss is there, otherwise of its own paper; salient_attention and class_prior are ours.
LOSSES: dict[str, LossFacts] = {
    "dkd": LossFacts(
        "logits",
        needs_labels=True,
        arguments={"target_weight": 1.0, "nontarget_weight": 8.0, "temperature": 4.0},
    ),
    "dist": LossFacts(
        "logits", arguments={"inter_weight": 1.0, "intra_weight": 1.0, "temperature": 1.0}
    ),
    "standardized_kl": LossFacts("logits", arguments={"temperature": 2.0}),
    "mse_logits": LossFacts("logits"),
    "top_k_kl": LossFacts("logits", arguments={"temperature": None}),
    "class_prior": LossFacts(
        "logits", weight=0.1, needs_labels=True, arguments={"temperature": None}
    ),
    "hint": LossFacts("map", weight=100.0, equal_widths=True),
    "attention_transfer": LossFacts("attention", weight=1000.0, needs_positions=True),
    "nst": LossFacts("map", weight=50.0, needs_positions=True),
    "review": LossFacts(
        "map",
        weight=1.0,
        equal_widths=True,
        needs_positions=True,
        arguments={"mid_channels": 64.0},
    ),
    "vid": LossFacts("map", weight=1.0, equal_widths=True),
    "embedding_alignment": LossFacts(
        "pooled", equal_widths=True, arguments={"cosine_weight": 1.0, "mse_weight": 1.0}
    ),
    "salient_attention": LossFacts(
        "attention",
        needs_positions=True,
        arguments={"salient_share": 0.8, "peak_limit": 3.0, "background": 0.01},
    ),
    "similarity_preserving": LossFacts("pooled", weight=3000.0, one_layer=True),
    "rkd": LossFacts(
        "pooled",
        weight=1.0,
        one_layer=True,
        arguments={"distance_weight": 25.0, "angle_weight": 50.0},
    ),
    # 30000 for a mean over a table of batches of 64 there; here a mean over rows.
    "pkt": LossFacts("pooled", weight=470.0, one_layer=True),
    "correlation_congruence": LossFacts(
        "pooled", weight=0.02, one_layer=True, arguments={"gamma": 0.4}
    ),
    "crd": LossFacts(
        "pooled",
        weight=0.8,
        one_layer=True,
        arguments={"num_negatives": 16384.0, "embedding_size": 128.0},
    ),
}
