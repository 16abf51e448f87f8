"""The stored outputs of a run's teachers: where they are, and the source that answers from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from understudy.artifacts import Record, content_hash, file_hash
from understudy.data.batches import Batch
from understudy.data.splits import spread
from understudy.errors import StoreError, problem
from understudy.models.own_code import code_hash
from understudy.models.taps import Tap, kind_shape, tap_shapes
from understudy.recipes.networks import (
    WEIGHTS_NAME,
    conversions,
    model_folder,
    settings_hash,
    trained_model,
)
from understudy.recipes.run import Run
from understudy.recipes.strategies import Ensemble
from understudy.teachers.ensemble import EnsembleTeacher
from understudy.teachers.entry_files import SEAL_NAME
from understudy.teachers.label import view_keys
from understudy.teachers.outputs import TeacherOutputs
from understudy.teachers.store import Entry, EntryPlan, OutputStore, feature_plan, logits_plan
from understudy.teachers.stored import StoredTeacher, check_complete
from understudy.train.feed import TeacherSource
from understudy.train.objective import value_at
from understudy.train.terms import teacher_taps

# Of outputs by that of the labelling, where the words differ. Labels from 8-bit weights, which were
# "int8", are others.
STORED_PRECISIONS = {"auto": "float32", "int8": "int8 of 7-bit weights"}
NUM_SAMPLE_IMAGES = 512


def sample_pictures(run: Run) -> Tensor:
    """Return the training samples that a teacher's runtime is chosen and int8 calibrated with.

    The first ones where they show every class, so that what was stored with them stays in use.
    Those of a folder that is sorted by class do not.
    """
    train_N = run.splits.train
    return (
        spread(train_N, NUM_SAMPLE_IMAGES) if spreads_sample(run) else train_N[:NUM_SAMPLE_IMAGES]
    )


def spreads_sample(run: Run) -> bool:
    """Return whether the first training samples lack a class, and there are others."""
    labels_N = run.source.labels_N[run.splits.train[:NUM_SAMPLE_IMAGES]]
    num_shown = len(set(labels_N[labels_N >= 0].tolist()))
    return len(run.splits.train) > NUM_SAMPLE_IMAGES and num_shown < len(run.source.class_names)


def stored_precision(run: Run) -> str:
    """Return the precision of a run's stored outputs, which is part of their address."""
    precision = run.recipe.labelling.precision
    is_spread = precision == "int8" and spreads_sample(run)
    return STORED_PRECISIONS.get(precision, precision) + (", spread sample" if is_spread else "")


def teacher_features(run: Run, role: str) -> list[Tap]:
    """Return the layers of one teacher that the losses look at, named as in its own network.

    With several teachers a layer is named with its member before it: ``2/layer3``.
    """
    taps = teacher_taps(run.recipe.distillation)
    if len(run.teachers) == 1:
        return taps
    prefix = f"{list(run.teachers).index(role) + 1}/"
    return [Tap(t.name.removeprefix(prefix), t.kind) for t in taps if t.name.startswith(prefix)]


def open_entries(run: Run, role: str, *, with_features: bool = True) -> list[Entry]:
    """Return the store's entries of one teacher, made empty where they are not there yet."""
    store = OutputStore(run.home / "outputs")
    return [store.make(plan) for plan in entry_plans(run, role, with_features=with_features)]


def entry_plans(run: Run, role: str, *, with_features: bool = True) -> list[EntryPlan]:
    """Return what is stored of one teacher: its logits in every view, and features in losses."""
    labelling = run.recipe.labelling
    common: dict[str, Any] = {
        "teacher": teacher_identity(run, role, run.parent(role, "teach")),
        "num_views": run.recipe.views.num_views,
        "precision": stored_precision(run),
    }
    plans = [
        logits_plan(
            key,
            sample_indices_N=run.splits.train,
            num_classes=len(run.source.class_names),
            top_k=labelling.top_k,
        )
        for key in view_keys(run.source, run.views, **common)
    ]
    taps = teacher_features(run, role) if with_features else []
    shapes = feature_shapes(run, role, taps) if taps else {}
    return plans + [
        feature_plan(key, sample_indices_N=run.splits.train, row_shape=shapes[key.output])
        for tap in taps
        for key in view_keys(run.source, run.views, **common, output=tap.key)
    ]


