"""What a recipe says about teaching: losses, their weights and balance, and the curriculum.

Importing this module does not import torch.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from understudy.settings import Section
from understudy.train.loss_table import LOSSES, LossFacts, Reads, argument_problem
from understudy.train.settings import Schedule, Share, Temperature, Weight

FeatureKind = Literal["map", "pooled", "attention"]


class LayerPair(Section):
    """A layer of the student and the teacher's layer that it learns from."""

    student: Annotated[
        str, Field(description="Module path, or `embedding`: what the classifier reads.")
    ] = "embedding"
    teacher: Annotated[
        str,
        Field(description="The same; with several teachers `2/layer3` is the second's `layer3`."),
    ] = "embedding"


class LossSettings(Section):
    """One more loss beside KL and cross-entropy."""

    weight: Annotated[
        Weight | None, Field(description="A number or a schedule; null: the loss's own.")
    ] = None
    layers: Annotated[
        tuple[LayerPair, ...],
        Field(
            description="For losses on features; empty: the embeddings of both, which have no "
            "positions."
        ),
    ] = ()
    adapter: Annotated[
        Literal["auto", "conv1x1", "linear", "none"],
        Field(description="Brings the student's width to the teacher's; trained, not exported."),
    ] = "auto"
    keep: Annotated[
        FeatureKind | None,
        Field(description="What is stored of the teacher's layers; null: what the loss reads."),
    ] = None
    arguments: Annotated[
        dict[str, float], Field(default_factory=dict, description="Of the loss function.")
    ]


class Balance(Section):
    """How the weights of the terms are adjusted while training; a method's name alone will do."""

    method: Annotated[
        Literal["fixed", "validation", "uncertainty", "gradient_norm"],
        Field(
            description="`validation`: soft against hard weight by validation loss; `uncertainty`: "
            "learned variances (Kendall et al. 2018); `gradient_norm`: every term's gradient as "
            "large as its weight says (after Chen et al. 2018)."
        ),
    ] = "fixed"
    times: Annotated[
        tuple[Share, ...],
        Field(
            min_length=1,
            description="`validation`: shares of training; the first validation at or after each "
            "adjusts the weights.",
        ),
    ] = (0.2, 0.4, 0.6, 0.8)
    step: Annotated[
        float,
        Field(gt=1, description="`validation`: factor by which soft over hard weight is moved."),
    ] = 1.5
    every_steps: Annotated[
        int, Field(gt=0, description="`gradient_norm`: updates between two measurements.")
    ] = 50
    smoothing: Annotated[
        float,
        Field(ge=0, lt=1, description="`gradient_norm`: share of the former norms that stays."),
    ] = 0.5

    @model_validator(mode="before")
    @classmethod
    def _method_alone(cls, value: Any) -> Any:
        """``balance: validation`` is that method with its defaults."""
        return {"method": value} if isinstance(value, str) else value


class Curriculum(Section):
    """Which samples are shown when. Every epoch has the same number of updates."""

    difficulty: Annotated[
        Literal["margin", "entropy", "loss", "student_loss"],
        Field(
            description="Of the teacher's stored outputs: small `margin` between the label and the "
            "best other class, `entropy`, `loss`; or the student's own loss of its last looks."
        ),
    ] = "loss"
    pacing: Annotated[
        Literal["linear", "root", "step", "self_paced"],
        Field(
            description="How the share of samples grows from the easiest to all (`linear`, `root`: "
            "Platanios et al. 2019; `step`: Hacohen and Weinshall 2019); `self_paced`: those of a "
            "loss below a threshold that grows (Kumar et al. 2010)."
        ),
    ] = "root"
    start: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Share of the samples in the first epoch. By the student's own loss that "
            "is the second: the first shows all.",
        ),
    ] = 0.3
    full_at: Annotated[
        float, Field(gt=0, le=1, description="Share of training after which all are shown.")
    ] = 0.5
    num_steps: Annotated[int, Field(gt=0, description="`step`: number of rises.")] = 4
    memory: Annotated[
        float,
        Field(ge=0, lt=1, description="`student_loss`: share of the former loss that stays."),
    ] = 0.5

    @model_validator(mode="after")
    def _self_paced_by_own_loss(self) -> Curriculum:
        if (self.pacing == "self_paced") and self.difficulty != "student_loss":
            raise ValueError("pacing self_paced goes by the student's own loss: student_loss")
        return self


