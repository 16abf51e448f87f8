"""The gates of compression as pure functions: each one alone, at its limit and beyond."""

import pytest

from understudy.compress.settings import Gates
from understudy.recipes.gates import check_gates, reason_of

BEFORE = {
    "accuracy": 0.9,
    "per_class_accuracy": [0.95, None, 0.8],
    "agreement_with_teacher": 0.92,
    "ece": 0.02,
}
LIMITS = {"accuracy_drop": 0.01, "worst_class_drop": 0.05, "agreement_drop": 0.02, "ece_rise": 0.03}
NONE = dict.fromkeys(LIMITS)


def failed(after, **limits):
    rows = check_gates(Gates(**{**LIMITS, **limits}), BEFORE, {**BEFORE, **after})
    return {row.name: row.loss for row in rows if row.status == "failed"}


def test_nothing_lost_passes_every_gate():
    rows = check_gates(Gates(**LIMITS), BEFORE, BEFORE)
    assert [row.name for row in rows] == list(LIMITS)
    assert {row.status for row in rows} == {"passed"}
    assert {row.loss for row in rows} == {0}
    assert reason_of(rows) == ""


@pytest.mark.parametrize(
    ("gate", "at_the_limit", "beyond"),
    [
        ("accuracy_drop", {"accuracy": 0.89}, {"accuracy": 0.889}),
        (
            "worst_class_drop",
            {"per_class_accuracy": [0.75, None, 0.8]},  # another class is now the worst
            {"per_class_accuracy": [0.74, None, 0.99]},
        ),
        ("agreement_drop", {"agreement_with_teacher": 0.9}, {"agreement_with_teacher": 0.89}),
        ("ece_rise", {"ece": 0.05}, {"ece": 0.051}),
    ],
)
def test_each_gate_holds_at_its_limit_and_fails_beyond(gate, at_the_limit, beyond):
    assert failed(at_the_limit) == {}
    assert list(failed(beyond)) == [gate]
    assert failed(beyond)[gate] > LIMITS[gate]
    assert failed(beyond, **{gate: None}) == {}  # null: not checked
    (reason,) = [
        reason_of(check_gates(Gates(**{**NONE, gate: LIMITS[gate]}), BEFORE, {**BEFORE, **beyond}))
    ]
    assert reason.startswith(f"{gate}: ")
    assert f"a loss of at most {LIMITS[gate]:g} is allowed" in reason


@pytest.mark.parametrize(
    "better",
    [
        {"accuracy": 1.0},
        {"per_class_accuracy": [1.0, None, 1.0]},
        {"agreement_with_teacher": 1.0},
        {"ece": 0.0},
    ],
)
def test_what_gets_better_never_fails(better):
    assert failed(better, **dict.fromkeys(LIMITS, 0.0)) == {}


def test_what_was_not_measured_does_not_pass():
    rows = check_gates(Gates(**LIMITS), BEFORE, {**BEFORE, "per_class_accuracy": [None] * 3})
    status = {row.name: row.status for row in rows}
    assert status["worst_class_drop"] == "not_measured"
    assert reason_of(rows) == "worst_class_drop was not measured"


def test_without_a_teacher_there_is_nothing_to_agree_with():
    alone = {**BEFORE, "agreement_with_teacher": None}
    rows = check_gates(Gates(**LIMITS), alone, alone)
    assert "agreement_drop" not in {row.name for row in rows}
    lost = check_gates(Gates(**LIMITS), BEFORE, alone)
    assert {row.name for row in lost if row.status == "not_measured"} == {"agreement_drop"}
