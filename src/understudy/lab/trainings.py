"""Trainings of the lab: ordinary runs, of which a longer one goes on where a shorter one is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from understudy import stages
from understudy.artifacts import RECORD_NAME, Record, stage_key, write_text
from understudy.errors import InputError, problem
from understudy.progress import log
from understudy.recipes.run import KEY_NAME, Run, home_folder, key_in
from understudy.recipes.schema import parse_recipe
from understudy.recipes.train import role_section, training_parents
from understudy.train.monitor import METRICS_NAME

# Unfinished trainings for more epochs than this are begun anew where other epochs are asked for.
MOST_EPOCHS = 1000


def on_labels(recipe: Mapping[str, Any], folder: Path) -> Record:
    """Train the recipe's teacher network on labels, and return its record."""
    extend(recipe, folder, "teacher")
    stages.teach(recipe, out=folder)
    return Record.load(folder / "teacher")


def distilled(recipe: Mapping[str, Any], folder: Path) -> Record:
    """Train the teacher (unless it is given), label, train the student; return its record."""
    if recipe["teacher"].get("training") is not None:
        on_labels(recipe, folder)
    else:
        stages.teach(recipe, out=folder)
    stages.label(recipe, out=folder)
    extend(recipe, folder, "student")
    return stages.train(recipe, out=folder)


def together(recipe: Mapping[str, Any], folder: Path) -> Record:
    """Train teacher and student in the same steps; return the student's record."""
    extend(recipe, folder, "student")
    return stages.train(recipe, out=folder)


def extend(recipe: Mapping[str, Any], folder: Path, role: str) -> None:
    """Let a training of other epochs go on to those of the recipe instead of beginning anew.

    With a constant learning rate, and nothing else that depends on the length, the first epochs of
    a longer training are those of a shorter one. The stage's checkpoint holds all that is needed;
    what ties the folder to the other recipe is its key, so that is what changes here.

    Raises:
        InputError: more epochs are done, or begun, than the recipe has.
    """
    stage = folder / role
    try:
        found = finished(stage) if (stage / RECORD_NAME).is_file() else begun(recipe, folder, role)
    except InputError:
        return  # the stage itself says what is wrong
    if found is None:
        return
    section, parents = found
    given = training_in(recipe, role)["num_epochs"]
    training, least = training_in(section, role), num_epochs_begun(stage)
    if training["num_epochs"] == given:
        return
    if least > given:
        raise InputError(
            problem(
                f"{stage} was trained for {least} epochs, and {given} are asked for",
                expected="at least as many as there are",
                mend="Raise --epochs (or --grid-epochs), or choose another --out.",
            )
        )
    log.info("%s: goes on to %d epochs in place of %d", stage, given, training["num_epochs"])
    training["num_epochs"] = given
    write_text(stage / KEY_NAME, stage_key(role, section, parents))
    (stage / RECORD_NAME).unlink(missing_ok=True)


def finished(stage: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a finished training was made with, and from."""
    record = Record.load(stage)
    return copy.deepcopy(record.recipe), record.parents


def begun(
    recipe: Mapping[str, Any], folder: Path, role: str
) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Return the same of an unfinished training that differs from the recipe's in its epochs alone.

    All that it has told of its settings is the hash of them: its epochs are those that give it.
    """
    if (key := key_in(folder / role)) is None:
        return None
    run = Run(parse_recipe(dict(recipe)), folder, home_folder())
    section = role_section(run, role)
    parents = {record.kind: record.hash for record in training_parents(run, role)}
    for num_epochs in range(1, MOST_EPOCHS + 1):
        training_in(section, role)["num_epochs"] = num_epochs
        if stage_key(role, section, parents) == key:
            return section, parents
    return None


def training_in(section: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Return the training section of a role."""
    found: dict[str, Any] = (section["teacher"] if role == "teacher" else section)["training"]
    return found


def num_epochs_begun(stage: Path) -> int:
    """Return the epochs that a training has done, the one that it is in counted; 0: there is none.

    Raises:
        InputError: its record is damaged.
    """
    if (stage / RECORD_NAME).is_file():
        return len(Record.load(stage).payload["rows"])
    try:
        return len((stage / METRICS_NAME).read_text().splitlines()) + 1
    except FileNotFoundError:
        return 0


def curve(record: Record) -> list[list[float]]:
    """Return [epoch from 1, training accuracy, validation accuracy] of every epoch.

    Training accuracy is the mean over the epoch's updates, dropout at work.
    """
    return [
        [row["epoch"] + 1, row["train_accuracy"], row["validation_accuracy"]]
        for row in record.payload["rows"]
        if "validation_accuracy" in row
    ]


def seconds(record: Record) -> list[float]:
    """Return the seconds of every epoch, validation left out."""
    return [row["seconds"] for row in record.timing["rows"]]
