"""List, verify and clean a store of teacher outputs."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from understudy.errors import InputError, StoreError, problem
from understudy.runtime import derive_seed
from understudy.teachers.entry_files import (
    ARRAY_NAME,
    MANIFEST_NAME,
    SEAL_NAME,
    locked_if_free,
    read_manifest,
    restore_metadata,
)
from understudy.teachers.packing import FeatureFormat, OutputFormat
from understudy.teachers.store import Entry, EntryPlan, OutputStore, StoreKey

log = logging.getLogger("understudy")

# Temporary files of writers that were killed; a living writer's are younger.
LEFTOVER_AGE_S = 3600.0

# Given a key and row numbers, computes the teacher's ``key.output`` of these rows again.
Recompute = Callable[[StoreKey, Tensor], Tensor]


@dataclass(frozen=True)
class EntrySummary:
    """One line of ``understudy store list``: an entry of logits or of the features at one tap.

    What is None cannot be read any more, or is of the other kind: ``num_classes`` and ``top_k`` say
    how logits are stored, ``row_shape`` how features are. ``key.output`` names the output.
    """

    entry_id: str
    key: StoreKey | None
    num_rows: int | None
    num_classes: int | None
    top_k: int | None
    row_shape: tuple[int, ...] | None
    dtype: str | None
    size_bytes: int
    num_chunks: int | None
    num_chunks_present: int | None
    complete: bool
    last_used: float
    damage: str | None


@dataclass(frozen=True)
class Finding:
    """Something wrong in a store: in which entry and file, what, and whether it was repaired."""

    entry_id: str
    file: str
    message: str
    repaired: bool = False


def list_entries(store: OutputStore) -> list[EntrySummary]:
    """Return a summary of every entry. Sums no checksums: that is ``verify_store``."""
    return [_summary(store, entry_id) for entry_id in store.entry_ids()]


def verify_store(
    store: OutputStore,
    *,
    recompute: Recompute | None = None,
    entry_ids: Collection[str] | None = None,
    num_rows: int = 64,
    tolerance: float = 0.02,
    seed: int = 0,
    repair: bool = False,
) -> list[Finding]:
    """Check every byte of every entry, and compute a random sample of rows again.

    Args:
        store: the store.
        recompute: gives the values of ``key.output`` for (key, rows); None checks bytes only.
        entry_ids: the entries to check; None checks all. With ``recompute``, those it can answer.
        num_rows: rows an entry to compute again.
        tolerance: largest difference of a number, as a share of the row's largest absolute value
            (for logits of 1 where that is smaller).
        seed: of the choice of rows.
        repair: delete what is damaged, so that labelling again computes just that.

    Returns:
        Everything found; empty means that every file is as it was written.
    """
    findings = []
    # Without manifest and outputs: a writer was killed as it began, and nothing is lost.
    begun = [name for name in store.entry_ids() if _begun(store.root / name)]
    for entry_id in begun if entry_ids is None else sorted(entry_ids):
        found, entry = _check_files(store, entry_id, repair=repair)
        if entry is not None and recompute is not None:
            rows_N = _row_sample(entry, num_rows=num_rows, seed=seed)
            found += _check_rows(entry, rows_N, recompute, tolerance=tolerance, repair=repair)
        findings += found
    return findings


def unlabelled(store: OutputStore, plans: Sequence[EntryPlan]) -> list[Finding]:
    """Return what is not there, or not all of it, of what is to be stored; makes nothing.

    Chunks that are gone from a sealed entry are damage, which ``verify_store`` finds.
    """
    findings = []
    for plan in plans:
        path = store.root / plan.entry_id
        if not (path / SEAL_NAME).exists():
            names = (f"c.{chunk}.0" for chunk in range(plan.num_chunks))
            num_present = sum((path / name).exists() for name in names)
            message = f"not labelled: {num_present} of {plan.num_chunks} chunks"
            findings.append(
                Finding(plan.entry_id, f"{plan.key.output} of view {plan.key.view}", message)
            )
    return findings


def _begun(path: Path) -> bool:
    return (path / MANIFEST_NAME).exists() or any(path.glob("c.*"))


def collect_garbage(
    store: OutputStore,
    *,
    keep: Collection[str] | None = None,
    unused_for_s: float | None = None,
    incomplete: bool = False,
    idle_for_s: float = 0.0,
    dry_run: bool = False,
) -> list[EntrySummary]:
    """Delete entries that meet every given condition, and what killed writers left behind.

    An entry that another process holds at this moment stays.

    Args:
        store: the store.
        keep: entries to keep; all others may go.
        unused_for_s: only entries that nobody has written or read for so many seconds.
        incomplete: only entries that are not complete.
        idle_for_s: of those only what nobody has written for so long, as a labelling may be under
            way that holds no lock between two chunks.
        dry_run: say what would go and delete nothing.

    Returns:
        The entries that were (or would be) deleted.

    Raises:
        InputError: no condition at all, which would delete everything.
    """
    if keep is None and unused_for_s is None and not incomplete:
        raise InputError(
            problem(
                "no condition says which teacher outputs may go",
                expected="keep, unused_for_s or incomplete",
                mend="Name the entries to keep, an age, or only the incomplete ones.",
            )
        )
    doomed = []
    for entry_id in store.entry_ids():
        folder = store.root / entry_id
        with locked_if_free(folder) as is_free:
            summary = _summary(store, entry_id)
            age_s = time.time() - summary.last_used
            stays = [
                not is_free,
                keep is not None and entry_id in keep,
                # Said this way round, an age that is not a number spares everything.
                unused_for_s is not None and not age_s >= unused_for_s,
                incomplete and (summary.complete or age_s < idle_for_s),
            ]
            if not any(stays):
                doomed.append(summary)
                if not dry_run:
                    # The manifest goes first: a half-deleted entry is then one never made.
                    (folder / MANIFEST_NAME).unlink(missing_ok=True)
                    shutil.rmtree(folder, ignore_errors=True)
            elif not dry_run:
                _delete_leftovers(folder)
    return doomed


def _summary(store: OutputStore, entry_id: str) -> EntrySummary:
    folder = store.root / entry_id
    stats = _stats(folder)
    entry, damage = None, None
    try:
        entry = store.open(entry_id)
    except StoreError as error:
        damage = str(error)
    missing = entry.missing_chunks() if entry else []
    layout = entry.format if entry else None
    logits = layout if isinstance(layout, OutputFormat) else None
    return EntrySummary(
        entry_id=entry_id,
        key=entry.key if entry else None,
        num_rows=entry.num_rows if entry else None,
        num_classes=logits.num_classes if logits else None,
        top_k=logits.top_k if logits else None,
        row_shape=layout.row_shape if isinstance(layout, FeatureFormat) else None,
        dtype=layout.dtype if layout else None,
        size_bytes=sum(stat.st_size for stat in stats),
        num_chunks=entry.num_chunks if entry else None,
        num_chunks_present=entry.num_chunks - len(missing) if entry else None,
        complete=entry.complete if entry else False,
        last_used=max((stat.st_mtime for stat in stats), default=0.0),
        damage=damage,
    )


def _stats(folder: Path) -> list[os.stat_result]:
    """Return the facts of the files in a folder, without those that go away meanwhile."""
    stats = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                stats.append(path.stat())
    return stats


def _check_files(
    store: OutputStore, entry_id: str, *, repair: bool
) -> tuple[list[Finding], Entry | None]:
    """Return the damage in one entry's files, and the entry if its metadata is usable."""
    folder = store.root / entry_id
    findings = []
    try:
        read_manifest(folder)
    except StoreError as error:
        # Labelling writes it again: the folder's name is the hash of all that it said.
        if repair:
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
        return [Finding(entry_id, MANIFEST_NAME, str(error), repair)], None
    try:
        entry = store.open(entry_id)
    except StoreError as error:
        findings.append(Finding(entry_id, ARRAY_NAME, str(error), repair))
        if not repair:
            return findings, None
        restore_metadata(folder)
        entry = store.open(entry_id)
    try:
        bad_chunks = entry.damaged_chunks()
    except StoreError as error:
        findings.append(Finding(entry_id, SEAL_NAME, str(error), repair))
        if not repair:
            return findings, entry
        (folder / SEAL_NAME).unlink(missing_ok=True)
        bad_chunks = entry.damaged_chunks()
    findings += [
        Finding(entry_id, entry.chunk_path(chunk).name, "its bytes are not those written", repair)
        for chunk in bad_chunks
    ]
    if (folder / SEAL_NAME).exists():
        findings += [
            Finding(entry_id, entry.chunk_path(chunk).name, "it was deleted after sealing", repair)
            for chunk in entry.missing_chunks()
        ]
    if repair and bad_chunks:
        entry.drop_chunks(bad_chunks)
    if repair:
        entry.seal()
    return findings, entry


