"""``understudy store``: what is stored, whether it is intact, and what may go."""

from __future__ import annotations

from pathlib import Path

from understudy.errors import InputError, StoreError, problem
from understudy.recipes.run import home_folder
from understudy.teachers.maintenance import (
    LEFTOVER_AGE_S,
    EntrySummary,
    collect_garbage,
    list_entries,
    verify_store,
)
from understudy.teachers.store import OutputStore

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
        StoreError: something is damaged; everything found is listed.
    """
    store = open_store(folder)
    findings = verify_store(store, repair=repair)
    checked = f"{len(store.entry_ids())} entries"
    if run_folder is not None:
        from understudy.recipes.job import existing_run, open_run
        from understudy.recipes.label import recomputation
        from understudy.recipes.outputs import run_entry_ids

        run = open_run(existing_run(run_folder))
        entry_ids = run_entry_ids(run)
        findings += verify_store(
            store, recompute=recomputation(run), entry_ids=entry_ids, repair=repair
        )
        checked += f", of which {len(entry_ids)} recomputed in part"
    if findings:
        mended = "removed; run labelling again to make it anew" if repair else "run with --repair"
        raise StoreError(
            *(
                f"{f.entry_id[:12]}/{f.file}: {f.message} ({mended})"
                for f in dict.fromkeys(findings)
            )
        )
    return f"{checked}: every file is as it was written"


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
