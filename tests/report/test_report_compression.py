"""Compression and release in the report: rows, notes, verdicts, and a page that shows them."""

from __future__ import annotations

from typing import Any

import pytest

from understudy.report.checks import run_checks
from understudy.report.compression_views import artifact_row, compression_context, step_row
from understudy.report.formats import plain
from understudy.report.render import render_html, render_markdown
from understudy.report.results import RunResults


@pytest.fixture
def released(values: dict[str, Any], compression: dict[str, Any]) -> dict[str, Any]:
    return values | {"compression": compression}


def verdicts(values: dict[str, Any]) -> dict[str, tuple[str, str]]:
    found = run_checks(RunResults.from_values(values))
    return {item.code: (item.status, plain(item.message)) for item in found}


def test_rows_hold_the_numbers(released: dict[str, Any]) -> None:
    facts = RunResults.from_values(released).compression
    assert facts is not None
    row = [plain(text) for text in step_row(facts.steps[0])]
    assert row[:5] == ["prune (l1, global)", "yes", "89.50 %", "-0.50 points", "1,000"]
    assert row[7] == "1.50 (1.40 to 1.60)"
    row = [plain(text) for text in artifact_row(facts.artifacts[0])]
    assert row == [
        "onnx/int8",
        "89.00 %",
        "-0.50 points",
        "99.00 %",
        "0.400",
        "0.0500",
        "5.00 kB",
        "0.0500 ms",
        "0.0600 ms",
        "2.00 ms",
        "40.0 MB",
        "kept",
    ]


def test_a_step_taken_back_is_an_issue_with_its_reason(released: dict[str, Any]) -> None:
    reason = "accuracy_drop: 0.9 became 0.8, a loss of at most 0.01 is allowed"
    released["compression"]["steps"][0] |= {"kept": False, "reason": reason}
    status, message = verdicts(released)["US016"]
    assert status == "issue"
    assert reason in message
    assert verdicts(released)["US017"][0] == "not_applicable"
    page = render_html(RunResults.from_values(released), ())
    assert "was taken back: accuracy_drop" in page


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"speedup": 0.8, "speedup_quartiles": [0.7, 0.9]}, "issue"),
        ({"speedup": 1.1, "speedup_quartiles": [0.9, 1.3]}, "issue"),  # not beyond noise
        ({"speedup": None, "speedup_quartiles": None}, "skipped"),
        ({}, "passed"),
    ],
)
def test_fewer_multiply_adds_that_save_no_time_are_an_issue(
    released: dict[str, Any], changes: dict[str, Any], status: str
) -> None:
    released["compression"]["steps"][0] |= changes
    assert verdicts(released)["US017"][0] == status


FASTER = {"target": "tflite", "precision": "int8", "speedup": 1.5, "quartiles": [1.4, 1.6]}
FASTER |= {"num_rounds": 5, "before_ms": 0.3, "after_ms": 0.2}
NO_FASTER = FASTER | {"target": "c", "speedup": 1.1, "quartiles": [1.0, 1.2]}
UNKNOWN = {"target": "ncnn", "precision": "float32", "reason": "needs the extra ncnn"}


@pytest.mark.parametrize(
    ("rows", "status", "told"),
    [
        ([FASTER], "passed", ["tflite/int8 1.50 times as fast as before"]),
        ([FASTER, NO_FASTER], "issue", ["c/int8 1.10 times as fast as before; tflite/int8 1.50"]),
        ([NO_FASTER, UNKNOWN], "issue", ["not measured: ncnn/float32 (needs the extra ncnn)"]),
        # What was not measured never reads as fine.
        ([FASTER, UNKNOWN], "skipped", ["tflite/int8 1.50 times", "(needs the extra ncnn)"]),
    ],
)
def test_pruning_is_judged_in_the_runtimes_of_the_release(
    released: dict[str, Any], rows: list[dict[str, Any]], status: str, told: list[str]
) -> None:
    # In a runtime that it is not released for, its speed is no matter.
    released["compression"]["steps"][0] |= {"speedup": 0.8, "speedup_quartiles": [0.7, 0.9]}
    released["compression"]["pruned"] = rows
    found = verdicts(released)["US017"]
    assert found[0] == status
    assert all(text in found[1] for text in told)
    assert "onnx" not in found[1]


def test_every_runtimes_times_are_shown(released: dict[str, Any]) -> None:
    released["compression"]["pruned"] = [FASTER, UNKNOWN]
    page = plain(render_html(RunResults.from_values(released), ()))
    assert "one picture in tflite/int8: 1.50 times as fast (quartiles 1.40 to 1.60 of 5" in page
    assert "0.300 ms before and 0.200 ms after" in page
    assert "one picture in ncnn/float32: not measured: needs the extra ncnn." in page


