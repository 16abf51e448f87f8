"""Sentences about the lab's numbers, each decided by the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from understudy.lab.paper_recipes import TEACHER_LAYERS
from understudy.lab.paper_values import (
    ACCURACIES,
    BEST_ALPHA,
    EPOCHS,
    STABLE_TEMPERATURES,
)
from understudy.report.formats import fixed, percent, points

SEEN_BEFORE = 0.99  # of CIFAR-10: nobody's validation accuracy
NEARLY_LABELS = 0.99  # mean confidence on the training pictures
Curve = Sequence[Sequence[float]]
PAPER_VALIDATION = 5000  # pictures; those of records that do not tell their own


def noise(payload: Mapping[str, Any]) -> float:
    """Return which difference of two accuracies near 0.6 is within chance: twice its deviation."""
    num_pictures: int = payload.get("num_samples", {}).get("validation", PAPER_VALIDATION)
    deviation: float = (2 * 0.6 * 0.4 / num_pictures) ** 0.5
    return 2 * deviation


def last(curve: Curve) -> float:
    """Return the last epoch's validation accuracy."""
    return curve[-1][2]


def reading_of_accuracy(payload: Mapping[str, Any]) -> tuple[str, ...]:
    """Compare the order of the networks, and what the teachers were worth, with the paper's."""
    networks = payload["networks"]
    found = {name: last(item["curve"]) for name, item in networks.items()}
    told = []
    teachers = [f"Teacher {n}" for n in TEACHER_LAYERS if f"Teacher {n}" in found]
    if len(teachers) > 1:
        ordered = sorted(teachers, key=lambda name: found[name])
        same = "as in the paper" if ordered == teachers else "not in the paper's order"
        told.append(f"Teachers from worst to best: {', '.join(ordered)}, {same}.")
    students = [f"TS {n}" for n in TEACHER_LAYERS if f"TS {n}" in found]
    for name in students:
        gain, theirs = found[name] - found["Student"], paper_gain(name)
        chance = " (within chance)" if abs(gain) < noise(payload) else ""
        told.append(
            f"{name} against the student alone: {points(gain)}{chance}; the paper has "
            f"{points(theirs)}."
        )
    if len(students) > 1:
        best = max(students, key=lambda name: found[name])
        spread = max(found[n] for n in students) - min(found[n] for n in students)
        told.append(
            f"The best distilled student is {best} (paper: TS 6); the students differ by "
            f"{fixed(100 * spread, 2)} points, where the paper's differ by 6.65."
        )
    told += slopes([item["curve"] for item in networks.values()])
    return tuple(told)


def paper_gain(name: str) -> float:
    """Return the paper's gain of a distilled student over the student alone."""
    return ACCURACIES[name][1] - ACCURACIES["Student"][1]


def slopes(curves: Sequence[Curve], *, anew: bool = False) -> tuple[str, ...]:
    """Return whether curves were still rising where they were stopped; nothing for whole ones.

    ``anew``: more epochs begin with the first one again.
    """
    epochs = int(min(curve[-1][0] for curve in curves))
    if epochs >= EPOCHS:
        return ()
    told = f"{epochs} of {EPOCHS} epochs: "
    if epochs < 3:
        told += "too few to tell whether the curves still rise. "
    else:
        rising = sum(last(curve) > curve[-3][2] for curve in curves)
        told += f"over the last two, {rising} of {len(curves)} curves still rose. "
    told += "The numbers are a part of the curve and no contradiction of its end; the same command "
    if anew:
        return (told + f"with --epochs {EPOCHS} --grid-epochs {EPOCHS} trains all anew.",)
    return (told + f"with --epochs {EPOCHS} goes on from here.",)


