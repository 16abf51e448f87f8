"""What the coded checks look at: one pure function a check, from results to a finding.

A check that lacks its input is ``skipped`` and one that does not concern the run is
``not_applicable``: "not measured" never reads as "fine".
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

from understudy.report.formats import count, decimal, fixed, percent, points, quantity, significant
from understudy.report.results import ROLES, Role, RunResults
from understudy.report.sampling import (
    NUM_STANDARD_ERRORS,
    Difference,
    accuracy_difference,
    calibration_noise,
    line_fit,
    rate_standard_error,
)

Status = Literal["passed", "issue", "tip", "not_applicable", "skipped"]
Finding = tuple[Status, str]

OVERFIT_TIP, OVERFIT_ISSUE = 0.05, 0.10
CALIBRATION_TIP, CALIBRATION_ISSUE = 0.03, 0.05
WEAK_TEACHER = 0.5
IMBALANCE = 10.0
WORST_CLASS_GAP = 0.15
MIN_EPOCHS_FOR_TREND = 12
TREND_GAIN = 0.005
SATURATED = 0.99
WIDE_ERROR = 0.02
NO_TEACHER: Finding = ("not_applicable", "The recipe has no teacher.")


def lacking(role: Role) -> Finding:
    """Return the finding of a check that needs a role's test metrics and has none."""
    return "skipped", f"The {role} was not evaluated on the test split."


def with_margin(difference: Difference) -> str:
    """Return a difference of accuracies and what chance explains of it."""
    return f"{points(difference.value)} (± {fixed(100 * difference.margin, 2)})"


def student_beats_control(results: RunResults) -> Finding:
    """US001: is the student's accuracy above the control's by more than chance?"""
    student, control = results.test("student"), results.test("control")
    if student is None:
        return lacking("student")
    if control is None:
        text = f"There is no control, so nobody knows what {results.teaching} was worth."
        return "skipped", text
    difference = accuracy_difference(student, control, paired=results.student_vs_control)
    text = f"{with_margin(difference)} against the control on {count(student.num_samples)} images"
    if difference.is_noise:
        return "issue", f"The student is not shown to be better: {text}, which is within noise."
    if difference.value < 0:
        return "issue", f"The student is worse than the control: {text}."
    return "passed", f"The student is better: {text}, seed {results.seed}."


def budget_met(results: RunResults) -> Finding:
    """US002: is every measured part of the budget met?"""
    if not results.budget:
        return "not_applicable", "No budget was given."
    missed = [
        f"{line.name} is {quantity(line.measured, line.unit)}, "
        f"at most {quantity(line.limit, line.unit)} was asked for"
        for line in results.budget
        if line.status == "failed"
    ]
    if missed:
        return "issue", f"Missed: {'; '.join(missed)}."
    num_met = sum(line.status == "passed" for line in results.budget)
    if num_met == 0:
        return "skipped", "No part of the budget was measured."
    return (
        "passed",
        f"{num_met} of {len(results.budget)} parts of the budget were measured and met.",
    )


def budget_measured(results: RunResults) -> Finding:
    """US003: was every part of the budget measured?"""
    if not results.budget:
        return "not_applicable", "No budget was given."
    names = [line.name for line in results.budget if line.status == "not_measured"]
    if names:
        return "issue", f"Not measured, so not shown to be met: {', '.join(names)}."
    return "passed", "Every part of the budget was measured."


def no_overfitting(results: RunResults) -> Finding:
    """US004: is the student's last train accuracy close to its validation accuracy?"""
    train = results.curve("student", "train_accuracy")
    validation = results.curve("student", "validation_accuracy")
    if not train or not validation:
        return "skipped", "The student's train or validation accuracy was not logged."
    gap = train[-1][1] - validation[-1][1]
    num_samples = results.data.num_samples.get("validation", 0)
    noise = NUM_STANDARD_ERRORS * rate_standard_error(validation[-1][1], num_samples)
    text = (
        f"train {percent(train[-1][1])} (on the views it was trained on), "
        f"validation {percent(validation[-1][1])}, gap {points(gap)}"
    )
    if gap > OVERFIT_TIP + noise:
        status: Status = "issue" if gap > OVERFIT_ISSUE + noise else "tip"
        return status, f"The student fits its training images better than new ones: {text}."
    return "passed", f"No overfitting to speak of: {text}."


