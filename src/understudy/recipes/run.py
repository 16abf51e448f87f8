"""A run folder: the recipe, one folder a stage, and the data that the stages share."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.artifacts import (
    RECORD_NAME,
    Record,
    clear_parts,
    content_hash,
    hash_files,
    reusable_record,
    stage_key,
    write_text,
)
from understudy.data.sources import ImageSource, load_data
from understudy.data.splits import Splits, assign_splits, fewer_training_samples
from understudy.data.unlabelled import (
    hidden_labels,
    hide_labels,
    join_unlabelled,
    load_unlabelled,
)
from understudy.data.view_spec import mixed_throughout
from understudy.data.views import Views
from understudy.errors import InputError, problem
from understudy.progress import log
from understudy.recipes.schema import Recipe
from understudy.recipes.sections import ModelSection, TeacherSection
from understudy.recipes.strategies import Ensemble, Mutual
from understudy.runtime import derive_seed

KEY_NAME = "key"
REPORT_NAME = "report"
# Stages' folders of other settings, each with the start of its key.
REPLACED_NAME = "replaced"


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
        step: its name, where it is a step of a chain and not the whole run.
        steps: the steps of a chain before this one; the last of them trains this one's teacher.
        derived_from: what the user wrote, where the recipe was made from that; else None.
        watch: told the rows of the student's training; may end it by raising.
        shared_threads: this process's share of the cores, used where the recipe names no number;
            None: all. It is no part of the recipe, so another share goes on with the same work.
    """

    recipe: Recipe
    folder: Path
    home: Path
    reused: set[str] = field(default_factory=set)
    step: str = ""
    steps: tuple[Run, ...] = ()
    derived_from: Recipe | None = None
    watch: Callable[[Mapping[str, Any]], None] | None = None
    shared_threads: int | None = None

    @property
    def num_threads(self) -> int | None:
        """Threads of this process; None: all cores, or their share among its processes."""
        return self.recipe.device.num_threads or self.shared_threads

    @property
    def asked(self) -> Recipe:
        """The recipe as the user wrote it."""
        return self.derived_from or self.recipe

    @property
    def recipe_hash(self) -> str:
        """The hash of the whole recipe as the user wrote it, by which reports name it.

        Files name a part of it by the key of their network's record: a change to the rest, such as
        another target beside them, leaves them as they are.
        """
        return content_hash(self.asked.model_dump(mode="json"))

    def seed_for(self, *purpose: str) -> int:
        """Return a seed for one purpose, in every step of a chain another one."""
        return derive_seed(self.recipe.seed, *purpose, *([self.step] if self.step else []))

    @cached_property
    def source(self) -> ImageSource:
        """The pictures, loaded once; training pictures without a label come last or have -1."""
        data, source = self.recipe.data, self.labelled_source
        if data.unlabelled is not None:
            more = load_unlabelled(
                data.unlabelled,
                image_column=data.image_column,
                image_size=data.image_size,
                on_bad=data.on_bad,
                memory_limit_bytes=data.memory_limit_bytes,
                cache=self.home / "data",
            )
            source = join_unlabelled(source, more)
        if data.labelled_fraction < 1:
            hidden_N = hidden_labels(
                source,
                self.labelled_splits.train,
                fraction=data.labelled_fraction,
                seed=self.split_seed,
            )
            source = hide_labels(source, hidden_N)
        return source

    @cached_property
    def labelled_source(self) -> ImageSource:
        """The pictures of ``data.source`` with all of their labels."""
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

    @property
    def split_seed(self) -> int:
        """The seed of the splits."""
        given = self.recipe.data.split_seed
        return self.recipe.seed if given is None else given

    @cached_property
    def splits(self) -> Splits:
        """Which sample is for what; what has no label from the start is for training."""
        found = self.labelled_splits
        more_N = torch.arange(self.labelled_source.num_samples, self.source.num_samples)
        return replace(found, train=torch.cat([found.train, more_N])) if len(more_N) else found

    @property
    def labelled_train_N(self) -> Tensor:  # noqa: N802
        """The samples of the training split that have a label."""
        train_N = self.splits.train
        return train_N[self.source.labels_N[train_N] >= 0]

    @cached_property
    def labelled_splits(self) -> Splits:
        """The splits of ``data.source``: a function of the samples' identity and the seed."""
        data, source = self.recipe.data, self.labelled_source
        found = assign_splits(
            source.sample_ids,
            source.given_splits,
            fractions={
                "validation": data.validation_fraction,
                "calibration": data.calibration_fraction,
                "test": data.test_fraction,
            },
            seed=self.split_seed,
            labels_N=source.labels_N,
            class_names=source.class_names,
        )
        return fewer_training_samples(found, data.num_train_samples, seed=self.split_seed)

    @cached_property
    def views(self) -> Views:
        """The replayable views of the training split."""
        return self._views(self.transforms)

    @cached_property
    def teacher_views(self) -> Views:
        """Those a teacher trains on, one for each of its epochs: all of them mixed or none."""
        return self._views(mixed_throughout(self.transforms))

    def _views(self, transforms: list[dict[str, dict[str, Any]]]) -> Views:
        seed = self.recipe.views.seed
        return Views(
            transforms,
            seed=derive_seed(self.recipe.seed if seed is None else seed, "views"),
            partner_pool=self.splits.train,
        )

    @property
    def teachers(self) -> dict[str, TeacherSection]:
        """The teachers by role: "teacher", and those of an ensemble after it "teacher-2" and so on.

        Empty where the strategy has none.
        """
        first, strategy = self.recipe.teacher, self.recipe.strategy
        sections = [] if first is None else [first]
        if isinstance(strategy, Ensemble):
            sections += strategy.teachers
        return {
            "teacher" if number == 1 else f"teacher-{number}": section
            for number, section in enumerate(sections, start=1)
        }

    @property
    def peers(self) -> dict[str, ModelSection]:
        """The networks that learn with the student by role, "peer-1" and so on; mostly none."""
        strategy = self.recipe.strategy
        if not isinstance(strategy, Mutual):
            return {}
        sections = strategy.peers or (self.recipe.student.model,)
        return {f"peer-{number}": section for number, section in enumerate(sections, start=1)}

    @property
    def stores_outputs(self) -> bool:
        """Whether the student learns from stored outputs."""
        return self.teaches_first and not self.recipe.labelling.live

    @property
    def teaches_first(self) -> bool:
        """Whether there is a teacher that knows the task before the student starts."""
        return bool(self.teachers) and self.recipe.strategy.stored

    @property
    def live_section(self) -> dict[str, Any]:
        """What the answers of a teacher depend on that is run on every batch; else nothing."""
        if not self.teaches_first or self.stores_outputs:
            return {}
        return {"labelling": {"precision": self.recipe.labelling.precision}}

    @property
    def transforms(self) -> list[dict[str, dict[str, Any]]]:
        """The transforms of the recipe; one without parameters has an empty mapping."""
        return self.recipe.views.spec

    def __getstate__(self) -> dict[str, Any]:
        """Leave loaded data out when a run is sent to another process, which loads its own."""
        kept = ("recipe", "folder", "home", "reused", "step", "shared_threads")
        return {name: vars(self)[name] for name in kept}

    # Stages

    def parent(self, kind: str, command: str) -> Record:
        """Return the record of an earlier stage, or say which command makes it."""
        folder, whole = self.folder / kind, self.folder.parents[1] if self.step else self.folder
        if not (folder / RECORD_NAME).exists():
            raise InputError(
                problem(
                    f"{self.folder} has no record of its {kind}",
                    expected="the stage before to be finished",
                    mend=f"Run `understudy {command} {whole}`, or `understudy distill` "
                    "for all stages.",
                )
            )
        record = Record.load(folder)
        if damaged := record.damaged_files(folder):
            raise InputError(
                problem(
                    f"{folder} holds changed or missing files: {', '.join(damaged)}",
                    expected="the files as their record describes them",
                    mend=f"Run `understudy {command} {whole}` to make them again.",
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

        Work of the same key that an earlier process left goes on. Work of another key is set aside
        in ``replaced``, and taken back when its settings are: hours of training are not lost
        because a setting was tried. ``holds`` says whether what a record describes besides the
        files in its folder is still so.
        """
        key, folder = stage_key(kind, section, parents), self.folder / kind
        title = f"{self.step}/{kind}" if self.step else kind
        stage = Stage(kind, folder, key, self.recipe.seed, dict(section), dict(parents))
        clear_parts(folder, below=True)
        if (record := reusable_record(folder, key)) is None:
            self._change_folders(kind, key, title)
            record = reusable_record(folder, key)
        if record is not None and holds(record):
            stage.record = record
            log.info("%s: unchanged, reused", title)
            self.reused.add(kind)
            return stage
        (folder / RECORD_NAME).unlink(missing_ok=True)
        write_text(folder / KEY_NAME, key)
        log.info("%s: started", title)
        return stage

    def _change_folders(self, kind: str, key: str, title: str) -> None:
        """Set the folder of a stage aside where it is of another key; take back what is of this."""
        folder = self.folder / kind
        if folder.exists() and (found := key_in(folder)) != key:
            aside = self.folder / REPLACED_NAME / f"{kind}-{(found or 'unknown')[:12]}"
            log.info("%s: made with other settings before, kept in %s", title, aside)
            move_folder(folder, aside)
        aside = self.folder / REPLACED_NAME / f"{kind}-{key[:12]}"
        if not folder.exists() and key_in(aside) == key:
            log.info("%s: taken back from %s", title, aside)
            move_folder(aside, folder)


def key_in(folder: Path) -> str | None:
    """Return the key of the work in a stage's folder, None where there is none."""
    try:
        return (folder / KEY_NAME).read_text()
    except OSError:
        return None


def move_folder(folder: Path, to: Path) -> None:
    """Move a folder to another name on the same disk, in the place of what is there."""
    if to.exists():
        shutil.rmtree(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    folder.replace(to)


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
