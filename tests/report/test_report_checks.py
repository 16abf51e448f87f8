"""Every coded check: what makes it pass, what raises it, and when it cannot say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from understudy.report.checks import CHECKS, Verdict, checks_table, run_checks
from understudy.report.results import RunResults

Values = dict[str, Any]


def verdict(values: Values, code: str) -> Verdict:
    found = {item.code: item for item in run_checks(RunResults.from_values(values))}
    return found[code]


def metrics(accuracy: float, *, num_samples: int = 1000, ece: float = 0.01) -> Values:
    """Metrics of a ten-class model whose classes are all equally good."""
    each = num_samples // 10
    right = round(accuracy * each)
    confusion = [[0] * 10 for _ in range(10)]
    for k in range(10):
        confusion[k][k], confusion[k][(k + 1) % 10] = right, each - right
    # One bin with the calibration error asked for.
    bins = [
        {
            "lower": 0.0,
            "upper": 1.0,
            "confidence": accuracy - ece,
            "accuracy": accuracy,
            "count": num_samples,
        }
    ]
    return {
        "accuracy": accuracy,
        "per_class_accuracy": [right / each] * 10,
        "nll": 0.3,
        "brier": 0.1,
        "ece": ece,
        "confusion": confusion,
        "calibration_bins": bins,
        "num_samples": num_samples,
        "agreement_with_teacher": None,
    }


@pytest.fixture
def good(values: Values, compression: Values) -> Values:
    """Results that no check has anything against."""
    values["compression"] = compression
    values["metrics"] = {
        "teacher": {"test": metrics(0.95, num_samples=10_000)},
        "student": {"test": metrics(0.93, num_samples=10_000)},
        "control": {"test": metrics(0.90, num_samples=10_000)},
    }
    values["student_vs_control"] = None
    values["budget"] = [line for line in values["budget"] if line["status"] == "passed"]
    return values


def test_good_results_pass_every_check(good: Values) -> None:
    found = {item.code: item.status for item in run_checks(RunResults.from_values(good))}
    assert set(found.values()) == {"passed"}, found


def test_a_bare_run_passes_no_check_and_says_so(bare_values: Values) -> None:
    found = {item.code: item.status for item in run_checks(RunResults.from_values(bare_values))}
    assert "passed" not in found.values()
    assert found["US002"] == found["US003"] == "not_applicable"
    assert found["US014"] == "issue"


def set_test(role: str, value: Values) -> Callable[[Values], None]:
    def change(values: Values) -> None:
        values["metrics"][role]["test"] = value

    return change


def budget_status(status: str, measured: float | None) -> Callable[[Values], None]:
    def change(values: Values) -> None:
        values["budget"][0] |= {"status": status, "measured": measured}

    return change


def overfit(gap: float) -> Callable[[Values], None]:
    def change(values: Values) -> None:
        values["data"]["num_samples"]["validation"] = 100_000
        values["curves"]["student"][-1] |= {
            "train_accuracy": 0.9,
            "validation_accuracy": 0.9 - gap,
        }

    return change


def skip_rows(values: Values) -> None:
    values["data"]["num_skipped"] = 3
    values["data"]["issues"] = [
        {"kind": "cross_split_duplicate", "row": 7, "split": "test", "message": "as train row 3"}
    ]


def empty_class(values: Values) -> None:
    values["data"]["class_counts"]["test"][4] = 0


def unbalance(values: Values) -> None:
    values["data"]["class_counts"]["train"][4] = 5


def ruin_class(values: Values) -> None:
    student = values["metrics"]["student"]["test"]
    student["per_class_accuracy"][3] = 0.5


def keep_improving(values: Values) -> None:
    for row in values["curves"]["student"]:
        row["validation_accuracy"] = 0.5 + 0.01 * row["epoch"]


def miss_parity(values: Values) -> None:
    values["parity"] |= {"passed": False, "max_abs_difference": 0.25}


def roll_back(values: Values) -> None:
    values["curves"]["student"][5]["num_rollbacks"] = 2


def roll_back_event(values: Values) -> None:
    values["curves"]["control"].insert(4, {"epoch": 4, "event": "rollback"})


def no_control(values: Values) -> None:
    del values["metrics"]["control"]


@pytest.mark.parametrize(
    ("code", "change", "status", "words"),
    [
        ("US001", set_test("student", metrics(0.905, num_samples=10_000)), "issue", "within noise"),
        ("US001", set_test("student", metrics(0.85, num_samples=10_000)), "issue", "is worse"),
        ("US001", no_control, "skipped", "no control"),
        ("US002", budget_status("failed", 1200), "issue", "num_params is 1,200, at most 1,000"),
        ("US003", budget_status("not_measured", None), "issue", "num_params"),
        ("US004", overfit(0.07), "tip", "7.00 points".replace(" ", "\u00a0")),
        ("US004", overfit(0.2), "issue", "fits its training images"),
        ("US005", set_test("student", metrics(0.93, ece=0.045)), "tip", "not sure enough"),
        ("US005", set_test("student", metrics(0.85, ece=-0.09)), "passed", "can be trusted"),
        ("US006", set_test("teacher", metrics(0.80)), "issue", "worse than the student"),
        ("US006", set_test("teacher", metrics(0.92)), "tip", "worse than the student"),
        ("US007", set_test("teacher", metrics(0.11)), "issue", "close to chance"),
        ("US007", set_test("teacher", metrics(0.40)), "tip", "weak"),
        ("US008", skip_rows, "issue", "3 samples skipped; 1 times cross split duplicate"),
        ("US008", empty_class, "issue", "1 of 10 classes have no test sample"),
        ("US008", unbalance, "tip", "unbalanced"),
        ("US009", ruin_class, "issue", "class '3' has 50.00"),
        ("US010", keep_improving, "tip", "still improving"),
        ("US011", miss_parity, "issue", "0.250"),
        ("US012", roll_back, "issue", "student 2 times"),
        ("US012", roll_back_event, "issue", "control 1 times"),
        ("US014", no_control, "issue", "nobody knows"),
        ("US015", set_test("student", metrics(0.93, num_samples=100)), "tip", "100 test images"),
    ],
)
def test_fault_raises_its_check(
    good: Values, code: str, change: Callable[[Values], None], status: str, words: str
) -> None:
    change(good)
    found = verdict(good, code)
    assert (found.status, words in found.message) == (status, True), found


def test_saturated_teacher_is_a_tip_and_unknown_is_skipped(good: Values) -> None:
    good["teacher_confidence"] = 0.9999
    assert verdict(good, "US013").status == "tip"
    good["teacher_confidence"] = None
    assert verdict(good, "US013").status == "skipped"


def test_too_sure_and_not_sure_enough_are_told_apart(good: Values) -> None:
    sure = metrics(0.80, ece=0.15)
    sure["calibration_bins"][0]["confidence"] = 0.95
    good["metrics"]["student"]["test"] = sure
    assert verdict(good, "US005").status == "issue"
    assert "too sure" in verdict(good, "US005").message


def test_settled_training_with_noise_is_no_tip(good: Values) -> None:
    for row in good["curves"]["student"]:
        row["validation_accuracy"] = 0.9 + 0.004 * (-1) ** row["epoch"]
    assert verdict(good, "US010").status == "passed"
    good["curves"]["student"] = good["curves"]["student"][:5]
    assert verdict(good, "US010").status == "skipped"


def test_paired_counts_sharpen_the_comparison(good: Values) -> None:
    good["metrics"]["student"]["test"] = metrics(0.91, num_samples=1000)
    good["metrics"]["control"]["test"] = metrics(0.90, num_samples=1000)
    assert "within noise" in verdict(good, "US001").message
    good["student_vs_control"] = {"only_student_right": 11, "only_control_right": 1}
    assert verdict(good, "US001").status == "passed"


def test_codes_are_unique_consecutive_and_documented() -> None:
    assert [check.code for check in CHECKS] == [f"US{k:03}" for k in range(1, len(CHECKS) + 1)]
    for row in checks_table():
        assert all(row.values()), row
        assert set(row) == {"code", "title", "raised_when", "mend"}
        assert row["mend"].endswith(".")
