"""What a run found out about early exits, as typed records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from understudy.report.strict import Strict


@dataclass(frozen=True)
class ExitRow(Strict):
    """One exit, shallow to deep.

    Attributes:
        layer: what its head reads; "last" for the network's own classifier.
        macs: multiply-adds of a picture that leaves here, the heads before included.
        num_params: in the file of this exit alone, of ``file_bytes``.
        median_ms: time of a picture that leaves here.
        threshold: least confidence to leave; above 1 nothing leaves; None for the last exit.
        temperature: of the confidence.
        validation_accuracy, test_accuracy: of this exit on all pictures of the split.
        share: of the test pictures that leave here, and ``leaver_accuracy`` on them.
    """

    layer: str
    macs: int
    num_params: int
    file_bytes: int
    median_ms: float
    threshold: float | None
    temperature: float
    validation_accuracy: float
    test_accuracy: float
    share: float
    leaver_accuracy: float | None


@dataclass(frozen=True)
class ExitPoint(Strict):
    """What a policy comes to."""

    accuracy: float
    mean_macs: float


@dataclass(frozen=True)
class ExitFacts(Strict):
    """Early exits of the student.

    Attributes:
        target, at_most: what the thresholds were chosen for, on the validation split.
        exits: shallow to deep.
        validation, test: the chosen policy on both splits.
        curve: the best accuracy for each mean cost, on the validation split.
        num_threads, num_timed_images: of the measured times, one picture a call.
        choice_mean_ms: of the file with the choice inside, over a mix of test pictures.
        last_mean_ms: of the last exit's file over the same pictures; means of medians.
        file_bytes: of the file with the choice inside.
    """

    target: Literal["accuracy_drop", "mean_macs", "mean_latency_ms"]
    at_most: float
    exits: tuple[ExitRow, ...]
    validation: ExitPoint
    test: ExitPoint
    curve: tuple[ExitPoint, ...]
    num_threads: int
    num_timed_images: int
    choice_mean_ms: float
    last_mean_ms: float
    file_bytes: int
