"""Stage 1, the splits: which sample is for what, and what is known of the data."""

from __future__ import annotations

from dataclasses import asdict, fields

import torch
from safetensors.torch import save_file

from understudy.artifacts import Record, atomic_path
from understudy.recipes.run import Run

SPLITS_NAME = "splits.safetensors"


def split(run: Run) -> Record:
    """Load the data, check it, split it by sample identity and store the splits."""
    section = run.recipe.section("data", "seed")
    parents = {"data": run.source.fingerprint}
    stage = run.begin("split", section=section, parents=parents)
    if stage.record is not None:
        return stage.record
    parts = {field.name: getattr(run.splits, field.name) for field in fields(run.splits)}
    with atomic_path(stage.folder / SPLITS_NAME) as temporary:
        save_file({name: indices.contiguous() for name, indices in parts.items()}, temporary)
    source = run.source
    num_classes = len(source.class_names)
    labels = {name: source.labels_N[indices] for name, indices in parts.items()}
    payload = {
        "fingerprint": source.fingerprint,
        "image_shape": list(source.image_shape),
        "class_names": list(source.class_names),
        "num_samples": {name: len(indices) for name, indices in parts.items()},
        "class_counts": {
            name: torch.bincount(labels_N[labels_N >= 0], minlength=num_classes).tolist()
            for name, labels_N in labels.items()
        },
        "num_unlabelled": int((source.labels_N < 0).sum()),
        "issues": [asdict(issue) for issue in source.issues],
    }
    return stage.finish(payload, files=[SPLITS_NAME])
