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


@pytest.fixture
def compression() -> dict[str, Any]:
    """A pruned and quantised student, released for two runtimes; everything is kept."""
    step = {
        "name": "prune (l1, global)",
        "kept": True,
        "reason": "",
        "gates": [
            {
                "name": "accuracy_drop",
                "before": 0.9,
                "after": 0.895,
                "loss": 0.005,
                "limit": 0.01,
                "status": "passed",
            }
        ],
        "accuracy_before": 0.9,
        "accuracy": 0.895,
        "num_params": 1000,
        "macs": 50_000,
        "file_bytes": 9000,
        "speedup": 1.5,
        "speedup_quartiles": [1.4, 1.6],
        "seconds": 12.0,
    }
    artifact = {
        "target": "onnx",
        "precision": "int8",
        "size_bytes": 5000,
        "accuracy": 0.89,
        "num_images": 1000,
        "agreement": 0.99,
        "max_abs_difference": 0.4,
        "mean_abs_difference": 0.05,
        "float_accuracy": 0.895,
        "p50_ms": 0.05,
        "p95_ms": 0.06,
        "load_ms": 2.0,
        "peak_memory_bytes": 40_000_000,
        "energy": {"energy_mj": None, "method": "not measured"},
        "facts": {"num_nodes": 12},
        "notes": [],
        "budget": [
            {
                "name": "model_size_bytes",
                "limit": 8000,
                "unit": "bytes",
                "status": "passed",
                "measured": 5000,
            }
        ],
    }
    other = {**copy.deepcopy(artifact), "target": "c", "facts": {"cortex-m4 flash_bytes": 20_000}}
    released = {"device": "cortex-m4-256kb", "max_int8_loss": 0.01}
    return {"steps": [step], "artifacts": [artifact, other], **released}


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