def feature_shapes(run: Run, role: str, taps: list[Tap]) -> dict[str, tuple[int, ...]]:
    """Return the shape of one sample's features for every tap, by its key."""
    model = trained_model(run, role, run.parent(role, "teach"))
    shapes = tap_shapes(model, run.source.image_shape)
    return {tap.key: kind_shape(shapes[tap.name], tap.kind) for tap in taps}


def stored_hashes(run: Run) -> dict[str, str]:
    """Return the hash of every entry.

    They are part of the record, so a student is trained again when its teacher's outputs change.

    Raises:
        StoreError: an entry is not complete: another process removed some of it.
    """
    entries = [entry for role in run.teachers for entry in open_entries(run, role)]
    check_complete(entries)
    try:
        return {entry.entry_id: file_hash(entry.path / SEAL_NAME) for entry in entries}
    except FileNotFoundError as error:
        raise StoreError(
            problem(
                f"{error.filename} was removed by another process",
                expected="the outputs that were just labelled",
                mend="Run the labelling stage again; it computes only what is missing.",
            )
        ) from None


def holds_all(run: Run, record: Record) -> bool:
    """Return whether all that the record of a labelling describes is stored, and nothing lacks."""
    try:
        return bool(stored_hashes(run) == record.payload["entries"])
    except StoreError:
        return False


def run_plans(run: Run) -> list[EntryPlan]:
    """Return what this run stores, whether it is there or not; nothing where it stores nothing."""
    if not run.stores_outputs:
        return []
    return [plan for role in run.teachers for plan in entry_plans(run, role)]


def stored_teacher(run: Run) -> TeacherSource:
    """Return the teacher, or the several as one, that answers from the store."""
    return as_one(
        run, [StoredTeacher(open_entries(run, role), run.splits.train) for role in run.teachers]
    )


def as_one(run: Run, members: Sequence[TeacherSource]) -> TeacherSource:
    """Return the only teacher, or an ensemble's as the strategy combines them."""
    strategy = run.recipe.strategy
    if not isinstance(strategy, Ensemble):
        return members[0]
    return EnsembleTeacher(
        members,
        combine=strategy.combine,
        validation_accuracies=[validation_accuracy(run, role) for role in run.teachers],
        temperature=value_at(run.recipe.distillation.temperature, 0.5),
    )


def stored_outputs(run: Run, indices_N: Tensor, *, view: int) -> TeacherOutputs:
    """Return the logits that are stored of these samples of the training split in one view.

    Features are left out: those of all samples at once may not fit into memory.
    """
    no_images_NCHW = run.source.images(indices_N[:0])
    batch = Batch(indices_N, no_images_NCHW, run.source.labels_N[indices_N])
    members = [
        StoredTeacher(open_entries(run, role, with_features=False), run.splits.train)
        for role in run.teachers
    ]
    return as_one(run, members).outputs(batch, view=view)


def validation_accuracy(run: Run, role: str) -> float:
    """Return what a teacher was found to reach on the validation split, in [0, 1]."""
    payload = run.parent(role, "teach").payload
    if "rows" not in payload:
        return float(payload["validation_accuracy"])
    accuracies = [row.get("validation_accuracy", 0.0) for row in payload["rows"]]
    training = run.teachers[role].training
    is_best = training is not None and training.keep == "best"
    return float(max(accuracies) if is_best else accuracies[-1])


def teacher_identity(run: Run, role: str, record: Record) -> str:
    """Return the hash of everything that decides a teacher's outputs."""
    section: dict[str, Any] = run.teachers[role].model_dump(
        mode="json", include={"model", "color_order", "class_names"}
    )
    weights = record.files.get(WEIGHTS_NAME) or record.parents["weights"]
    known: list[Any] = [section, weights, list(run.source.class_names)]
    model = run.teachers[role].model
    # More where more decides, so that what was stored of all others stays in use. Roles are left
    # out: the same teacher may have another one elsewhere.
    if (code := code_hash(model.name)) is not None:
        known.append({"code": code})
    if (folder := model_folder(model)) is not None:
        known.append({"settings": settings_hash(folder), "conversions": conversions(run, role)})
    return content_hash(known)


def mean_confidence(run: Run) -> float:
    """Return the mean largest probability of the first view's soft targets.

    At the temperature of the loss, in the middle of training: where it is near 1, the soft targets
    say little more than the labels do.
    """
    temperature = value_at(run.recipe.distillation.temperature, 0.5)
    logits_NK = stored_outputs(run, run.splits.train, view=0).logits_NK
    return float((logits_NK / temperature).softmax(dim=1).amax(dim=1).mean())
