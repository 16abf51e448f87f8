"""Results of a real, tiny experiment on scikit-learn's digits, for looking at the report.

The teacher is a small multilayer perceptron; student and control are linear classifiers (650
parameters) trained with NumPy, with and without the teacher's soft targets. Predictions, curves,
calibration, pictures, parity and times are those of this experiment.
"""

from __future__ import annotations

import base64
import io
import time
import warnings
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from understudy.runtime import hardware_facts, package_versions

NUM_CLASSES = 10
NUM_EPOCHS = 40
TEMPERATURE = 3.0


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def bins_of(confidence_N: np.ndarray, right_N: np.ndarray) -> list[dict[str, Any]]:
    bins = []
    for lower in np.arange(10) / 10:
        inside = (confidence_N > lower) & (confidence_N <= lower + 0.1)
        bins.append(
            {
                "lower": float(lower),
                "upper": float(lower + 0.1),
                "confidence": float(confidence_N[inside].mean()) if inside.any() else None,
                "accuracy": float(right_N[inside].mean()) if inside.any() else None,
                "count": int(inside.sum()),
            }
        )
    return bins


def metrics_of(
    logits_NK: np.ndarray, labels_N: np.ndarray, teacher_NK: np.ndarray | None
) -> dict[str, Any]:
    probability_NK = softmax(logits_NK)
    answers_N = logits_NK.argmax(axis=1)
    right_N = answers_N == labels_N
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), dtype=int)
    np.add.at(confusion, (labels_N, answers_N), 1)
    one_hot_NK = np.eye(NUM_CLASSES)[labels_N]
    bins = bins_of(probability_NK.max(axis=1), right_N)
    ece = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins if b["count"])
    own = probability_NK[np.arange(len(labels_N)), labels_N]
    agreement = None if teacher_NK is None else float((answers_N == teacher_NK.argmax(1)).mean())
    return {
        "accuracy": float(right_N.mean()),
        "per_class_accuracy": (confusion.diagonal() / confusion.sum(axis=1)).tolist(),
        "nll": float(-np.log(own + 1e-12).mean()),
        "brier": float(((probability_NK - one_hot_NK) ** 2).sum(axis=1).mean()),
        "ece": ece / len(labels_N),
        "confusion": confusion.tolist(),
        "calibration_bins": bins,
        "num_samples": len(labels_N),
        "agreement_with_teacher": agreement,
    }