class DistillSettings(Section):
    """The combined loss: ``kl_weight * T^2 * KL + ce_weight * cross-entropy`` and more terms.

    The paper's convention is weights a and 1 - a, and its default (their mean) is a half each.
    """

    kl_weight: Annotated[Weight, Field(description="A number or a schedule.")] = 0.9
    ce_weight: Annotated[Weight, Field(description="A number or a schedule.")] = 0.1
    temperature: Annotated[Temperature, Field(description="A number or a schedule.")] = 4.0
    losses: Annotated[
        dict[str, LossSettings],
        Field(description="More losses by name (table below)."),
    ] = Field(default_factory=dict)
    teacher_share: Annotated[
        Weight,
        Field(
            description="Factor on every weight but that of cross-entropy, which gets what is "
            "missing to 1: a schedule down to 0 ends in training with labels alone."
        ),
    ] = 1.0
    balance: Balance = Balance()
    curriculum: Annotated[
        Curriculum | None, Field(description="null: all samples in every epoch.")
    ] = None

    @field_validator("losses", mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        """In YAML ``rkd:`` with nothing after it means its defaults."""
        if isinstance(value, dict):
            return {name: {} if item is None else item for name, item in value.items()}
        return value

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillSettings:
        problems = [text for name in self.losses for text in _loss_problems(name, self.losses)]
        if self.kl_weight == 0 and self.ce_weight == 0 and not self.losses:
            problems.append("kl_weight and ce_weight are both 0: there is nothing to learn")
        share = self.teacher_share
        if max((share.start, share.end) if isinstance(share, Schedule) else (share,)) > 1:
            problems.append("teacher_share must lie in 0 to 1")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _loss_problems(name: str, losses: dict[str, LossSettings]) -> list[str]:
    """Return what is wrong with one loss of a recipe, given its name and settings."""
    if name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f", did you mean {near[0]}" if near else ""
        return [f"unknown loss {name!r}{hint} (known: {', '.join(LOSSES)})"]
    facts, settings = LOSSES[name], losses[name]
    problems = [
        f"{name} has no argument {argument!r} (it has: {', '.join(facts.arguments) or 'none'})"
        for argument in settings.arguments
        if argument not in facts.arguments
    ]
    problems += [
        f"{name}.arguments.{argument} is {value:g}, expected {expected}"
        for argument, value in settings.arguments.items()
        if argument in facts.arguments and (expected := argument_problem(argument, value))
    ]
    if facts.reads == "logits" and (settings.layers or settings.keep):
        problems.append(f"{name} reads logits: drop layers and keep")
    if facts.one_layer and len(settings.layers) > 1:
        problems.append(f"{name} takes one pair of layers, not {len(settings.layers)}")
    if settings.keep not in (None, facts.reads, *_also_read(facts)):
        problems.append(f"{name} cannot be computed from keep {settings.keep!r}")
    return problems


def _also_read(facts: LossFacts) -> tuple[Reads, ...]:
    """Return the kinds of features that serve besides the usual one."""
    others: dict[Reads, tuple[Reads, ...]] = {
        "attention": ("map",),
        "pooled": ("map",),
        "map": () if facts.needs_positions else ("pooled",),
    }
    return others.get(facts.reads, ())


def layers_of(settings: LossSettings) -> tuple[LayerPair, ...]:
    """Return the pairs of layers that a loss on features compares."""
    return settings.layers or (LayerPair(),)


def kept_kind(name: str, settings: LossSettings) -> FeatureKind:
    """Return what has to be kept of the teacher's layers for a loss on features."""
    reads = LOSSES[name].reads
    assert reads != "logits", f"{name} reads no features"
    return settings.keep or reads


def compared_kind(name: str, settings: LossSettings) -> FeatureKind:
    """Return the form in which a loss on features compares what was kept.

    A loss on attention makes it of the maps or tokens where those are kept: tokens as they are
    would pass for attention over tokens times channels.
    """
    return "attention" if LOSSES[name].reads == "attention" else kept_kind(name, settings)
