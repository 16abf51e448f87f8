"""Artifacts of tiny networks and what a package of them says."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

from understudy.package.card import ModelCard, ScoreRow
from understudy.package.statistics import reference_statistics
from understudy.package.writing import PackageContents

CLASS_NAMES = ("ant", "bee", "größer", "dog | wild")
CREATED = "2026-01-02T03:04:05+00:00"
IMAGE_SHAPE = (3, 16, 12)


@dataclass(frozen=True)
class Files:
    """The least that can be packed."""

    target: str
    precision: str
    folder: Path
    files: tuple[str, ...]
    batch: str = "any"
    facts: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def card(**changes):
    values = {
        "summary": "Tells insects from dogs.",
        "licence": "MIT",
        "data": {"source": "made up", "num_train": 1200, "licence": None},
        "teacher": {"model": "resnet56", "num_params": 853018},
        "student": {"model": "separable", "num_params": 1234},
        "metrics": {"accuracy": 0.786, "agreement_with_teacher": 0.81},
        "per_class": [ScoreRow("ant", 0.75, 40), ScoreRow("dog | wild", None, 0)],
        "per_group": [ScoreRow("night", 0.5, 10, group="light")],
        "calibration": {"ece": 0.0171},
        "budget": [
            {
                "name": "model_size_bytes",
                "limit": 20000,
                "measured": 10000,
                "status": "passed",
                "detail": "50.0% of the limit",
            },
            {"name": "latency_ms", "limit": 1.5, "measured": None, "status": "not_measured"},
        ],
        "intended_use": ["Sorting pictures of a garden."],
        "limits": ["Not for cats."],
        "versions": {"understudy": "0.1.0"},
        "hardware": {"processor": "one | other", "num_cores": 2, "memory_bytes": 8347123712},
        "measured_on": ["onnx-int8: measured on two | others."],
        "commands": ["understudy distill garden"],
    }
    return ModelCard(**{**values, **changes})


def contents(images_NCHW, logits_NK, **changes):
    values = {
        "name": "garden",
        "version": "1.2",
        "created": CREATED,
        "class_names": CLASS_NAMES,
        "image_shape": IMAGE_SHAPE,
        "card": card(),
        "statistics": reference_statistics(images_NCHW, logits_NK, class_names=CLASS_NAMES),
        "measured": {"onnx-float32": {"accuracy": 0.786, "latency_ms": 0.0452}},
    }
    return PackageContents(**{**values, **changes})


def onnx_logits(path, images_NCHW):
    """What ONNX Runtime itself answers for uint8 pictures."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels_NCHW = images_NCHW.astype(np.float32) / np.float32(255)
    return session.run(None, {session.get_inputs()[0].name: pixels_NCHW})[0]
