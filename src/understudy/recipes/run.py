"""A run folder: the recipe, one folder a stage, and the data that the stages share."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from understudy.artifacts import (
    RECORD_NAME,
    Record,
    hash_files,
    reusable_record,
    stage_key,
    write_text,
)
from understudy.data.sources import ImageSource, load_data
from understudy.data.splits import Splits, assign_splits
from understudy.data.views import Views
from understudy.errors import InputError, problem
from understudy.progress import log
from understudy.recipes.schema import Recipe
from understudy.runtime import derive_seed

KEY_NAME = "key"


def home_folder() -> Path:
    """Return where decoded pictures and teacher outputs are kept for all runs.

    ``UNDERSTUDY_HOME`` if set, otherwise the user's cache folder.
    """
    if named := os.environ.get("UNDERSTUDY_HOME"):
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "understudy"


@dataclass
class Run:
    """One run: the recipe and the folder that holds all of its records.

    Attributes:
        recipe: validated.
        folder: one folder a stage below it; nothing else is needed to continue or to report.
        home: decoded pictures and teacher outputs, shared by runs.
        reused: the stages that this process found finished.
    """

    recipe: Recipe
    folder: Path
    home: Path
    reused: set[str] = field(default_factory=set)

    @cached_property
    def source(self) -> ImageSource:
        """The pictures, loaded once."""
        data = self.recipe.data
        return load_data(
            data.source,
            splits={str(name): value for name, value in data.splits.items()}
            if data.splits is not None
            else None,
            image_column=data.image_column,
            label_column=data.label_column,
            image_size=data.image_size,
            on_bad=data.on_bad,
            memory_limit_bytes=data.memory_limit_bytes,
            cache=self.home / "data",
        )

    @cached_property
    def splits(self) -> Splits:
        """Which sample is for what: a function of the samples' identity and the seed."""
        data = self.recipe.data
        return assign_splits(
            self.source.sample_ids,
            self.source.given_splits,
            fractions={
                "validation": data.validation_fraction,
                "calibration": data.calibration_fraction,
                "test": data.test_fraction,
            },
            seed=self.recipe.seed,
            labels_N=self.source.labels_N,
            class_names=self.source.class_names,
        )

    @cached_property
    def views(self) -> Views:
        """The replayable views of the training split."""
        return Views(
            self.transforms,
            seed=derive_seed(self.recipe.seed, "views"),
            partner_pool=self.splits.train,
        )

    @property
    def transforms(self) -> list[dict[str, dict[str, Any]]]:
        """The transforms of the recipe; one without parameters has an empty mapping."""
        return self.recipe.views.spec

    def __getstate__(self) -> dict[str, Any]:
        """Leave loaded data out when a run is sent to another process, which loads its own."""
        return {name: vars(self)[name] for name in ("recipe", "folder", "home", "reused")}

    # Stages

    def parent(self, kind: str, command: str) -> Record:
        """Return the record of an earlier stage, or say which command makes it."""
        folder = self.folder / kind
        if not (folder / RECORD_NAME).exists():
            raise InputError(
                problem(
                    f"{self.folder} has no record of its {kind}",
                    expected="the stage before to be finished",
                    mend=f"Run `understudy {command} {self.folder}`, or `understudy distill` "
                    "for all stages.",
                )
            )
        record = Record.load(folder)
        if damaged := record.damaged_files(folder):
            raise InputError(
                problem(
                    f"{folder} holds changed or missing files: {', '.join(damaged)}",
                    expected="the files as their record describes them",
                    mend=f"Run `understudy {command} {self.folder}` to make them again.",
                )
            )
        return record

    def begin(
        self,
        kind: str,
        *,
        section: Mapping[str, Any],
        parents: Mapping[str, str],
        holds: Callable[[Record], bool] = lambda record: True,
    ) -> Stage:
        """Start a stage, or find that it is finished: then ``stage.record`` is its record.

        Work that an earlier process left unfinished stays in the folder if it belongs to the same
        key; anything else in the folder is removed. ``holds`` says whether what a record describes
        besides the files in its folder is still so.
        """
        key, folder = stage_key(kind, section, parents), self.folder / kind
        stage = Stage(kind, folder, key, self.recipe.seed, dict(section), dict(parents))
        record = reusable_record(folder, key)
        if record is not None and holds(record):
            stage.record = record
            log.info("%s: unchanged, reused", kind)
            self.reused.add(kind)
            return stage
        key_file = folder / KEY_NAME
        if folder.exists() and (not key_file.exists() or key_file.read_text() != key):
            shutil.rmtree(folder)
        (folder / RECORD_NAME).unlink(missing_ok=True)
        write_text(key_file, key)
        log.info("%s: started", kind)
        return stage


@dataclass
class Stage:
    """A stage at work in its folder. ``record`` is set where it was finished before."""

    kind: str
    folder: Path
    key: str
    seed: int
    section: dict[str, Any]
    parents: dict[str, str]
    record: Record | None = None
    started: float = field(default_factory=time.monotonic)

    def finish(
        self,
        payload: dict[str, Any],
        *,
        files: Sequence[str] = (),
        timing: Mapping[str, Any] | None = None,
    ) -> Record:
        """Write the stage's record. The files it names are in the folder already."""
        self.record = Record(
            kind=self.kind,
            key=self.key,
            seed=self.seed,
            payload=payload,
            parents=self.parents,
            recipe=self.section,
            files=hash_files(self.folder, list(files)),
            timing={"stage_seconds": time.monotonic() - self.started, **(timing or {})},
        )
        return self.record.save(self.folder)
