"""Structured pruning: whole channels are removed until a network keeps given limits.

    goal = PruneGoal(num_macs=20_000_000)
    pruned, report = prune(model, example_NCHW, goal=goal, rule=PruneRule(round_to=8))

The pruned network is an ordinary, smaller network of the same class. It is stored as its weights
and ``report.shapes_after``, and restored with ``models.reshape.apply_channel_shapes``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from understudy.compress.prune_cuts import ExactnessTrial, without_channels
from understudy.compress.prune_groups import (
    ChannelGroup,
    GroupImportance,
    find_groups,
    torch_pruning,
    union_of_cuts,
)
from understudy.compress.prune_records import (
    NetworkSize,
    PruneGoal,
    PruneReport,
    PruneRule,
    RoundReport,
)
from understudy.compress.prune_search import LIMITS, Measure, Search, network_size
from understudy.errors import InputError, ModelError, problem
from understudy.models.reshape import channel_shapes

__all__ = [
    "NetworkSize",
    "PruneGoal",
    "PruneReport",
    "PruneRule",
    "RoundReport",
    "check_reachable",
    "network_size",
    "prune",
    "prune_round",
    "round_goals",
]

# Leaves gradients of a loss in the parameters of the network it is given (a copy).
Score = Callable[[nn.Module], object]
# Gets the pruned network and the number of its round, from 0; None: trained in place.
Finetune = Callable[[nn.Module, int], nn.Module | None]


def prune(
    model: nn.Module,
    example_NCHW: Tensor,
    *,
    goal: PruneGoal,
    rule: PruneRule = PruneRule(),  # noqa: B008 (frozen)
    num_rounds: int = 1,
    finetune: Finetune | None = None,
    score: Score | None = None,
    measure: Measure | None = None,
) -> tuple[nn.Module, PruneReport]:
    """Remove the least important channels until the network keeps every limit of the goal.

    Each round goes the same factor of the way (``round_goals``), ranks the channels anew, removes
    as few of the ranking as the round's goal allows, and is fine-tuned. What is left computes what
    the network computed with the removed channels at zero. The logits and the input channels stay,
    as do layers without which that does not hold (shortcuts that pad channels, norms over
    channels, attention heads); ``RoundReport.fixed`` says why.

    Args:
        model: from pictures to logits; it stays as it is. May be a ``NormalizedModel``.
        example_NCHW: a picture or some, as the model takes them; their number does not matter.
        goal: the limits.
        rule: the ranking.
        num_rounds: at least 1.
        finetune: called after each round's pruning.
        score: for the importance "taylor", and needed there.
        measure: for the limit ``latency_ms``, and needed there. It gets networks in evaluation
            mode; a noisy one ends at a network that was measured within the limit, not surely at
            the largest.

    Returns:
        The pruned network, in the mode (training or evaluation) of ``model`` unless ``finetune``
        changed it, and what was done.

    Raises:
        InputError: a limit below what pruning can reach (found before the first round), or
            missing functions.
        ModelError: the network cannot be traced, or its weights are not finite.
        MissingExtraError: Torch-Pruning is not installed.
    """
    size = network_size(model, example_NCHW, measure=measure)
    goals = round_goals(size, goal, num_rounds)
    _check_functions(goal, rule, score=score, measure=measure)
    if num_rounds > 1 or finetune is not None:  # before hours of training
        check_reachable(model, example_NCHW, goal=goal, rule=rule, measure=measure)
    rounds = []
    for number, round_goal in enumerate(goals):
        model, report = prune_round(
            model, example_NCHW, goal=round_goal, rule=rule, score=score, measure=measure
        )
        rounds.append(report)
        if finetune is not None:
            model = _finetuned(model, finetune, number)
    return model, PruneReport(goal, rule, tuple(rounds))


def check_reachable(
    model: nn.Module,
    example_NCHW: Tensor,
    *,
    goal: PruneGoal,
    rule: PruneRule = PruneRule(),  # noqa: B008 (frozen)
    measure: Measure | None = None,
) -> None:
    """Raise the ``InputError`` of a limit that pruning cannot reach, in however many rounds.

    Arguments and errors as for ``prune``, which calls this before the first of several rounds.
    """
    # What can be reached does not depend on the ranking, so that no gradients are needed.
    any_rule = replace(rule, importance="l1") if rule.importance == "taylor" else rule
    _check_functions(goal, any_rule, score=None, measure=measure)
    trial = ExactnessTrial(model, example_NCHW)
    groups, fixed = _ranked_groups(model, example_NCHW, trial, any_rule)
    Search(model, example_NCHW, groups, rule, measure).check_reachable(goal, fixed)


def prune_round(
    model: nn.Module,
    example_NCHW: Tensor,
    *,
    goal: PruneGoal,
    rule: PruneRule = PruneRule(),  # noqa: B008 (frozen)
    score: Score | None = None,
    measure: Measure | None = None,
) -> tuple[nn.Module, RoundReport]:
    """Prune once, without fine-tuning: a function of the weights and the arguments alone.

    A caller that stores each round calls ``check_reachable`` first, then this with the goals of
    ``round_goals``, and makes the ``PruneReport`` of the rounds. Arguments, results and errors as
    for ``prune``.
    """
    _check_functions(goal, rule, score=score, measure=measure)
    before = network_size(model, example_NCHW, measure=measure)
    trial = ExactnessTrial(model, example_NCHW)
    groups, fixed = _ranked_groups(
        model, example_NCHW, trial, rule, score=score if rule.importance == "taylor" else None
    )
    search = Search(model, example_NCHW, groups, rule, measure)
    kept = search.smallest(goal, fixed)
    removed = search.removed(kept)
    cuts = union_of_cuts(removed)
    pruned = without_channels(model, cuts)
    difference = trial.difference(cuts)
    if difference is not None:
        raise ModelError(
            problem(
                f"pruning {', '.join(group.name for group in groups)}: {difference}",
                expected="layers that can be pruned together",
                mend="Ignore some of these layers.",
            )
        )
    counts = {group.name: group.num_units * group.channels_per_unit for group in groups}
    gone = {group.name: group.channels(units) for group, units in removed}
    return pruned, RoundReport(
        goal=goal,
        before=before,
        after=search.size(kept, with_latency=True),
        channels_before=counts,
        channels_after={name: count - len(gone[name]) for name, count in counts.items()},
        removed=gone,
        fixed=fixed,
        shapes_before=channel_shapes(model),
        shapes_after=channel_shapes(pruned),
    )


def round_goals(size: NetworkSize, goal: PruneGoal, num_rounds: int) -> tuple[PruneGoal, ...]:
    """Return the goal of each round: equal factors from the network's size, the goal at last.

    Raises:
        InputError: ``num_rounds`` below 1.
    """
    if num_rounds < 1:
        raise InputError(
            problem(
                f"pruning in {num_rounds} rounds",
                expected="at least 1",
                mend="Give the number of rounds.",
            )
        )
    goals = []
    for number in range(1, num_rounds):
        limits: dict[str, float] = {}
        for name in LIMITS:
            start, end = getattr(size, name), getattr(goal, name)
            if end is not None:
                between = start is not None and start > end
                limits[name] = start * (end / start) ** (number / num_rounds) if between else end
                if name != "latency_ms":
                    limits[name] = math.ceil(limits[name])
        goals.append(replace(goal, **limits))  # type: ignore[arg-type]
    return (*goals, goal)


def _ranked_groups(
    model: nn.Module,
    example_NCHW: Tensor,
    trial: ExactnessTrial,
    rule: PruneRule,
    *,
    score: Score | None = None,
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups with an importance, and why the others cannot be pruned."""
    paths = {path for path, _ in model.named_modules()}
    unknown = [path for path in rule.ignored if path not in paths]
    if unknown:
        raise InputError(
            problem(
                f"ignored layers {', '.join(unknown)}",
                expected="paths of modules of the network",
                mend="Give them as named_modules() does.",
            )
        )
    traced = copy.deepcopy(model)
    traced.zero_grad(set_to_none=True)
    for parameter in traced.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if score is not None:
        with torch.enable_grad():
            score(traced)
    groups, fixed = find_groups(
        traced,
        example_NCHW,
        trial=trial,
        importance=_importance(rule, traced),
        ignored=tuple(rule.ignored),
    )
    for group in groups:
        if group.importance is None:
            fixed[group.name] = f"no {rule.importance} importance: no such layer has its channels"
    order = [path for path, _ in model.named_modules() if path in fixed]
    groups = [group for group in groups if group.importance is not None]
    return groups, {path: fixed[path] for path in order}


