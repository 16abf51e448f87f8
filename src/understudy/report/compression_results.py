"""How a student was made smaller and what ships, as typed records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from understudy.report.strict import Strict

GateStatus = Literal["passed", "failed", "not_measured"]


@dataclass(frozen=True)
class GateFacts(Strict):
    """One gate of a step; ``loss`` is what got worse, None where it is not known."""

    name: str
    before: float | None
    after: float | None
    loss: float | None
    limit: float
    status: GateStatus


@dataclass(frozen=True)
class StepFacts(Strict):
    """One step of compression, on the validation split.

    Attributes:
        name: "prune" or "quantize", and how.
        kept: False where the step was taken back, for ``reason``.
        accuracy_before, accuracy: of what went in and of what came out.
        num_params, macs, file_bytes: of what came out, the file as ONNX.
        speedup: median time of a picture in ONNX Runtime with one thread, before over after;
            ``speedup_quartiles`` over neighbouring pairs of runs. None where not measured.
        judged_later: limits on shipped files that could not be told of after the step.
    """

    name: str
    kept: bool
    reason: str
    gates: tuple[GateFacts, ...]
    accuracy_before: float
    accuracy: float
    num_params: int
    macs: int | None
    file_bytes: int
    speedup: float | None = None
    speedup_quartiles: tuple[float, float] | None = None
    float_layers: tuple[str, ...] = ()
    seconds: float = 0.0
    judged_later: tuple[str, ...] = ()


@dataclass(frozen=True)
class BudgetLine(Strict):
    """One limit of the budget and what was found; ``unit`` is that of both numbers."""

    name: str
    limit: float
    unit: str
    status: Literal["passed", "failed", "not_measured"]
    measured: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class ArtifactFacts(Strict):
    """One shipped set of files, on the test split and in its own runtime.

    Attributes:
        accuracy, agreement, max_abs_difference, mean_abs_difference: None where it cannot be run
            here (see ``notes``).
        agreement: share of pictures with the class that the network before export says.
        max_abs_difference, mean_abs_difference: of the logits from that network's.
        p50_ms, p95_ms: of one picture with one thread.
        facts: what the target says of its files: flash and RAM bytes, arena bytes, instructions.
        float_accuracy: of the float student that went into int8, on the same pictures; None of
            float32 files.
    """

    target: str
    precision: str
    size_bytes: int
    accuracy: float | None
    num_images: int
    agreement: float | None
    max_abs_difference: float | None
    p50_ms: float | None
    p95_ms: float | None
    load_ms: float | None
    peak_memory_bytes: int | None
    energy: dict[str, Any] | None
    facts: dict[str, Any]
    notes: tuple[str, ...]
    budget: tuple[BudgetLine, ...] = ()
    mean_abs_difference: float | None = None
    float_accuracy: float | None = None

    @property
    def name(self) -> str:
        """Target and precision in one word."""
        return f"{self.target}/{self.precision}"

    @property
    def accuracy_change(self) -> float | None:
        """Accuracy less that of the float student; None where one of the two is not known."""
        if self.accuracy is None or self.float_accuracy is None:
            return None
        return self.accuracy - self.float_accuracy


@dataclass(frozen=True)
class FailedTarget(Strict):
    """A target that was asked for and of which nothing could be made."""

    target: str
    precision: str
    reason: str

    @property
    def name(self) -> str:
        """Target and precision in one word."""
        return f"{self.target}/{self.precision}"


@dataclass(frozen=True)
class PrunedSpeed(Strict):
    """What all pruning is worth in one runtime that the student is released for.

    Attributes:
        speedup: median time of a picture with one thread, of the unpruned student over the pruned
            one; ``quartiles`` over ``num_rounds`` neighbouring pairs of runs. None where not
            measured, for ``reason``.
        before_ms, after_ms: those times.
    """

    target: str
    precision: str
    speedup: float | None = None
    quartiles: tuple[float, float] | None = None
    num_rounds: int | None = None
    before_ms: float | None = None
    after_ms: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Target and precision in one word."""
        return f"{self.target}/{self.precision}"


@dataclass(frozen=True)
class CompressionFacts(Strict):
    """Everything between the trained student and the files that ship.

    Attributes:
        failed: what was asked for and could not be made.
        pruned: the runtimes of the release, where channels were pruned.
        max_int8_loss: the most accuracy that an int8 file may lose; None: not checked.
    """

    steps: tuple[StepFacts, ...]
    artifacts: tuple[ArtifactFacts, ...]
    device: str | None = None
    max_int8_loss: float | None = None
    failed: tuple[FailedTarget, ...] = ()
    pruned: tuple[PrunedSpeed, ...] = ()
