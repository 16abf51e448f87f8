"""Limits of device profiles: those of a page include its runtime, threads are the device's."""

import pytest

from understudy.evaluate.budget import Budget, BudgetFacts, check_budget
from understudy.evaluate.devices import device_budget, device_limits, load_device, parse_device
from understudy.export.web_page import ASSETS, PAGE_FILES

# Of onnxruntime-web 1.30.0, whose hashes the target pins.
WEB_RUNTIME_BYTES = 14_239_897 + 73_054

PROFILE = """
title: A board
runtime: onnx
precision: int8
threads: 4
limits: {latency_ms: {at_most: 5}}
"""


def page_bytes(network_bytes):
    return sum((ASSETS / name).stat().st_size for name in PAGE_FILES) + (
        WEB_RUNTIME_BYTES + network_bytes
    )


@pytest.mark.parametrize(
    ("network_bytes", "status"),
    [(74_109, "passed"), (315_093, "passed"), (5_500_000, "passed"), (6_000_000, "failed")],
)
def test_a_page_with_its_runtime_fits_the_browsers_limit(network_bytes, status):
    facts = BudgetFacts(
        model_size_bytes=page_bytes(network_bytes),
        counted={"model_size_bytes": "page, network and runtime"},
    )
    row, _ = check_budget(load_device("browser").limits, facts=facts)
    assert (row.name, row.status) == ("model_size_bytes", status)
    assert row.detail.startswith("page, network and runtime: ")


def test_a_latency_limit_without_threads_is_for_those_of_the_device():
    device = parse_device(PROFILE, origin="board")
    assert device_limits(device).latency_ms.threads == 4
    assert device_budget(device)["latency_ms"]["threads"] == 4
    rows = [{"batch_size": 1, "num_threads": count, "p95_ms": 9.0 / count} for count in (1, 4)]
    (row,) = check_budget(device_limits(device), facts=BudgetFacts(measurements=rows))
    assert (row.measured, row.status) == (2.25, "passed")


def test_a_latency_limit_that_names_its_threads_keeps_them():
    text = PROFILE.replace("at_most: 5", "threads: 1, at_most: 5")
    device = parse_device(text, origin="board")
    assert device_limits(device) is device.limits
    assert device_budget(device)["latency_ms"]["threads"] == 1
    assert device_limits(parse_device(PROFILE.split("limits")[0], origin="board")) == Budget()