def train_linear(
    parts: dict[str, tuple[np.ndarray, np.ndarray]], *, teacher_NK: np.ndarray | None
) -> tuple[np.ndarray, list[dict[str, Any]], float]:
    """Train 650 parameters by gradient descent; returns weights, curve and seconds."""
    inputs, labels = parts["train"]
    generator = np.random.default_rng(0)
    weights = generator.normal(0, 0.01, (inputs.shape[1], NUM_CLASSES))
    one_hot = np.eye(NUM_CLASSES)[labels]
    soft = None if teacher_NK is None else softmax(teacher_NK / TEMPERATURE)
    curve, step, started = [], 0, time.perf_counter()
    for epoch in range(NUM_EPOCHS):
        epoch_started = time.perf_counter()
        rate = 0.25 * (1 + np.cos(np.pi * epoch / NUM_EPOCHS))
        sums: dict[str, list[float]] = {"ce": [], "kl": [], "right": [], "norm": []}
        for rows in np.array_split(generator.permutation(len(labels)), len(labels) // 32):
            logits = inputs[rows] @ weights
            error = softmax(logits) - one_hot[rows]
            ce = -np.log(softmax(logits)[np.arange(len(rows)), labels[rows]] + 1e-12).mean()
            sums["ce"].append(float(ce))
            sums["right"].append(float((logits.argmax(1) == labels[rows]).mean()))
            if soft is not None:
                answer = softmax(logits / TEMPERATURE)
                ratio = np.log((soft[rows] + 1e-12) / (answer + 1e-12))
                kl = (soft[rows] * ratio).sum(axis=1).mean() * TEMPERATURE**2
                sums["kl"].append(float(kl))
                error = 0.3 * error + 0.7 * TEMPERATURE * (answer - soft[rows])
            gradient = inputs[rows].T @ error / len(rows)
            sums["norm"].append(float(np.linalg.norm(gradient)))
            weights = weights - rate * gradient
            step += 1
        now = time.perf_counter() - epoch_started
        curve.append(curve_row(epoch, step, rate, sums, now, parts["validation"], weights))
    return weights, curve, time.perf_counter() - started


def curve_row(
    epoch: int,
    step: int,
    rate: float,
    sums: dict[str, list[float]],
    seconds: float,
    validation: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray,
) -> dict[str, Any]:
    found = metrics_of(validation[0] @ weights, validation[1], None)
    losses = {name: float(np.mean(sums[name])) for name in ("ce", "kl") if sums[name]}
    return {
        "epoch": epoch,
        "step": step,
        "train_loss": 0.3 * losses["ce"] + 0.7 * losses["kl"] if "kl" in losses else losses["ce"],
        "losses": losses,
        "learning_rate": float(rate),
        "gradient_norm": float(np.mean(sums["norm"])),
        "samples_per_second": 1000 / seconds,
        "train_accuracy": float(np.mean(sums["right"])),
        "num_rollbacks": 0,
        "validation_accuracy": found["accuracy"],
        "validation_nll": found["nll"],
        "validation_ece": found["ece"],
        "seconds": seconds,
    }


def png_base64(image_HW: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def time_calls(inputs: np.ndarray, weights: np.ndarray, *, batch_size: int) -> dict[str, Any]:
    times = []
    for number in range(220):
        started = time.perf_counter()
        inputs[:batch_size] @ weights
        if number >= 20:
            times.append(1000 * (time.perf_counter() - started))
    p50, p95, p99 = (float(np.percentile(times, q)) for q in (50, 95, 99))
    return {
        "batch_size": batch_size,
        "num_threads": 1,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "mean_ms": float(np.mean(times)),
        "images_per_second": 1000 * batch_size / p50,
        "num_runs": 200,
        "num_warmup": 20,
    }


def example_values() -> dict[str, Any]:
    """Run the experiment (about a second) and return its results as plain values."""
    digits = load_digits()
    images_NHW = (digits.images * 15.9375).astype(np.uint8)
    inputs = np.hstack([digits.data / 16, np.ones((len(digits.data), 1))])
    order = np.random.default_rng(1).permutation(len(inputs))
    rows = dict(
        zip(
            ("train", "calibration", "validation", "test"),
            np.split(order, [950, 1100, 1350]),
            strict=True,
        )
    )
    parts = {name: (inputs[index], digits.target[index]) for name, index in rows.items()}
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        teacher = MLPClassifier((64,), learning_rate_init=0.004, max_iter=80, random_state=0).fit(
            *parts["train"]
        )
    teacher_seconds = time.perf_counter() - started
    logits = {"teacher": np.log(teacher.predict_proba(inputs) + 1e-7)}
    curves, seconds, weights = {}, {"teacher": teacher_seconds}, {}
    for role, soft in (("student", logits["teacher"][rows["train"]]), ("control", None)):
        weights[role], curves[role], seconds[role] = train_linear(parts, teacher_NK=soft)
        logits[role] = inputs @ weights[role]
    metrics = {
        role: {
            split: metrics_of(
                logits[role][rows[split]],
                parts[split][1],
                None if role == "teacher" else logits["teacher"][rows[split]],
            )
            for split in ("validation", "test")
        }
        for role in logits
    }
    answers = {role: values[rows["test"]].argmax(1) for role, values in logits.items()}
    right = {role: answers[role] == parts["test"][1] for role in answers}
    confidence = softmax(logits["student"])[rows["test"]].max(axis=1)
    mistakes = [
        {
            "index": int(rows["test"][k]),
            "true_class": int(parts["test"][1][k]),
            "student_class": int(answers["student"][k]),
            "teacher_class": int(answers["teacher"][k]),
            "control_class": int(answers["control"][k]),
            "student_confidence": float(confidence[k]),
            "png_base64": png_base64(images_NHW[rows["test"][k]]),
        }
        for k in np.flatnonzero(~right["student"])[:12]
    ]
    single = inputs.astype(np.float32) @ weights["student"].astype(np.float32)
    gaps = np.abs(single - logits["student"])[rows["test"]]
    measurements = [time_calls(inputs, weights["student"], batch_size=n) for n in (1, 100)]
    num_params = {"teacher": 65 * 64 + 64 + 64 * 10 + 10, "student": 650, "control": 650}
    recipe = {
        "run_name": "digits-linear",
        "data": {"source": "digits", "seed": 1},
        "distillation": {"kl_weight": 0.7, "ce_weight": 0.3, "temperature": TEMPERATURE},
        "training": {"num_epochs": NUM_EPOCHS, "batch_size": 32, "learning_rate": 0.5},
        "budget": {"num_params": 1000, "latency_ms": {"batch": 1, "at_most": 0.5}},
    }
    return {
        "run_name": "digits-linear",
        "created": "2026-01-05T10:00:00+00:00",
        "seed": 1,
        "recipe": recipe,
        "recipe_hash": "5f1c0d6f9f4e6a7c5b1d2e3f405162738495a6b7c8d9eaf0112233445566778f",
        "versions": package_versions(),
        "hardware": hardware_facts(),
        "data": {
            "source": "digits",
            "fingerprint": "c0ffee125d0a7b9e",
            "image_shape": [1, 8, 8],
            "class_names": [str(name) for name in digits.target_names],
            "num_samples": {name: len(index) for name, index in rows.items()},
            "class_counts": {
                name: np.bincount(digits.target[index], minlength=NUM_CLASSES).tolist()
                for name, index in rows.items()
            },
            "issues": [],
            "num_skipped": 0,
        },
        "models": {
            role: {
                "name": "mlp-64" if role == "teacher" else "linear",
                "num_params": number,
                "macs": number - (74 if role == "teacher" else 0),
                "weight_bytes": 4 * number,
                "peak_activation_bytes": 4 * (65 + 10),
                "file_bytes": 4 * number + 128 if role == "student" else None,
            }
            for role, number in num_params.items()
        },
        "metrics": metrics,
        "curves": curves,
        "parity": {
            "max_abs_difference": float(gaps.max()),
            "mean_abs_difference": float(gaps.mean()),
            "top1_agreement": float(
                (single.argmax(1) == logits["student"].argmax(1))[rows["test"]].mean()
            ),
            "tolerance": 1e-4,
            "num_images": len(rows["test"]),
            "passed": bool(gaps.max() <= 1e-4),
        },
        "measurements": measurements,
        "peak_memory_bytes": None,
        "budget": [
            {
                "name": "num_params",
                "limit": 1000,
                "measured": 650,
                "unit": "",
                "status": "passed",
                "detail": "weights and biases",
            },
            {
                "name": "latency_ms",
                "limit": 0.5,
                "measured": measurements[0]["p50_ms"],
                "unit": "ms",
                "status": "passed",
                "detail": "median of 200 calls, 1 image, 1 thread",
            },
            {
                "name": "peak_memory_bytes",
                "limit": 50_000_000,
                "measured": None,
                "unit": "bytes",
                "status": "not_measured",
                "detail": "",
            },
        ],
        "mistakes": mistakes,
        "stages": [
            {"name": "data", "seconds": 0.05, "reused": False},
            {"name": "teacher", "seconds": teacher_seconds, "reused": False},
            {"name": "student", "seconds": seconds["student"], "reused": False},
            {"name": "control", "seconds": seconds["control"], "reused": True},
        ],
        "training_hours": {role: value / 3600 for role, value in seconds.items()},
        "student_vs_control": {
            "only_student_right": int((right["student"] & ~right["control"]).sum()),
            "only_control_right": int((right["control"] & ~right["student"]).sum()),
        },
        "teacher_confidence": float(
            softmax(logits["teacher"] / TEMPERATURE)[rows["train"]].max(axis=1).mean()
        ),
    }