def _row_sample(entry: Entry, *, num_rows: int, seed: int) -> Tensor:
    present = [chunk for chunk in range(entry.num_chunks) if entry.has_chunk(chunk)]
    rows = [row for chunk in present for row in range(*entry.chunk_range(chunk))]
    generator = np.random.default_rng(derive_seed(seed, "verify", entry.entry_id))
    chosen = generator.choice(rows, size=min(num_rows, len(rows)), replace=False)
    return torch.from_numpy(np.sort(chosen).astype(np.int64))


def _check_rows(
    entry: Entry, rows_N: Tensor, recompute: Recompute, *, tolerance: float, repair: bool
) -> list[Finding]:
    bad_chunks = {}
    for chunk in torch.unique(rows_N // entry.chunk_rows).tolist():
        chunk_rows_N = rows_N[rows_N // entry.chunk_rows == chunk]
        try:
            words = entry.read_words(chunk)[(chunk_rows_N - entry.chunk_range(chunk)[0]).numpy()]
        except StoreError:
            continue  # found by its checksum already
        again = recompute(entry.key, chunk_rows_N).float().cpu().numpy()
        limits_N = tolerance * entry.format.magnitudes(again)
        wrong = entry.format.max_differences(words, again) > limits_N
        if wrong.any():
            bad_chunks[chunk] = chunk_rows_N[torch.from_numpy(wrong)].tolist()
    if repair and bad_chunks:
        entry.drop_chunks(list(bad_chunks))
    return [
        Finding(
            entry.entry_id,
            entry.chunk_path(chunk).name,
            f"rows {rows[:5]} are not what the teacher answers now ({len(rows)} wrong rows of the "
            "sample in this chunk)",
            repair,
        )
        for chunk, rows in bad_chunks.items()
    ]


def _delete_leftovers(folder: Path) -> None:
    for path in folder.glob(".*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
                path.unlink()
