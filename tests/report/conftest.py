"""Shared results: one real experiment, run once a session."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from example_results import example_values

from understudy.report.results import RunResults


@pytest.fixture(scope="session")
def experiment() -> dict[str, Any]:
    return example_values()


@pytest.fixture
def values(experiment: dict[str, Any]) -> dict[str, Any]:
    """A copy that a test may change."""
    return copy.deepcopy(experiment)


@pytest.fixture(scope="session")
def results(experiment: dict[str, Any]) -> RunResults:
    return RunResults.from_values(copy.deepcopy(experiment))


OPTIONAL = (
    "curves",
    "parity",
    "measurements",
    "budget",
    "mistakes",
    "stages",
    "training_hours",
    "student_vs_control",
    "teacher_confidence",
    "peak_memory_bytes",
)


@pytest.fixture
def bare_values(values: dict[str, Any]) -> dict[str, Any]:
    """Results of a run of which nothing optional was done."""
    for name in OPTIONAL:
        del values[name]
    values["metrics"], values["hardware"], values["versions"] = {}, {}, {}
    values["models"] = {"student": {"name": "linear"}}
    values["data"]["num_samples"], values["data"]["class_counts"] = {}, {}
    return values
