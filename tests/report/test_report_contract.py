"""The records of other stages fit into the results, field by field."""

from __future__ import annotations

import dataclasses

import pytest

from understudy.data.images import DataIssue
from understudy.evaluate import accuracy, budget, calibration, latency
from understudy.export import parity
from understudy.models.cost import ModelCost
from understudy.report import results


@pytest.mark.parametrize(
    ("theirs", "ours", "added"),
    [
        (accuracy.Metrics, results.SplitMetrics, set()),
        (calibration.CalibrationBin, results.CalibrationBin, set()),
        (latency.Measurement, results.Measurement, set()),
        (parity.Parity, results.ParityFacts, set()),
        (budget.BudgetRow, results.BudgetLine, set()),
        (DataIssue, results.IssueFacts, set()),
        (ModelCost, results.ModelFacts, {"name", "file_bytes"}),
    ],
)
def test_fields_are_the_same(theirs: type, ours: type, added: set[str]) -> None:
    names = [{field.name for field in dataclasses.fields(kind)} for kind in (theirs, ours)]
    assert names[0] | added == names[1]


def test_every_budget_unit_is_written_for_people() -> None:
    from understudy.report.formats import plain, quantity

    shown = {plain(quantity(1234.0, unit)) for unit in budget.BUDGET_UNITS.values()}
    counts = {"1,234 parameters", "1,234 multiply-adds"}
    assert shown == counts | {"1.23 kB", "1,234 ms", "1234 h 0 min", "1,234 mJ"}
