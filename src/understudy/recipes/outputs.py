"""The stored outputs of a run's teacher: where they are, and the teacher that answers from them."""

from __future__ import annotations

from typing import Any

from understudy.artifacts import Record, content_hash, file_hash
from understudy.recipes.networks import WEIGHTS_NAME
from understudy.recipes.run import Run
from understudy.teachers.entry_files import SEAL_NAME
from understudy.teachers.label import StoredTeacher, view_keys
from understudy.teachers.store import Entry, OutputStore
from understudy.train.objective import value_at


def open_entries(run: Run) -> list[Entry]:
    """Return the store's entry of every view, made empty where it is not there yet."""
    labelling = run.recipe.labelling
    store = OutputStore(run.home / "outputs")
    keys = view_keys(
        run.source,
        run.views,
        teacher=teacher_identity(run, run.parent("teacher", "teach")),
        num_views=run.recipe.views.num_views,
        precision="float32" if labelling.precision == "auto" else labelling.precision,
    )
    return [
        store.entry(
            key,
            sample_indices_N=run.splits.train,
            num_classes=len(run.source.class_names),
            top_k=labelling.top_k,
        )
        for key in keys
    ]


def stored_hashes(run: Run) -> dict[str, str]:
    """Return the hash of the outputs of every view that is complete.

    They are part of the record, so a student is trained again when its teacher's outputs change.
    """
    entries = open_entries(run)
    return {e.entry_id: file_hash(e.path / SEAL_NAME) for e in entries if e.complete}


def run_entry_ids(run: Run) -> list[str]:
    """Return the names of this run's entries."""
    return [entry.entry_id for entry in open_entries(run)]


def stored_teacher(run: Run) -> StoredTeacher:
    """Return the teacher that answers from the store."""
    return StoredTeacher(open_entries(run), run.splits.train)


def teacher_identity(run: Run, record: Record) -> str:
    """Return the hash of everything that decides the teacher's outputs."""
    section: dict[str, Any] = run.recipe.teacher.model_dump(
        mode="json", include={"model", "color_order", "class_names"}
    )
    weights = record.files.get(WEIGHTS_NAME) or record.parents["weights"]
    return content_hash([section, weights, list(run.source.class_names)])


def mean_confidence(run: Run) -> float:
    """Return the mean largest probability of the first view's soft targets.

    At the temperature of the loss, in the middle of training: where it is near 1, the soft targets
    say little more than the labels do.
    """
    temperature = value_at(run.recipe.distillation.temperature, 0.5)
    outputs_NK = stored_teacher(run).outputs(run.splits.train, view=0)
    return float((outputs_NK / temperature).softmax(dim=1).amax(dim=1).mean())
