"""Values that change over training: pure functions of progress, so there is nothing to resume."""

from __future__ import annotations

import math


def schedule_value(
    start: float, end: float, *, shape: str, progress: float, steps: tuple[float, ...] = ()
) -> float:
    """Return a scheduled weight or temperature.

    Args:
        start: value at progress 0.
        end: value at progress 1.
        shape: "constant" (start throughout), "linear", "cosine" (half a cosine wave) or "step".
        progress: share of training done, in [0, 1].
        steps: for "step": at each of these progresses the value moves an equal part towards end.
    """
    if shape == "constant":
        return start
    if shape == "linear":
        share = progress
    elif shape == "cosine":
        share = (1 - math.cos(math.pi * progress)) / 2
    elif shape == "step":
        share = sum(progress >= at for at in steps) / len(steps)
    else:
        raise ValueError(f"unknown schedule shape {shape!r}")
    return start + (end - start) * share


def learning_rate_factor(
    step: int, *, num_steps: int, shape: str, num_warmup_steps: int, final_factor: float
) -> float:
    """Return the factor on the peak learning rate for update ``step`` (from 0).

    Linear warm-up over ``num_warmup_steps``, then "constant", "cosine" (Loshchilov and Hutter 2017,
    one cycle) or "linear" down to ``final_factor``. "one_cycle" (Smith and Topin 2018) is the
    warm-up and the descent along half-cosines, starting at 1/25 of the peak.
    """
    if step < num_warmup_steps:
        share = (step + 1) / num_warmup_steps
        if shape == "one_cycle":
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * share)) / 2
        return share
    progress = (step - num_warmup_steps) / max(1, num_steps - 1 - num_warmup_steps)
    progress = min(1.0, progress)
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return 1 + (final_factor - 1) * progress
    if shape in ("cosine", "one_cycle"):
        return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2
    raise ValueError(f"unknown learning-rate schedule {shape!r}")
