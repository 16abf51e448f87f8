"""Probes: short trainings of one student by each candidate teacher, and without a teacher.

A probe is an ordinary run with a recipe derived from the user's: strategy ``offline``, another
seed, fewer epochs and samples. Splits and views are those of the first seed in all of them, so
nobody is validated on what a teacher was trained on, and a view is labelled once for all seeds.
"""

from __future__ import annotations

from understudy.artifacts import Record
from understudy.compress.settings import CompressionSection
from understudy.evaluate.accuracy import predict_logits
from understudy.evaluate.budget import Budget
from understudy.progress import log, shown_progress
from understudy.recipes.files import save_recipe
from understudy.recipes.label import label
from understudy.recipes.networks import WEIGHTS_NAME, is_onnx, normalization_of, trained_model
from understudy.recipes.outputs import stored_outputs, validation_accuracy
from understudy.recipes.prepare import split
from understudy.recipes.rank_profile import RIGHT_NAME, save_right
from understudy.recipes.rank_settings import CONTROL_NAME, ProbeSection
from understudy.recipes.run import Run
from understudy.recipes.sections import TeacherSection
from understudy.recipes.strategies import Offline
from understudy.recipes.teach import teach_one
from understudy.recipes.train import train_role
from understudy.train.distill_settings import DistillSettings
from understudy.train.loss_table import LOSSES
from understudy.train.settings import TrainSettings

PROBES_NAME = "probes"
CANDIDATES_NAME = "candidates"
VALIDATION_NAME = "validation"


def candidate_run(run: Run, name: str, section: TeacherSection) -> Run:
    """Return the run in which a candidate is loaded or trained, on the whole training split."""
    recipe = run.recipe
    changes = {
        "name": f"{recipe.name}-{name}",
        "strategy": Offline(),
        "teacher": section,
        "candidates": {},
        "data": recipe.data.model_copy(update={"unlabelled": None}),
        "distillation": logit_losses(recipe.distillation),
        "labelling": recipe.labelling.model_copy(update={"live": False}),
        "finetuning": None,
        "heads": {},
        "exits": None,
        "control": False,
        "budget": Budget(),
        "compression": CompressionSection(),
    }
    made = recipe.model_copy(update=changes)
    return sharing(Run(made, run.folder / CANDIDATES_NAME / name, run.home), run, "source")


def logit_losses(settings: DistillSettings) -> DistillSettings:
    """Return the losses without those on layers, whose names differ from teacher to teacher."""
    kept = {name: loss for name, loss in settings.losses.items() if LOSSES[name].reads == "logits"}
    values = {**settings.model_dump(), "losses": {n: loss.model_dump() for n, loss in kept.items()}}
    return DistillSettings.model_validate(values)


def probe_run(run: Run, candidate: Run, name: str, number: int) -> Run:
    """Return one probe of a candidate, to be trained with the seed of this number from 0.

    ``name`` is the candidate's, or the control's, which differs in the folder only.
    """
    recipe = candidate.recipe
    settings = recipe.probe
    views = recipe.views
    changes = {
        "name": f"{recipe.name}-probe",
        "seed": recipe.seed + number,
        "teacher": finished_teacher(candidate),
        "data": recipe.data.model_copy(
            update={
                "split_seed": candidate.split_seed,
                "num_train_samples": settings.num_of(len(candidate.splits.train)),
            }
        ),
        "views": views.model_copy(
            update={
                "seed": recipe.seed if views.seed is None else views.seed,
                "num_views": min(views.num_views, settings.num_epochs),
            }
        ),
        "training": probe_training(recipe.training, settings),
    }
    folder = run.folder / PROBES_NAME / f"{name}-{recipe.seed + number}"
    return sharing(Run(recipe.model_copy(update=changes), folder, run.home), run, "source")


def sharing(made: Run, run: Run, *names: str) -> Run:
    """Return a run that has these parts of another one at hand, as far as that has."""
    vars(made).update({name: vars(run)[name] for name in names if name in vars(run)})
    return made


def finished_teacher(candidate: Run, role: str = "teacher") -> TeacherSection:
    """Return a run's teacher with the weights that it has after ``teach``, as they are on disk.

    Its normalisation is written out: that of a teacher that was trained here comes from the whole
    training split, and a probe may have a part of it.
    """
    section = candidate.teachers[role]
    if is_onnx(section.model):
        return section
    model = section.model.model_copy(update={"normalization": normalization_of(candidate, role)})
    checkpoint = candidate.folder / role / WEIGHTS_NAME
    return section.model_copy(update={"model": model, "checkpoint": checkpoint, "training": None})


def probe_training(training: TrainSettings, probe: ProbeSection) -> TrainSettings:
    """Return the training, shortened: the same schedule in fewer epochs.

    The last weights count, without averaging over updates, of which a short training has few.
    """
    schedule = training.learning_rate_schedule
    share = probe.num_epochs / training.num_epochs
    shortened = schedule.model_copy(update={"warmup_epochs": schedule.warmup_epochs * share})
    changes = {
        "num_epochs": probe.num_epochs,
        "learning_rate_schedule": shortened,
        "validate_every_epochs": probe.num_epochs,
        "keep": "last",
        "ema_decay": None,
        "last_views": None,
    }
    return training.model_copy(update=changes)


def run_probe(probe: Run, candidate: Run) -> Record:
    """Train a candidate's student, continuing what an earlier process left; validate it."""
    save_recipe(probe.recipe, probe.folder)
    split(probe)
    teach_one(probe, "teacher", known_accuracy=validation_accuracy(candidate, "teacher"))
    label(probe)
    train_role(probe, "student")
    return validate(probe, "student")


def run_control(probe: Run) -> Record:
    """Train and validate the same student without a teacher."""
    save_recipe(probe.recipe.model_copy(update={"control": True}), probe.folder)
    split(probe)
    train_role(probe, CONTROL_NAME)
    return validate(probe, CONTROL_NAME)


def validate(probe: Run, role: str) -> Record:
    """Return the record of what a probe's student does on the validation split.

    It holds which pictures are answered rightly, and what there is to learn from the teacher: how
    sure it is, and how often right, on the pictures that the student is shown.
    """
    student = probe.parent(role, "train")
    stage = probe.begin(VALIDATION_NAME, section={"role": role}, parents={role: student.hash})
    if stage.record is not None:
        return stage.record
    indices_N = probe.splits.validation
    model = trained_model(probe, role, student)
    with shown_progress(f"validating the {role}") as progress:
        logits_NK = predict_logits(model, probe.source, indices_N, progress=progress)
    right_N = logits_NK.argmax(1) == probe.source.labels_N[indices_N]
    save_right(stage.folder, right_N)
    payload = {
        "accuracy": right_N.double().mean().item(),
        "num_steps": student.payload["num_steps"],
        "confidence": student.payload.get("teacher_confidence"),
        "view_accuracy": view_accuracy(probe) if role == "student" else None,
    }
    log.info("%s: %.2f %% validation accuracy", probe.folder.name, 100 * payload["accuracy"])
    return stage.finish(payload, files=[RIGHT_NAME])


def view_accuracy(probe: Run) -> float | None:
    """Return how often the teacher is right on the first view; None where views mix pictures."""
    if probe.views.mixes:
        return None
    train_N = probe.splits.train
    answers_N = stored_outputs(probe, train_N, view=0).logits_NK.argmax(1)
    return (answers_N == probe.source.labels_N[train_N]).double().mean().item()