def reading_of_dropout(payload: Mapping[str, Any]) -> str:
    """Return which rates could have given the paper's student, by the epochs that all have."""
    curves: Mapping[str, Curve] = payload["curves"]
    theirs, epochs = ACCURACIES["Student"][1], int(min(curve[-1][0] for curve in curves.values()))
    found = {
        rate: next(row[2] for row in reversed(curve) if row[0] <= epochs)
        for rate, curve in curves.items()
    }
    near = min(found, key=lambda rate: abs(found[rate] - theirs))
    if epochs < EPOCHS:
        order = sorted(found, key=lambda rate: -found[rate])
        spread = found[order[0]] - found[order[-1]]
        within = spread < noise(payload)
        chance = "within chance" if within else "more than chance gives two networks"
        return (
            f"After {epochs} epochs the rates from best to worst are {', '.join(order)}, "
            f"{percent(spread)} apart ({chance}; one seed each): whether a rate ends "
            f"at the paper's {percent(theirs)} is not to be told before {EPOCHS} epochs."
        )
    return f"Nearest to the paper's {percent(theirs)} is a rate of {near}: {percent(found[near])}."


def reading_of_online(payload: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which way was better and which one faster."""
    gain = last(payload["curve"]) - last(payload["offline_curve"])
    ratio = payload["epoch_seconds"] / payload["offline_epoch_seconds"]
    chance = ", within chance" if abs(gain) < noise(payload) else ""
    told = (
        f"Online against offline: {points(gain)}{chance} (the paper: offline is better). Its "
        f"time is {fixed(ratio, 2)} of offline's (paper: 0.94)."
    )
    return (told, *slopes([payload["curve"], payload["offline_curve"]]))


def seconds_with_teacher(payload: Mapping[str, Any]) -> float | None:
    """Return the seconds of an epoch that runs the teacher; None: its pass was not measured."""
    if payload["label_seconds"] is None:
        return None
    seconds: float = payload["epoch_seconds"] + payload["label_seconds"]
    return seconds


def reading_of_pretrained(payload: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the store saves, what there is of a capacity gap, and where the curve ends."""
    return (reading_of_store(payload), *reading_of_gap(payload), *slopes([payload["curve"]]))


def reading_of_store(payload: Mapping[str, Any]) -> str:
    """Return what the store of outputs saves."""
    whole = seconds_with_teacher(payload)
    if whole is None:
        return (
            "What the store saves was not measured: it had the teacher's outputs already. A new "
            "UNDERSTUDY_HOME and --out measure it."
        )
    return (
        f"By these two timings, taken one after the other, an epoch without the store would take "
        f"{fixed(whole / payload['epoch_seconds'], 1)} times as long."
    )


def reading_of_gap(payload: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the teacher's own numbers say of what its student can learn."""
    told = []
    if payload["teacher_accuracy"] > SEEN_BEFORE:
        told.append("The teacher's own training seems to have had these validation pictures.")
    confidence = payload.get("teacher_confidence")
    if confidence is None:
        return tuple(told)
    sentence = f"The teacher's mean confidence on the training pictures is {fixed(confidence, 4)}"
    if confidence > NEARLY_LABELS:
        sentence += (
            ": at temperature 1 its outputs are nearly the labels. That, rather than its size, may "
            "be what limits its student; no other temperature was tried, so the two are not told "
            "apart"
        )
    return (*told, f"{sentence}.")


def reading_of_grid(
    path: str, found: Sequence[tuple[float, Curve]], payload: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return where the best value lies, whether it stands out, and where the curves end."""
    if not found:
        return ("No point is complete.",)
    best, curve = max(found, key=lambda item: last(item[1]))
    close = [f"{value:g}" for value, other in found if last(curve) - last(other) < noise(payload)]
    told = f"Best on validation: {best:g}; within chance of it: {', '.join(close)}. "
    if path.endswith("temperature"):
        low, high = STABLE_TEMPERATURES
        told += f"The paper finds {low:g} to {high:g} stable and a sharp decline outside."
    else:
        told += f"The paper's best is {BEST_ALPHA:g}, by training accuracy."
    return (told, *slopes([curve for _, curve in found], anew=True))
