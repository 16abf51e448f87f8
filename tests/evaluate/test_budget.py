import subprocess
import sys
from dataclasses import replace

import pytest

from understudy.evaluate.budget import Budget, BudgetFacts
from understudy.evaluate.budget import check_budget as check_budget_of

ROW = {"batch_size": 1, "num_threads": 1, "p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": 3.0}
FACTS = BudgetFacts(
    num_params=2000,
    macs=70_000,
    model_size_bytes=9000,
    measurements=[{**ROW, "num_threads": 2, "p95_ms": 0.1}, ROW],
    peak_memory_bytes=50_000_000,
    train_hours=0.5,
    flash_bytes=30_000,
    ram_bytes=20_000,
    energy_mj=0.25,
)


def check_budget(limits, *, facts):
    return check_budget_of(Budget(**limits), facts=facts)


def statuses(limits, facts=FACTS):
    return {row.name: row.status for row in check_budget(limits, facts=facts)}


@pytest.mark.parametrize(
    ("name", "measured", "step"),
    [
        ("num_params", 2000, 1),
        ("macs", 70_000, 1),
        ("model_size_bytes", 9000, 1),
        ("peak_memory_bytes", 50_000_000, 1),
        ("train_hours", 0.5, 1e-12),
        ("flash_bytes", 30_000, 1),
        ("ram_bytes", 20_000, 1),
        ("energy_mj", 0.25, 1e-12),
    ],
)
def test_the_limit_itself_passes_and_the_least_below_it_fails(name, measured, step):
    assert statuses({name: measured}) == {name: "passed"}
    assert statuses({name: measured + step}) == {name: "passed"}
    assert statuses({name: measured - step}) == {name: "failed"}


@pytest.mark.parametrize(("percentile", "measured"), [(50, 1.0), (95, 2.0), (99, 3.0)])
def test_latency_takes_the_row_and_percentile_asked_for(percentile, measured):
    limit = {"batch": 1, "threads": 1, "percentile": percentile, "at_most": measured}
    (row,) = check_budget({"latency_ms": limit}, facts=FACTS)
    assert (row.measured, row.limit, row.status, row.unit) == (measured, measured, "passed", "ms")
    assert row.detail == f"p{percentile} at batch 1, threads 1: 100.0% of the limit"
    (row,) = check_budget({"latency_ms": {**limit, "at_most": measured - 1e-9}}, facts=FACTS)
    assert row.status == "failed"


def test_latency_defaults_and_other_settings():
    assert statuses({"latency_ms": {"at_most": 2.0}}) == {"latency_ms": "passed"}
    assert statuses({"latency_ms": {"at_most": 1.9}}) == {"latency_ms": "failed"}
    fast = {"threads": 2, "at_most": 0.2}
    assert statuses({"latency_ms": fast}) == {"latency_ms": "passed"}
    # Batch 100 was not measured: no other row stands in for it.
    other = {"batch": 100, "at_most": 1e9}
    assert statuses({"latency_ms": other}) == {"latency_ms": "not_measured"}


def test_what_was_not_measured_never_passes():
    limits = {
        "num_params": 10**12,
        "model_size_bytes": 10**12,
        "latency_ms": {"at_most": 1e12},
        "peak_memory_bytes": 10**15,
        "train_hours": 1e12,
    }
    for facts in (BudgetFacts(), BudgetFacts(*[float("nan")] * 2, (), *[float("nan")] * 2)):
        rows = check_budget(limits, facts=facts)
        assert [row.name for row in rows] == list(limits)
        assert {row.status for row in rows} == {"not_measured"}
        assert all(row.measured is None for row in rows)


def test_a_strict_budget_fails_what_was_not_measured():
    limits = {"num_params": 2000, "energy_mj": 1.0, "latency_ms": {"batch": 100, "at_most": 1.0}}
    facts = replace(FACTS, energy_mj=None)
    rows = check_budget({**limits, "strict": True}, facts=facts)
    assert [(row.name, row.status, row.measured) for row in rows] == [
        ("num_params", "passed", 2000),
        ("latency_ms", "failed", None),
        ("energy_mj", "failed", None),
    ]
    assert rows[2].detail == "not measured, and the budget is strict"
    by_call = check_budget_of(Budget(**limits), facts=facts, strict=True)
    assert [row.status for row in by_call] == ["passed", "failed", "failed"]
    lenient = check_budget_of(Budget(**limits, strict=True), facts=facts, strict=False)
    assert [row.status for row in lenient] == ["passed", "not_measured", "not_measured"]


def test_an_estimate_is_shown_and_decides_nothing():
    facts = replace(FACTS, energy_mj=None, estimates={"energy_mj": "0.1 mJ", "num_params": "1"})
    rows = check_budget({"energy_mj": 1.0, "num_params": 1}, facts=facts)
    assert [(row.name, row.status) for row in rows] == [
        ("num_params", "failed"),
        ("energy_mj", "not_measured"),
    ]
    assert rows[1].detail == "not measured (estimate: 0.1 mJ)"


def test_rows_only_for_limits_that_are_set():
    assert check_budget({}, facts=FACTS) == []
    rows = check_budget({"train_hours": 0.4, "num_params": None}, facts=FACTS)
    assert [row.to_json() for row in rows] == [
        {
            "name": "train_hours",
            "limit": 0.4,
            "measured": 0.5,
            "unit": "h",
            "status": "failed",
            "detail": "25.0% over the limit",
        }
    ]


def test_limits_are_checked_without_torch_or_numpy():
    code = (
        "import sys; import understudy.evaluate.budget; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'onnx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