@pytest.mark.parametrize("measured", [None, 9000])
def test_a_limit_that_is_not_shown_to_be_kept_is_an_issue(
    released: dict[str, Any], measured: float | None
) -> None:
    line = released["compression"]["artifacts"][1]["budget"][0]
    line |= {"measured": measured, "status": "not_measured" if measured is None else "failed"}
    status, message = verdicts(released)["US018"]
    assert status == "issue"
    assert "c/int8: model_size_bytes" in message
    rows = compression_context(RunResults.from_values(released))["missed_limits"]
    shown = [plain(text) for text in rows[0]]
    assert shown[:3] == ["c/int8", "model_size_bytes", "8.00 kB"]
    assert shown[3:] == (["not measured", "-"] if measured is None else ["9.00 kB", "-12.5 %"])


@pytest.mark.parametrize(
    ("accuracy", "limit", "status", "text"),
    [
        (0.89, 0.01, "passed", "onnx/int8 -0.50 points"),
        (0.885, 0.01, "passed", "c/int8 -1.00 points"),  # the limit itself
        (0.884, 0.01, "issue", "Lost by int8: c/int8 -1.10 points"),
        (0.2, None, "not_applicable", "no gate on accuracy"),
        (None, 0.01, "passed", "onnx/int8 -0.50 points"),  # US019 tells of what was not run
    ],
)
def test_an_int8_file_that_loses_more_than_the_gate_allows_is_an_issue(
    released: dict[str, Any], accuracy: float | None, limit: float | None, status: str, text: str
) -> None:
    released["compression"]["artifacts"][1]["accuracy"] = accuracy
    released["compression"]["max_int8_loss"] = limit
    found = verdicts(released)["US020"]
    assert found[0] == status
    assert text in found[1]


def test_accuracy_lost_by_int8_is_not_fine_where_no_file_was_run(released: dict[str, Any]) -> None:
    for artifact in released["compression"]["artifacts"]:
        artifact["accuracy"] = None
    assert verdicts(released)["US020"][0] == "skipped"
    for artifact in released["compression"]["artifacts"]:
        artifact["precision"] = "float32"
    assert verdicts(released)["US020"][0] == "not_applicable"


def test_files_that_were_not_run_are_said_to_be_unproved(released: dict[str, Any]) -> None:
    nothing = dict.fromkeys(("accuracy", "agreement", "max_abs_difference", "p50_ms", "p95_ms"))
    released["compression"]["artifacts"][0] |= {**nothing, "notes": ["not run: needs macOS"]}
    assert verdicts(released)["US019"][0] == "tip"
    page = render_html(RunResults.from_values(released), ())
    assert "not run: needs macOS" in page


def test_a_target_that_failed_is_a_row_and_an_issue_with_its_reason(
    released: dict[str, Any],
) -> None:
    failed = {"target": "tflite", "precision": "int8", "reason": "it has no operator Det"}
    released["compression"] |= {"failed": [failed], "artifacts": []}
    status, message = verdicts(released)["US019"]
    assert (status, message) == ("issue", "Not made: tflite/int8 (it has no operator Det).")
    results = RunResults.from_values(released)
    (row,) = compression_context(results)["artifact_rows"]
    assert row[:2] == ("tflite/int8", "not made")
    for text in (render_html(results, ()), render_markdown(results, ())):
        assert "tflite/int8 was not made: it has no operator Det" in text


def test_limits_that_are_left_to_the_release_are_told(released: dict[str, Any]) -> None:
    released["compression"]["steps"][0]["judged_later"] = ["latency_ms of c", "energy_mj of c"]
    page = render_html(RunResults.from_values(released), ())
    assert "prune (l1, global): judged at the release: latency_ms of c, energy_mj of c." in page


def test_page_and_markdown_show_it_only_where_there_is_something(
    released: dict[str, Any],
) -> None:
    results = RunResults.from_values(released)
    page, markdown = render_html(results, ()), render_markdown(results, ())
    assert '<h2 id="compression">' in page
    assert "for cortex-m4-256kb" in page
    assert "energy a picture not measured" in page
    assert "| prune (l1, global) | yes |" in markdown
    assert "onnx/int8" in markdown
    del released["compression"]
    results = RunResults.from_values(released)
    assert 'id="compression"' not in render_html(results, ())
    assert "Compression and release" not in render_markdown(results, ())