def well_calibrated(results: RunResults) -> Finding:
    """US005: do the student's confidences match how often it is right?"""
    student = results.test("student")
    if student is None:
        return lacking("student")
    noise = calibration_noise(student.calibration_bins)
    filled = [item for item in student.calibration_bins if item.confidence is not None]
    total = sum(item.count for item in filled)
    confidence = sum((item.confidence or 0.0) * item.count for item in filled) / max(total, 1)
    direction = "too sure" if confidence > student.accuracy else "not sure enough"
    text = (
        f"expected calibration error {decimal(student.ece)}, of which "
        f"{decimal(noise)} is to be expected by chance"
    )
    if student.ece - noise > CALIBRATION_TIP:
        status: Status = "issue" if student.ece - noise > CALIBRATION_ISSUE else "tip"
        return status, f"The student is {direction} of itself: {text}."
    return "passed", f"The student's confidence can be trusted: {text}."


def teacher_beats_student(results: RunResults) -> Finding:
    """US006: is the teacher better than the student it teaches?"""
    teacher, student = results.test("teacher"), results.test("student")
    if not results.has_teacher:
        return NO_TEACHER
    if teacher is None or student is None:
        return lacking("teacher" if teacher is None else "student")
    difference = accuracy_difference(teacher, student)
    text = f"{with_margin(difference)} against the student"
    if difference.value < 0:
        status: Status = "tip" if difference.is_noise else "issue"
        return status, f"The teacher is worse than the student: {text}."
    return "passed", f"The teacher is at least as good: {text}."


def teacher_is_strong(results: RunResults) -> Finding:
    """US007: is the teacher well above what guessing gets?"""
    teacher = results.test("teacher")
    if not results.has_teacher:
        return NO_TEACHER
    if teacher is None:
        return lacking("teacher")
    counts = [sum(row) for row in teacher.confusion]
    chance = max(counts) / max(sum(counts), 1)
    margin = NUM_STANDARD_ERRORS * rate_standard_error(chance, teacher.num_samples)
    text = f"{percent(teacher.accuracy)}, always guessing the largest class gets {percent(chance)}"
    if teacher.accuracy <= chance + margin:
        return "issue", f"The teacher is close to chance: {text}."
    share = (teacher.accuracy - chance) / (1 - chance) if chance < 1 else 1.0
    if share < WEAK_TEACHER:
        return "tip", f"The teacher is weak: {text}."
    return "passed", f"The teacher knows the task: {text}."


def data_is_clean(results: RunResults) -> Finding:
    """US008: was data skipped or reported, is a class missing or rare?"""
    data = results.data
    found = [f"{data.num_skipped} samples skipped"] if data.num_skipped else []
    kinds = Counter(issue.kind for issue in data.issues)
    found += [f"{number} times {kind.replace('_', ' ')}" for kind, number in kinds.items()]
    for split in ("train", "test"):
        counts = data.class_counts.get(split, ())
        num_empty = sum(number == 0 for number in counts)
        if num_empty and data.num_samples.get(split):
            found.append(f"{num_empty} of {len(counts)} classes have no {split} sample")
    if found:
        return "issue", f"The data has flaws: {'; '.join(found)}."
    train = [number for number in data.class_counts.get("train", ()) if number]
    if not train:
        return "skipped", "The classes of the training split were not counted."
    if max(train) > IMBALANCE * min(train):
        text = f"the largest class has {fixed(max(train) / min(train), 1)} times the smallest"
        return "tip", f"The classes are unbalanced in the training split: {text}."
    return "passed", "No sample was skipped or reported, and no class is rare."


