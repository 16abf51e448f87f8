"""The lab's records: one an item, keyed by what it depends on, so that a finished one is kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from understudy.artifacts import Record, exclusive, reusable_record, stage_key
from understudy.errors import InputError, problem
from understudy.lab.paper import ITEMS, Lab, teacher_tag
from understudy.progress import log
from understudy.recipes.check import check_folder

# Of every item that was run one, and of the accuracies one for each dropout rate.
Records = Mapping[str, Sequence[Record]]


def run_items(lab: Lab, names: Sequence[str]) -> dict[str, list[Record]]:
    """Run items that are not finished; return the records of all that are in the folder.

    Raises:
        InputError: an item has no such name, lacks a teacher, or the folder cannot be written.
    """
    unknown = [name for name in names if name not in ITEMS]
    if unknown:
        raise InputError(
            problem(
                f"--only {', '.join(unknown)}",
                expected=f"some of {', '.join(ITEMS)}",
                mend="Correct it, or leave --only out to run all.",
            )
        )
    if problems := check_folder(lab.folder):
        raise InputError(*problems)
    with exclusive(lab.folder):
        for name in names:
            run_item(lab, name)
    return finished_items(lab)


def run_item(lab: Lab, name: str) -> Record:
    """Return the record of an item, running it unless it is finished with this setting."""
    section = {"setting": asdict(lab.setting), **asked_of(lab, name)}
    folder = lab.folder / name
    if name == "accuracy":
        folder /= f"dropout-{lab.setting.dropout:g}"
    key = stage_key(f"lab-{name}", section, {})
    record = reusable_record(folder, key)
    if record is not None:
        log.info("lab %s: unchanged, reused", name)
        return record
    log.info("lab %s: started", name)
    started = time.monotonic()
    payload = ITEMS[name](lab)
    return Record(
        kind=f"lab-{name}",
        key=key,
        seed=lab.setting.seed,
        payload=payload,
        recipe=section,
        timing={"seconds": time.monotonic() - started},
    ).save(folder)


def asked_of(lab: Lab, name: str) -> dict[str, Any]:
    """Return what an item depends on besides the setting."""
    if name == "pretrained":
        return {"teacher": None if lab.teacher is None else teacher_tag(lab.teacher)}
    if name == "dropout":
        return {"grid_epochs": lab.grid_epochs, "rates": list(lab.rates)}
    if name in ("alpha", "temperature"):
        return {"grid_epochs": lab.grid_epochs}
    return {"layers": list(lab.layers)} if name == "accuracy" else {}


def finished_items(lab: Lab) -> dict[str, list[Record]]:
    """Return the records that the folder holds, whatever setting they are of.

    Several of an item have ascending dropout rates.
    """
    found = {}
    for name in ITEMS:
        folder = lab.folder / name
        folders = folder.glob("dropout-*") if name == "accuracy" else [folder]
        if records := [record for one in folders if (record := readable_record(one)) is not None]:
            found[name] = sorted(records, key=lambda r: r.recipe["setting"]["dropout"])
    return found


def readable_record(folder: Path) -> Record | None:
    """Return a folder's record; None where there is none that can be read."""
    try:
        return Record.load(folder)
    except InputError:
        return None
