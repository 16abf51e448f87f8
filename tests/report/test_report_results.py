"""The typed results: round trip, and every way in which foreign values are refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from understudy.errors import InputError
from understudy.report.results import RESULTS_SCHEMA_VERSION, RunResults


def test_json_round_trip_keeps_everything(results: RunResults) -> None:
    text = results.to_json()
    assert RunResults.from_json(text) == results
    assert json.loads(text)["schema_version"] == RESULTS_SCHEMA_VERSION


def test_results_are_frozen(results: RunResults) -> None:
    with pytest.raises(FrozenInstanceError):
        results.seed = 2  # type: ignore[misc]


def test_unknown_missing_and_wrong_fields_are_listed_at_once(values: dict[str, Any]) -> None:
    values["surprise"] = 1
    values["metrics"]["student"]["test"]["top7"] = 0.5
    del values["data"]["fingerprint"]
    values["seed"] = "many"
    values["metrics"]["pupil"] = {}
    with pytest.raises(InputError) as caught:
        RunResults.from_values(values)
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "unknown field surprise in the results; expected only known ones" in text
    assert "unknown field metrics.student.test.top7" in text
    assert "the results lack data.fingerprint; expected all fields" in text
    assert "seed is 'many' in the results" in text
    assert "metrics.pupil" in text


def test_lengths_and_class_indices_are_checked(values: dict[str, Any]) -> None:
    values["metrics"]["student"]["test"]["per_class_accuracy"].pop()
    values["metrics"]["control"]["test"]["confusion"][3].pop()
    values["data"]["class_counts"]["test"].append(1)
    values["mistakes"][0]["true_class"] = 10
    values["mistakes"][1]["png_base64"] = "<svg onload=alert(1)>"
    values["curves"]["student"][0]["epoch"] = None
    with pytest.raises(InputError) as caught:
        RunResults.from_values(values)
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_no_values(values: dict[str, Any], number: float) -> None:
    values["curves"]["student"][3]["train_loss"] = number
    values["metrics"]["student"]["test"]["per_class_accuracy"][2] = number
    results = RunResults.from_values(values)
    assert 4 not in dict(results.curve("student", "train_loss"))
    student = results.test("student")
    assert student is not None
    assert student.per_class_accuracy[2] is None
    assert "NaN" not in results.to_json()
    values["metrics"]["student"]["test"]["accuracy"] = number
    with pytest.raises(InputError, match=re.escape("metrics.student.test.accuracy is None")):
        RunResults.from_values(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the results are not JSON"),
        ("[1]", "the results are not a JSON object"),
        ('{"schema_version": 99}', "the results have schema version 99; expected version 1"),
        ("{}", "the results lack run_name"),
    ],
)
def test_foreign_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        RunResults.from_json(text)


def test_curve_counts_epochs_from_one_and_reads_terms(results: RunResults) -> None:
    rows = results.curves["student"]
    assert results.curve("student", "losses/kl")[0] == (1, rows[0]["losses"]["kl"])
    assert results.curve("student", "learning_rate")[-1][0] == len(rows)
    assert results.curve("teacher", "learning_rate") == []
    assert results.curve("control", "losses/kl") == []