def _importance(rule: PruneRule, traced: nn.Module) -> GroupImportance:
    library = torch_pruning().importance
    if rule.importance == "taylor":  # the effect on the one loss: comparable between layers
        return GroupImportance(_effect_on_loss(traced), relative=False)
    if rule.importance == "batch_norm":
        return GroupImportance(library.BNScaleImportance(normalizer=None), relative=True)
    magnitude = library.GroupMagnitudeImportance(p=1, normalizer=None)
    return GroupImportance(magnitude, relative=True)


def _check_functions(
    goal: PruneGoal, rule: PruneRule, *, score: Score | None, measure: Measure | None
) -> None:
    problems = []
    if rule.importance == "taylor" and score is None:
        problems.append(
            problem(
                "importance taylor without a score function",
                expected="a function that leaves gradients of the loss in a network",
                mend="Give score, or choose the importance l1 or batch_norm.",
            )
        )
    if goal.latency_ms is not None and measure is None:
        problems.append(
            problem(
                "a limit on latency_ms without a measure function",
                expected="a function from a network to milliseconds",
                mend="Give measure, or limit num_macs.",
            )
        )
    if problems:
        raise InputError(*problems)


def _effect_on_loss(traced: nn.Module) -> Callable[[Any], Any]:
    """Return Torch-Pruning's first-order importance, with a check of the gradients it needs."""
    estimate = torch_pruning().importance.GroupTaylorImportance(normalizer=None)
    paths = {module: path for path, module in traced.named_modules()}

    def of_group(found: Any) -> Any:
        layers = {item.dep.target.module for item in found.items}
        lacking = [
            path
            for module, path in paths.items()
            if module in layers
            and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            and (module.weight.grad is None or not module.weight.grad.isfinite().all())
        ]
        if lacking:
            raise InputError(
                problem(
                    f"the score function left no finite gradient in {', '.join(lacking)}",
                    expected="a gradient in the weights of every layer that can be pruned",
                    mend="Let it call backward() on a loss of the network that it is given.",
                )
            )
        return estimate(found)

    return of_group


def _finetuned(model: nn.Module, finetune: Finetune, number: int) -> nn.Module:
    result = finetune(model, number)
    if result is None:
        return model
    if not isinstance(result, nn.Module):
        raise InputError(
            problem(
                f"fine-tuning after round {number} returned a {type(result).__name__}",
                expected="the network, or None where it was trained in place",
                mend="Correct the function that fine-tunes.",
            )
        )
    return result
