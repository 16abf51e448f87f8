"""``understudy store``: what is stored, whether it is intact, and what may go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from understudy.errors import InputError, StoreError, problem
from understudy.recipes.run import Run, home_folder
from understudy.teachers.entry_files import MANIFEST_NAME
from understudy.teachers.maintenance import (
    LEFTOVER_AGE_S,
    EntrySummary,
    Finding,
    collect_garbage,
    list_entries,
    unlabelled,
    verify_store,
)
from understudy.teachers.store import EntryPlan, OutputStore, StoreKey

SECONDS_PER_DAY = 86_400


def open_store(folder: Path | None) -> OutputStore:
    """Return the store in this folder, by default the one that all runs share."""
    if folder is not None and not folder.is_dir():
        raise InputError(
            problem(
                f"{folder} is no folder",
                expected="a store of teacher outputs",
                mend="Leave --store out for the one that all runs share.",
            )
        )
    return OutputStore(folder or home_folder() / "outputs")


def list_store(folder: Path | None) -> str:
    """Return one line an entry, and the sum."""
    store = open_store(folder)
    entries = list_entries(store)
    lines = [
        f"{'entry':12}  {'teacher':10}  {'data':10}  {'view':>4}  {'rows':>9}  {'MB':>8}  "
        f"{'state':16}  output"
    ]
    lines += [line_of(entry) for entry in entries]
    total = sum(entry.size_bytes for entry in entries)
    lines.append(f"{len(entries)} entries, {total / 1e6:.1f} MB in {store.root}")
    return "\n".join(lines)


def line_of(entry: EntrySummary) -> str:
    """Return an entry as a line of the table."""
    teacher, data, view, output = "?", "?", "?", ""
    if entry.key is not None:
        teacher, data, view = entry.key.teacher[:10], entry.key.data[:10], str(entry.key.view)
        output = entry.key.output
    state = "complete" if entry.complete else f"{entry.num_chunks_present} of {entry.num_chunks}"
    return (
        f"{entry.entry_id[:12]}  {teacher:10}  {data:10}  {view:>4}  {entry.num_rows or 0:>9,}  "
        f"{entry.size_bytes / 1e6:>8.2f}  {entry.damage or state:16}  {output}".rstrip()
    )


def verify(folder: Path | None, *, run_folder: str | None, repair: bool) -> str:
    """Check every byte; with a run, also compute a random sample of its rows again.

    Raises:
        StoreError: something is damaged, or the run's outputs are not all there; everything found
            is listed.
    """
    store = open_store(folder)
    run, plans = (None, []) if run_folder is None else _run_and_plans(run_folder)
    # Before anything is repaired: what is removed then is found by itself.
    lacking = unlabelled(store, plans)
    findings = verify_store(store, repair=repair)
    checked = f"{len(store.entry_ids())} entries"
    if run is not None and plans:
        compared, found = _compare(run, store, plans, repair=repair)
        findings += found
        checked += f", of which {compared} recomputed in part"
    removed = "removed; run labelling again to make it anew" if repair else "run with --repair"
    lines = [
        f"{f.entry_id[:12]}/{f.file}: {f.message} ({removed})" for f in dict.fromkeys(findings)
    ]
    lines += [
        f"{f.entry_id[:12]}, {f.file}: {f.message} (run `understudy label {run_folder}`)"
        for f in lacking
    ]
    if lines:
        raise StoreError(*lines)
    if run is not None and not plans:
        why = "labelling.live" if run.teaches_first else "no teacher before its student"
        checked += f", nothing stored of {run_folder} ({why})"
    return f"{checked}: every file is as it was written"


def _run_and_plans(run_folder: str) -> tuple[Run, list[EntryPlan]]:
    from understudy.recipes.job import existing_run, open_run
    from understudy.recipes.outputs import run_plans

    run = open_run(existing_run(run_folder))
    return run, run_plans(run)


def _compare(
    run: Run, store: OutputStore, plans: Sequence[EntryPlan], *, repair: bool
) -> tuple[int, list[Finding]]:
    """Compute rows of a run's entries again; return in how many some were there, and findings."""
    from understudy.recipes.label import recomputation

    compared: set[StoreKey] = set()
    recompute = recomputation(run)

    def counted(key: StoreKey, rows_N: Tensor) -> Tensor:
        compared.add(key)
        return recompute(key, rows_N)

    # One without a manifest is not there, or its damage is known already.
    there = [p.entry_id for p in plans if (store.root / p.entry_id / MANIFEST_NAME).is_file()]
    findings = verify_store(store, recompute=counted, entry_ids=there, repair=repair)
    return len(compared), findings


def remove(
    folder: Path | None, *, older_than_days: float | None, incomplete: bool, dry_run: bool
) -> str:
    """Remove entries that meet every given condition; say which."""
    if older_than_days is None and not incomplete:
        raise InputError(
            problem(
                "no condition says which teacher outputs may go",
                expected="--older-than-days or --incomplete",
                mend="Give one of them; with --dry-run nothing is removed yet.",
            )
        )
    if older_than_days is not None and not 0 <= older_than_days < math.inf:
        raise InputError(
            problem(
                f"--older-than-days {older_than_days:g} is no age",
                expected="0 or more days",
                mend="Give a number of days; 0 removes all that no process works on.",
            )
        )
    unused_for_s = None if older_than_days is None else older_than_days * SECONDS_PER_DAY
    gone = collect_garbage(
        open_store(folder),
        unused_for_s=unused_for_s,
        incomplete=incomplete,
        idle_for_s=LEFTOVER_AGE_S,
        dry_run=dry_run,
    )
    verb = "would be removed" if dry_run else "removed"
    total = sum(entry.size_bytes for entry in gone)
    return "\n".join([*map(line_of, gone), f"{len(gone)} entries, {total / 1e6:.1f} MB {verb}"])