def no_class_left_behind(results: RunResults) -> Finding:
    """US009: is the student's worst class close to its mean?"""
    student = results.test("student")
    if student is None:
        return lacking("student")
    rated = [(v, k) for k, v in enumerate(student.per_class_accuracy) if v is not None]
    if len(rated) < 2:
        return "not_applicable", "Fewer than two classes have test samples."
    worst, index = min(rated)
    num_samples = sum(student.confusion[index])
    # The lowest of many classes is low by chance too, hence three standard errors.
    margin = 3 * rate_standard_error(student.accuracy, num_samples)
    text = (
        f"class {results.data.class_names[index]!r} has {percent(worst)} on {count(num_samples)} "
        f"images, all classes together {percent(student.accuracy)}"
    )
    teacher = results.test("teacher")
    known = teacher.per_class_accuracy[index] if teacher else None
    text += f" (teacher on this class {percent(known)})" if known is not None else ""
    if student.accuracy - worst > max(WORST_CLASS_GAP, margin):
        return "issue", f"One class is far below the others: {text}."
    return "passed", f"No class is far below the others: {text}."


def training_has_settled(results: RunResults) -> Finding:
    """US010: had the student stopped improving when training ended?"""
    curve = results.curve("student", "validation_accuracy")
    if len(curve) < MIN_EPOCHS_FOR_TREND:
        return "skipped", f"Fewer than {MIN_EPOCHS_FOR_TREND} epochs were validated."
    window = curve[-max(4, math.ceil(len(curve) / 10)) :]
    rise = line_fit(window)
    text = (
        f"validation accuracy changed by {with_margin(rise)} in the last "
        f"{window[-1][0] - window[0][0]} of {curve[-1][0]} epochs"
    )
    if rise.value > TREND_GAIN and not rise.is_noise:
        return "tip", f"The student was still improving: {text}."
    return "passed", f"Training had settled: {text}."


def parity_holds(results: RunResults) -> Finding:
    """US011: does the exported file compute what the trained model computes?"""
    parity = results.parity
    if parity is None:
        return "skipped", "No exported file was compared with the trained model."
    text = (
        f"largest difference {significant(parity.max_abs_difference)} "
        f"(tolerance {significant(parity.tolerance)}), "
        f"same answer on {percent(parity.top1_agreement)} of {count(parity.num_images)} images"
    )
    return ("passed" if parity.passed else "issue"), f"File against model: {text}."


def training_was_finite(results: RunResults) -> Finding:
    """US012: did training stay finite, or had it to be rolled back?"""
    roles = [role for role in ROLES if results.curves.get(role)]
    if not roles:
        return "skipped", "No training was logged."
    found = []
    for role in roles:
        rows = results.curves[role]
        num_rollbacks = max(int(row.get("num_rollbacks") or 0) for row in rows)
        num_rollbacks = max(num_rollbacks, sum(row.get("event") == "rollback" for row in rows))
        if num_rollbacks:
            found.append(f"{role} {num_rollbacks} times")
    if found:
        text = ", ".join(found)
        return "issue", f"A loss or gradient was not finite, training was rolled back: {text}."
    return "passed", f"Every loss and gradient was finite: {', '.join(roles)}."


def teacher_not_saturated(results: RunResults) -> Finding:
    """US013: do the teacher's soft targets say more than the labels?"""
    confidence = results.teacher_confidence
    if not results.has_teacher:
        return NO_TEACHER
    if confidence is None:
        return "skipped", "The teacher's confidence on the training views was not measured."
    text = f"its largest probability is {percent(confidence)} on average over the training views"
    if confidence > SATURATED:
        return "tip", f"The teacher's targets are nearly one-hot: {text}."
    return "passed", f"The teacher's targets carry more than the label: {text}."


def control_exists(results: RunResults) -> Finding:
    """US014: was a control trained?"""
    if results.test("control") is None:
        text = f"No control was trained, so nobody knows what {results.teaching} was worth."
        return "issue", text
    return "passed", "A control was trained and evaluated on the same test images."


def accuracy_is_precise(results: RunResults) -> Finding:
    """US015: is the test split large enough for the accuracy to mean something?"""
    student = results.test("student")
    if student is None:
        return lacking("student")
    margin = NUM_STANDARD_ERRORS * rate_standard_error(student.accuracy, student.num_samples)
    text = (
        f"the accuracy on {count(student.num_samples)} test images is known to "
        f"± {fixed(100 * margin, 2)} points"
    )
    return ("tip" if margin > WIDE_ERROR else "passed"), f"{text[0].upper()}{text[1:]}."
