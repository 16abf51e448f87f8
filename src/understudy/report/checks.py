"""Coded checks (US001 and on): verdicts on a run, and the table that documents them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from understudy.report import compression_judges, judges
from understudy.report.judges import Finding, Status
from understudy.report.results import RunResults


@dataclass(frozen=True)
class Verdict:
    """What one check says about one run; ``mend`` says what to do about an issue or a tip."""

    code: str
    title: str
    status: Status
    message: str
    mend: str


@dataclass(frozen=True)
class Check:
    """One coded check. ``raised_when`` is for the documentation; ``judge`` is the check."""

    code: str
    title: str
    raised_when: str
    mend: str
    judge: Callable[[RunResults], Finding]


def run_checks(results: RunResults) -> tuple[Verdict, ...]:
    """Return the verdict of every check, in the order of their codes."""
    return tuple(run_check(check, results) for check in CHECKS)


def run_check(check: Check, results: RunResults) -> Verdict:
    """Return one check's verdict."""
    status, message = check.judge(results)
    return Verdict(check.code, check.title, status, message, check.mend)


def checks_table() -> list[dict[str, str]]:
    """Return code, title, raised_when and mend of every check, for the documentation."""
    return [
        {"code": c.code, "title": c.title, "raised_when": c.raised_when, "mend": c.mend}
        for c in CHECKS
    ]


CHECKS: tuple[Check, ...] = (
    Check(
        code="US001",
        title="Student better than control",
        raised_when=(
            "the student's test accuracy is not above the control's by more than two "
            "standard errors"
        ),
        mend=(
            "Try another temperature or KL weight, more views or epochs, a stronger "
            "teacher; more seeds or more test images make smaller differences visible."
        ),
        judge=judges.student_beats_control,
    ),
    Check(
        code="US002",
        title="Budget met",
        raised_when="a measured part of the budget is above its limit",
        mend="Choose a smaller model or input, or raise the limit in the recipe's budget.",
        judge=judges.budget_met,
    ),
    Check(
        code="US003",
        title="Budget measured",
        raised_when="a part of the budget was not measured",
        mend=(
            "Run the stage that measures it (export and measurement) or take the part out "
            "of the budget."
        ),
        judge=judges.budget_measured,
    ),
    Check(
        code="US004",
        title="No overfitting",
        raised_when=(
            "train accuracy is above validation accuracy by more than 5 points (issue from "
            "10) and two standard errors"
        ),
        mend=(
            "Use stronger views, more weight decay, label smoothing or fewer epochs; more "
            "data helps most."
        ),
        judge=judges.no_overfitting,
    ),
    Check(
        code="US005",
        title="Well calibrated",
        raised_when=(
            "the expected calibration error is more than 0.03 (issue from 0.05) above what "
            "chance gives"
        ),
        mend=(
            "Change label smoothing, the KL weight or its temperature, or divide the logits by a "
            "number that is fitted on validation."
        ),
        judge=judges.well_calibrated,
    ),
    Check(
        code="US006",
        title="Teacher better than student",
        raised_when="the teacher's test accuracy is below the student's",
        mend="Use a better teacher or check its input normalisation, class order and colour order.",
        judge=judges.teacher_beats_student,
    ),
    Check(
        code="US007",
        title="Teacher strong",
        raised_when=(
            "the teacher is near the rate of always guessing the largest class, or less "
            "than half way from there to perfect (tip)"
        ),
        mend=(
            "Check the teacher's input normalisation, class order and colour order, or "
            "train a better one."
        ),
        judge=judges.teacher_is_strong,
    ),
    Check(
        code="US008",
        title="Data clean",
        raised_when=(
            "samples were skipped or reported, a class is empty, or the largest class has "
            "over 10 times the smallest (tip)"
        ),
        mend="Mend or drop the rows listed under Data; collect more of the rare classes.",
        judge=judges.data_is_clean,
    ),
    Check(
        code="US009",
        title="No class left behind",
        raised_when="the worst class is over 15 points and three standard errors below the mean",
        mend=(
            "Look at the confusion matrix and the pictures; check that class's labels, "
            "collect more of it."
        ),
        judge=judges.no_class_left_behind,
    ),
    Check(
        code="US010",
        title="Training settled",
        raised_when=(
            "validation accuracy still rises by over half a point, and beyond noise, in the"
            " last tenth of the epochs (tip)"
        ),
        mend="Train longer: raise the number of epochs.",
        judge=judges.training_has_settled,
    ),
    Check(
        code="US011",
        title="Export parity",
        raised_when=(
            "the exported file's outputs differ from the trained model's by more than the tolerance"
        ),
        mend="Compare layer by layer; try another opset, or export in float32.",
        judge=judges.parity_holds,
    ),
    Check(
        code="US012",
        title="Training finite",
        raised_when="training was rolled back after a loss or gradient that was not finite",
        mend="Lower the learning rate, set training.clip_norm, or training.precision to float32.",
        judge=judges.training_was_finite,
    ),
    Check(
        code="US013",
        title="Teacher targets soft",
        raised_when=(
            "the teacher's largest probability is above 99 % on average over the training "
            "views (tip)"
        ),
        mend="Raise the temperature, or use stronger views or mixing so that the targets say more.",
        judge=judges.teacher_not_saturated,
    ),
    Check(
        code="US014",
        title="Control present",
        raised_when="no control was trained",
        mend="Turn the control on in the recipe.",
        judge=judges.control_exists,
    ),
    Check(
        code="US015",
        title="Accuracy precise",
        raised_when="two standard errors of the student's test accuracy are over 2 points (tip)",
        mend="Use more test images or several seeds before trusting small differences.",
        judge=judges.accuracy_is_precise,
    ),
    Check(
        code="US016",
        title="Compression kept",
        raised_when="a step of compression lost more than its gates allow and was taken back",
        mend="Ask for less in one step, fine-tune longer, or allow more float layers.",
        judge=compression_judges.steps_are_kept,
    ),
    Check(
        code="US017",
        title="Pruned student faster",
        raised_when="a pruned student is not faster, beyond noise, in a runtime of its release",
        mend="Prune to multiples of 8 channels (round_to), or prune to a latency_ms.",
        judge=compression_judges.pruned_is_faster,
    ),
    Check(
        code="US018",
        title="Every artifact in budget",
        raised_when="a shipped artifact misses a limit, or a limit was not measured for it",
        mend="Compress further, leave that target out, or raise the limit.",
        judge=compression_judges.artifacts_keep_the_budget,
    ),
    Check(
        code="US019",
        title="Every artifact run",
        raised_when=(
            "a target failed, so that nothing was made of it; or a shipped artifact cannot be run "
            "on this machine (tip)"
        ),
        mend=(
            "Mend what the reason says or leave the target out; run an artifact where its runtime "
            "is, for instance with `understudy profile --host`."
        ),
        judge=compression_judges.artifacts_ran,
    ),
    Check(
        code="US020",
        title="Int8 keeps its accuracy",
        raised_when=(
            "an int8 file loses more accuracy in its runtime, against the float student on the "
            "same pictures, than compression.gates.accuracy_drop allows"
        ),
        mend=(
            "Quantise with method aware, give more calibration pictures, leave that target or its "
            "int8 out, or raise the gate."
        ),
        judge=compression_judges.int8_keeps_its_accuracy,
    ),
)
