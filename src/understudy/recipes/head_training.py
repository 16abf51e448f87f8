"""How one head is trained: embeddings in the place of pictures, in the common loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.data.batches import Batch
from understudy.evaluate.accuracy import predict_logits
from understudy.heads.tasks import TaskHead, TaskLabels, ViewOrder, embedding_source
from understudy.progress import shown_progress
from understudy.recipes.head_settings import HeadSettings
from understudy.recipes.run import Run, Stage
from understudy.recipes.trunk import embeddings
from understudy.runtime import derive_seed
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.devices import make_fabric
from understudy.train.distillation import DistillObjective
from understudy.train.feed import Feed, ViewPlan
from understudy.train.loop import train
from understudy.train.objective import LabelObjective, Objective
from understudy.train.plan import TrainPlan
from understudy.train.settings import TrainSettings
from understudy.train.terms import TermContext, build_terms


@dataclass(frozen=True, eq=False)
class HeadRows:
    """The embeddings that a head is trained and watched on, of samples with a known label.

    Attributes:
        embeddings_MD: one view of the training split after the other.
        labels_M: their labels.
        num_views: M is this many times the number of samples.
        validation_ND: embeddings of the validation split.
        validation_labels_N: their labels.
        class_names: of the task.
    """

    embeddings_MD: Tensor
    labels_M: Tensor
    num_views: int
    validation_ND: Tensor
    validation_labels_N: Tensor
    class_names: tuple[str, ...]


def head_rows(run: Run, role: str, labels: TaskLabels, num_views: int) -> HeadRows:
    """Return the embeddings of student or teacher with the labels of a task."""
    views = [f"view-{view}" for view in range(num_views)]
    parts = embeddings(run, role, [*views, "validation"])
    train_labels_N = labels.labels_N[run.splits.train]
    validation_labels_N = labels.labels_N[run.splits.validation]
    known_N, known_validation_N = train_labels_N >= 0, validation_labels_N >= 0
    return HeadRows(
        torch.cat([parts[view][known_N] for view in views]),
        train_labels_N[known_N].repeat(num_views),
        num_views,
        parts["validation"][known_validation_N],
        validation_labels_N[known_validation_N],
        labels.class_names,
    )


class ProbeTeacher:
    """Answers with the logits of a head on the teacher's embeddings: a ``TeacherSource``.

    Args:
        probe: in evaluation mode.
        embeddings_MD: of the teacher, row by row those of the student's ``HeadRows``.
    """

    def __init__(self, probe: nn.Module, embeddings_MD: Tensor) -> None:
        self.probe, self.embeddings_MD = probe, embeddings_MD

    def outputs(self, batch: Batch, *, view: int) -> TeacherOutputs:
        """Return the probe's logits for the batch's rows."""
        with torch.no_grad():
            return TeacherOutputs(self.probe(self.embeddings_MD[batch.indices_N]))


@dataclass(frozen=True, eq=False)
class Guidance:
    """A teacher, and how a head learns from it."""

    teacher: ProbeTeacher
    objective: Objective


@dataclass(frozen=True, eq=False)
class Trained:
    """A head with its trained weights, in evaluation mode, and the rows of its training."""

    head: TaskHead
    rows: list[dict[str, Any]]


def guided_objective(settings: HeadSettings, rows: HeadRows) -> Objective:
    """Return the losses by which a head learns from the probe and the labels."""
    context = TermContext(
        student_shapes={},
        teacher_shapes={},
        train_indices_N=torch.arange(len(rows.labels_M)),
        train_labels_N=rows.labels_M,
        prior_KK=None,
    )
    return DistillObjective(
        settings.distillation,
        settings.training.label_smoothing,
        terms=build_terms(settings.distillation, context),
    )


def fit(
    stage: Stage,
    name: str,
    rows: HeadRows,
    settings: TrainSettings,
    *,
    seed: int,
    hidden: Sequence[int] = (),
    guidance: Guidance | None = None,
) -> Trained:
    """Train one head in ``name`` below the stage's folder, from where an earlier process stopped.

    A head and its control have the same first weights, order and number of updates.
    """
    lineage = ("heads", stage.kind, "probe" if name == "probe" else "head")
    torch.manual_seed(derive_seed(seed, "weights", *lineage))
    head = TaskHead(rows.embeddings_MD.shape[1], len(rows.class_names), hidden)
    head.standardize(rows.embeddings_MD)
    num_rows = len(rows.labels_M) // rows.num_views
    feed = Feed(
        source=embedding_source(rows.embeddings_MD, rows.labels_M, rows.class_names),
        views=None,
        indices_N=torch.arange(num_rows),
        batch_size=settings.batch_size,
        view_plan=ViewPlan(rows.num_views),
        seed=derive_seed(seed, "order", *lineage),
        teacher=None if guidance is None else guidance.teacher,
        curriculum=ViewOrder(rows.num_views, num_rows),
    )
    objective = LabelObjective(settings.label_smoothing) if guidance is None else guidance.objective
    # Embeddings have no channels to put last.
    settings = settings.model_copy(update={"channels_last": False})
    folder = stage.folder / name
    folder.mkdir(exist_ok=True)
    plan = TrainPlan(feed, objective, settings, watch(rows), folder)
    fabric = make_fabric(precision=settings.precision)
    fabric.launch()
    with shown_progress(f"training {stage.kind}, {name}") as progress:
        result = train(head, plan, fabric=fabric, progress=progress)
    head.load_state_dict(result.weights)
    return Trained(head.cpu().eval(), result.rows)


def watch(rows: HeadRows) -> Callable[[nn.Module], dict[str, float]]:
    """Return the function that watches a head on the validation split."""
    source = embedding_source(rows.validation_ND, rows.validation_labels_N, rows.class_names)
    indices_N = torch.arange(source.num_samples)

    def validate(network: nn.Module) -> dict[str, float]:
        logits_NK = predict_logits(network, source, indices_N)
        answers_N = logits_NK.argmax(dim=1)
        return {
            "accuracy": (answers_N == source.labels_N).double().mean().item(),
            "nll": F.cross_entropy(logits_NK.double(), source.labels_N).item(),
        }

    return validate
