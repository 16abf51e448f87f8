"""Heads for more tasks: trained on the embeddings of the finished student, which stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from understudy.artifacts import Record, atomic_path, content_hash, write_json
from understudy.evaluate.task_scores import baselines, nesting_of, score_task
from understudy.export.parity import require_parity
from understudy.export.task_heads import TrunkRuntime, check_head_parity, export_head
from understudy.heads.tasks import OwnHead, TaskHead, TaskLabels, Trunk
from understudy.progress import log
from understudy.recipes.export import parity_pictures, parity_section
from understudy.recipes.head_check import labels_of
from understudy.recipes.head_training import (
    Guidance,
    ProbeTeacher,
    Trained,
    fit,
    guided_objective,
    head_rows,
)
from understudy.recipes.networks import WEIGHTS_NAME
from understudy.recipes.run import Run, Stage
from understudy.recipes.train import untimed
from understudy.recipes.trunk import (
    TRUNK_NAME,
    answers_section,
    embeddings,
    export_own_trunk,
    head_name,
    head_transforms,
    trunk_of,
)

HEADS_FOLDER = "heads"
REPORT_NAME = "report.json"
SPLITS = ("validation", "test")


def train_heads(run: Run) -> list[Record]:
    """Train, export and evaluate the head of every task of the recipe."""
    return [train_head(run, task) for task in run.recipe.heads]


def train_head(run: Run, task: str) -> Record:
    """Train one head on the student's embeddings, and write its file, scores and record.

    Raises:
        ParityError: trunk and head as files differ from what was trained.
    """
    settings, trunk_record = run.recipe.heads[task], export_own_trunk(run)
    parents = {"trunk": trunk_record.hash, "split": run.parent("split", "teach").hash}
    if settings.teacher:
        parents["teacher"] = run.parent("teacher", "teach").hash
    section = {
        **run.recipe.section("seed", "device", "export"),
        **parity_section(run),
        "views": [run.views.seed, head_transforms(run)],
        "head": settings.model_dump(mode="json"),
        "labels": content_hash(list(run.source.metadata[settings.label_column])),
        **(answers_section(run) if settings.teacher else {}),
    }
    stage = run.begin(f"{HEADS_FOLDER}/{task}", section=section, parents=parents)
    if stage.record is not None:
        return stage.record
    labels = labels_of(run, task)
    rows = head_rows(run, "student", labels, settings.num_views)
    trained: dict[str, Trained] = {}
    source: ProbeTeacher | None = None
    if settings.teacher:
        teacher_rows = head_rows(run, "teacher", labels, settings.num_views)
        trained["probe"] = fit(stage, "probe", teacher_rows, settings.probe, seed=run.recipe.seed)
        source = ProbeTeacher(trained["probe"].head, teacher_rows.embeddings_MD)
        trained["control"] = fit(
            stage, "control", rows, settings.training, seed=run.recipe.seed, hidden=settings.hidden
        )
    trained["head"] = fit(
        stage,
        "head",
        rows,
        settings.training,
        seed=run.recipe.seed,
        hidden=settings.hidden,
        guidance=None if source is None else Guidance(source, guided_objective(settings, rows)),
    )
    return finish(run, stage, labels, trained)


def finish(run: Run, stage: Stage, labels: TaskLabels, trained: Mapping[str, Trained]) -> Record:
    """Export the head, evaluate everything on validation and test, and write it down."""
    task, trunk, head = stage.folder.name, trunk_of(run), trained["head"].head
    path = stage.folder / head_name(task)
    facts = export_head(
        head,
        path,
        trunk=trunk,
        task=task,
        class_names=labels.class_names,
        opset=run.recipe.export.opset,
    )
    parity = check_head_parity(
        nn.Sequential(trunk, head),
        TrunkRuntime(run.folder / "trunk" / TRUNK_NAME).add_head(task, path),
        task,
        run.source.images(parity_pictures(run)),
        tolerance=run.recipe.export.parity_tolerance,
    )
    require_parity(parity, path)
    with atomic_path(stage.folder / WEIGHTS_NAME) as temporary:
        save_file(head.state_dict(), temporary)
    payload = {
        "task": task,
        "label_column": run.recipe.heads[task].label_column,
        "class_names": list(labels.class_names),
        "num_params": {
            name: sum(p.numel() for p in one.head.parameters()) for name, one in trained.items()
        },
        **evaluate_heads(run, trunk, labels, {name: one.head for name, one in trained.items()}),
        "facts": facts.to_json(),
        "parity": parity.to_json(),
        "trunk": trunk.identity(),
        "rows": {name: [untimed(row) for row in one.rows] for name, one in trained.items()},
    }
    write_json(stage.folder / REPORT_NAME, payload)
    for name in trained:
        accuracy = payload["scores"][name]["test"]["accuracy"]
        shown = "not measured" if accuracy is None else f"{100 * accuracy:.2f} % test accuracy"
        log.info("%s, %s: %s", stage.kind, name, shown)
    seconds = {name: sum(row["seconds"] for row in one.rows) for name, one in trained.items()}
    return stage.finish(
        payload, files=[WEIGHTS_NAME, path.name, REPORT_NAME], timing={"train_seconds": seconds}
    )


@torch.inference_mode()
def evaluate_heads(
    run: Run, trunk: Trunk, labels: TaskLabels, heads: Mapping[str, TaskHead]
) -> dict[str, Any]:
    """Return the scores of every head on both splits, and of what needs no head."""
    train_labels_N = labels.labels_N[run.splits.train]
    known_N = train_labels_N >= 0
    nesting = nesting_of(
        run.source.labels_N[run.splits.train],
        train_labels_N,
        num_own=len(run.source.class_names),
        num_task=len(labels.class_names),
    )
    own = OwnHead(trunk, run.source.image_shape).eval()
    student = embeddings(run, "student", SPLITS)
    teacher = embeddings(run, "teacher", SPLITS) if "probe" in heads else {}
    scores: dict[str, dict[str, Any]] = {name: {} for name in heads}
    simple, paired = {}, {}
    for split in SPLITS:
        labels_N = labels.labels_N[getattr(run.splits, split)]
        own_N = own(student[split]).argmax(dim=1)
        right = {}
        for name, head in heads.items():
            logits_NK = head((teacher if name == "probe" else student)[split])
            scores[name][split] = score_task(
                logits_NK, labels_N, own_N=own_N, nesting=nesting
            ).to_json()
            right[name] = logits_NK.argmax(dim=1) == labels_N
        simple[split] = baselines(labels_N, train_labels_N[known_N], own_N=own_N, nesting=nesting)
        if "control" in heads:
            paired[split] = {
                "only_head_right": int((right["head"] & ~right["control"]).sum()),
                "only_control_right": int((right["control"] & ~right["head"]).sum()),
            }
    return {
        "scores": scores,
        "baselines": simple,
        "paired": paired or None,
        "nesting": {"kind": nesting.kind, "share": nesting.share},
        "num_train": int(known_N.sum()),
    }
