"""Trainings of the lab: ordinary runs, of which a longer one goes on where a shorter one ended."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from understudy import stages
from understudy.artifacts import RECORD_NAME, Record, stage_key, write_text
from understudy.errors import InputError, problem
from understudy.progress import log
from understudy.recipes.run import KEY_NAME


def on_labels(recipe: Mapping[str, Any], folder: Path) -> Record:
    """Train the recipe's teacher network on labels, and return its record."""
    extend(folder / "teacher", recipe["teacher"]["training"]["num_epochs"], "teacher")
    stages.teach(recipe, out=folder)
    return Record.load(folder / "teacher")


def distilled(recipe: Mapping[str, Any], folder: Path) -> Record:
    """Train the teacher (unless it is given), label, train the student; return its record."""
    if recipe["teacher"].get("training") is not None:
        on_labels(recipe, folder)
    else:
        stages.teach(recipe, out=folder)
    stages.label(recipe, out=folder)
    extend(folder / "student", recipe["training"]["num_epochs"], "training")
    return stages.train(recipe, out=folder)


def together(recipe: Mapping[str, Any], folder: Path) -> Record:
    """Train teacher and student in the same steps; return the student's record."""
    extend(folder / "student", recipe["training"]["num_epochs"], "training")
    return stages.train(recipe, out=folder)


def extend(folder: Path, num_epochs: int, section: str) -> None:
    """Let a finished, shorter training go on to ``num_epochs`` instead of beginning anew.

    With a constant learning rate, and nothing else that depends on the length, the first epochs of
    a longer training are those of a shorter one. The stage's checkpoint holds all that is needed;
    what ties the folder to the shorter recipe is its key, so that is what changes here.
    """
    if not (folder / RECORD_NAME).is_file():
        return
    try:
        record = Record.load(folder)
    except InputError:
        return  # the stage itself says what is wrong
    recipe = copy.deepcopy(record.recipe)
    training = recipe[section]["training"] if section == "teacher" else recipe[section]
    if training["num_epochs"] == num_epochs:
        return
    if training["num_epochs"] > num_epochs:
        raise InputError(
            problem(
                f"{folder} was trained for {training['num_epochs']} epochs, and {num_epochs} are "
                "asked for",
                expected="at least as many as there are",
                mend="Raise --epochs (or --grid-epochs), or choose another --out.",
            )
        )
    log.info("%s: goes on from epoch %d to %d", folder, training["num_epochs"], num_epochs)
    training["num_epochs"] = num_epochs
    write_text(folder / KEY_NAME, stage_key(record.kind, recipe, record.parents))
    (folder / RECORD_NAME).unlink()


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
