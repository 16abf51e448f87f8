"""Stage 5, evaluation: teacher, student and control through the same evaluator; test read here."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from understudy.artifacts import Record, atomic_path
from understudy.evaluate.accuracy import evaluate_logits, predict_logits
from understudy.models.cost import model_cost
from understudy.progress import shown_progress
from understudy.recipes.members import as_teacher, is_ensemble
from understudy.recipes.networks import code_section, trained_model
from understudy.recipes.run import Run

LOGITS_NAME = "logits.safetensors"
SPLITS = ("validation", "test")
NUM_MISTAKES = 24


def evaluate(run: Run) -> Record:
    """Evaluate every trained network on validation and test, and count what it costs."""
    roles = evaluated_roles(run)
    taught_first = list(run.teachers) if run.teaches_first else []
    networks = [*run.teachers, *(role for role in roles if role != "teacher")]
    records = {
        role: run.parent(role, "teach" if role in taught_first else "train") for role in networks
    }
    section = run.recipe.section("teacher", "student", "strategy") | code_section(run, networks)
    parents = {role: record.hash for role, record in records.items()}
    stage = run.begin("evaluation", section=section, parents=parents)
    if stage.record is not None:
        return stage.record
    logits: dict[str, dict[str, Tensor]] = {}
    costs: dict[str, Any] = {}
    for role, record in records.items():
        model = trained_model(run, role, record)
        costs[role] = asdict(model_cost(model, run.source.image_shape))
        with shown_progress(f"evaluating the {role}") as progress:
            logits[role] = {
                name: predict_logits(
                    model, run.source, getattr(run.splits, name), progress=progress
                )
                for name in SPLITS
            }
    members: list[dict[str, Any]] = []
    if is_ensemble(run):
        members, logits, costs = as_teacher(run, logits, costs, splits=SPLITS)
    metrics = {
        role: {name: metrics_of(run, logits, role, name) for name in SPLITS} for role in roles
    }
    with atomic_path(stage.folder / LOGITS_NAME) as temporary:
        save_file({f"{r}.{n}": logits[r][n] for r in logits for n in SPLITS}, temporary)
    payload = {
        "metrics": metrics,
        "costs": costs,
        "members": members,
        "mistakes": mistakes(run, {role: logits[role]["test"] for role in roles}),
        "paired": paired_counts(run, logits) if run.recipe.control else None,
    }
    return stage.finish(payload, files=[LOGITS_NAME])


def evaluated_roles(run: Run) -> list[str]:
    """Return which networks a run has, in the order of reports."""
    roles = {"teacher": bool(run.teachers), "student": True, "control": run.recipe.control}
    return [role for role, there in roles.items() if there]


def metrics_of(
    run: Run, logits: dict[str, dict[str, Tensor]], role: str, name: str
) -> dict[str, Any]:
    """Return one role's metrics on one split."""
    return evaluate_logits(
        logits[role][name],
        run.source.labels_N[getattr(run.splits, name)],
        class_names=run.source.class_names,
        teacher_logits_NK=logits["teacher"][name]
        if role != "teacher" and "teacher" in logits
        else None,
    ).to_json()


def paired_counts(run: Run, logits: dict[str, dict[str, Tensor]]) -> dict[str, int]:
    """Return how many test samples only the student, and only the control, gets right."""
    labels_N = run.source.labels_N[run.splits.test]
    student_N = logits["student"]["test"].argmax(1) == labels_N
    control_N = logits["control"]["test"].argmax(1) == labels_N
    return {
        "only_student_right": int((student_N & ~control_N).sum()),
        "only_control_right": int((control_N & ~student_N).sum()),
    }


def mistakes(run: Run, logits: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the test pictures on which the student is most confidently wrong, as PNG."""
    indices_N = run.splits.test
    labels_N = run.source.labels_N[indices_N]
    confidence_N, answer_N = logits["student"].softmax(1).max(1)
    confidence_N = torch.where(answer_N == labels_N, -1.0, confidence_N)
    worst = confidence_N.argsort(descending=True, stable=True)[:NUM_MISTAKES]
    rows = []
    for position in worst[confidence_N[worst] >= 0].tolist():
        index = int(indices_N[position])
        answers = {role: int(values[position].argmax()) for role, values in logits.items()}
        rows.append(
            {
                "index": index,
                "true_class": int(labels_N[position]),
                "student_class": answers["student"],
                "teacher_class": answers.get("teacher"),
                "control_class": answers.get("control"),
                "student_confidence": float(confidence_N[position]),
                "png_base64": png_base64(run.source.images(torch.tensor([index]))[0]),
            }
        )
    return rows


def png_base64(image_CHW: Tensor) -> str:
    """Return a uint8 picture as base64 PNG text."""
    pixels = image_CHW.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
