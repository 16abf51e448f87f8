"""Teacher outputs on disk: computed once, found by what they depend on, never silently wrong.

One entry holds one output of one teacher, its logits or the features at one tap, for one view of
the given samples, in a folder named by the hash of everything that determines them::

    ROOT/ENTRY/zarr.json     the array's metadata (Zarr 3: zstd, then crc32c over the bytes on disk)
    ROOT/ENTRY/c.CHUNK.0     1,024 rows each, fewer of large features; a chunk is written once,
                             whole, by rename
    ROOT/ENTRY/entry.json    what the entry is, the SHA-256 of zarr.json, and its own hash
    ROOT/ENTRY/seal.json     SHA-256 of every chunk, written when the last one is there

Any number of processes may write one entry: a short kernel lock covers each commit, and the first
to finish a chunk wins. A killed writer loses the chunk it was computing and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from understudy.errors import InputError, StoreError, problem
from understudy.teachers.entry import LOGITS, Entry, StoreKey
from understudy.teachers.entry_files import (
    MANIFEST_NAME,
    clear_disk_errors,
    create_metadata,
    entry_id_of,
    locked,
    looks_like_id,
)
from understudy.teachers.packing import FeatureFormat, OutputFormat, RowFormat

__all__ = [
    "CHUNK_ROWS",
    "LOGITS",
    "Entry",
    "EntryPlan",
    "OutputStore",
    "StoreKey",
    "entries_by_view",
    "feature_plan",
    "indices_sha256",
    "logits_plan",
]

log = logging.getLogger("understudy")

# Part of every address: outputs written under another layout or by another definition of a view's
# pixels are other outputs.
FORMAT_VERSION = 1
CHUNK_ROWS = 1024

# Chunks of large features have fewer rows, so that no reader or writer holds much at once.
MAX_FEATURE_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class EntryPlan:
    """What an entry is to hold: all that its address follows from. Making one touches no disk."""

    key: StoreKey
    layout: RowFormat
    indices_sha256: str
    num_rows: int
    chunk_rows: int

    @property
    def description(self) -> dict[str, Any]:
        """What the entry's manifest says."""
        return {
            "format_version": FORMAT_VERSION,
            "key": self.key.fields(),
            "sample_indices_sha256": self.indices_sha256,
            "num_rows": self.num_rows,
            "chunk_rows": self.chunk_rows,
            "format": asdict(self.layout),
        }

    @property
    def entry_id(self) -> str:
        """The entry's address in its store."""
        return entry_id_of(self.description)

    @property
    def num_chunks(self) -> int:
        """Chunks of the complete entry."""
        return -(-self.num_rows // self.chunk_rows)


def logits_plan(
    key: StoreKey,
    *,
    sample_indices_N: Tensor,
    num_classes: int,
    top_k: int | None = None,
    dtype: str = "float16",
) -> EntryPlan:
    """Return what ``OutputStore.entry`` makes of the same arguments."""
    if key.output != LOGITS:
        raise _wrong_output(key, "entry", f"'{LOGITS}'")
    layout = OutputFormat(num_classes, top_k, dtype)
    digest = indices_sha256(sample_indices_N)
    return EntryPlan(key, layout, digest, len(sample_indices_N), CHUNK_ROWS)


def feature_plan(
    key: StoreKey, *, sample_indices_N: Tensor, row_shape: Sequence[int], dtype: str = "float16"
) -> EntryPlan:
    """Return what ``OutputStore.feature_entry`` makes of the same arguments."""
    if key.output == LOGITS:
        raise _wrong_output(key, "feature_entry", "the key of a tap")
    layout = FeatureFormat(tuple(row_shape), dtype)
    digest = indices_sha256(sample_indices_N)
    return EntryPlan(key, layout, digest, len(sample_indices_N), _feature_chunk_rows(layout))


class OutputStore:
    """A folder of entries. Opening it touches nothing; entries are made when asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entry(
        self,
        key: StoreKey,
        *,
        sample_indices_N: Tensor,
        num_classes: int,
        top_k: int | None = None,
        dtype: str = "float16",
    ) -> Entry:
        """Return the entry for these logits, made empty when it does not exist yet.

        Args:
            key: what determines the logits.
            sample_indices_N: the samples, strictly ascending; row ``r`` belongs to the ``r``-th.
            num_classes: K.
            top_k: how many logits to keep; None keeps all.
            dtype: "float16" or "float32".

        Raises:
            InputError: impossible top_k or dtype; a key of features; indices that do not ascend.
            StoreError: the entry cannot be written.
        """
        return self.make(
            logits_plan(
                key,
                sample_indices_N=sample_indices_N,
                num_classes=num_classes,
                top_k=top_k,
                dtype=dtype,
            )
        )

    def feature_entry(
        self,
        key: StoreKey,
        *,
        sample_indices_N: Tensor,
        row_shape: Sequence[int],
        dtype: str = "float16",
    ) -> Entry:
        """Return the entry for the features at ``key.output``, made empty when there is none yet.

        Args:
            key: what determines the features; ``output`` is the tap's key.
            sample_indices_N: the samples, strictly ascending; row ``r`` belongs to the ``r``-th.
            row_shape: shape of one sample's features.
            dtype: "float16" or "float32".

        Raises:
            InputError: impossible shape or dtype; a key of logits; indices that do not ascend.
            StoreError: the entry cannot be written.
        """
        return self.make(
            feature_plan(key, sample_indices_N=sample_indices_N, row_shape=row_shape, dtype=dtype)
        )

    def make(self, plan: EntryPlan) -> Entry:
        """Return the entry of a plan, made empty when there is none yet."""
        description = plan.description
        path = self.root / plan.entry_id
        if not (path / MANIFEST_NAME).exists():
            with clear_disk_errors(path), locked(path):
                create_metadata(path, description)
        try:
            return Entry(path)
        except StoreError as error:
            # All of it follows from the address, so nothing is guessed by writing it again.
            log.warning("%s The entry's metadata is written again.", error)
            with clear_disk_errors(path), locked(path):
                create_metadata(path, description)
            return Entry(path)

    def open(self, entry_id: str) -> Entry:
        """Return an existing entry.

        Raises:
            StoreError: there is none of this name, or its metadata is damaged.
        """
        return Entry(self.root / entry_id)

    def entry_ids(self) -> list[str]:
        """Return the names of all entries, damaged ones included, in a fixed order."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if looks_like_id(path.name))


def entries_by_view(entries: Sequence[Entry], indices_N: Tensor) -> dict[int, dict[str, Entry]]:
    """Return the entries by view and output, views in the order in which they were given.

    Raises:
        StoreError: an entry is for other samples or there twice, or a view lacks its logits or
            features that another has.
    """
    digest = indices_sha256(indices_N)
    views: dict[int, dict[str, Entry]] = {}
    problems = []
    for entry in entries:
        view, output = entry.key.view, entry.key.output
        if entry.sample_indices_sha256 != digest:
            problems.append(
                problem(
                    f"entry {entry.entry_id} holds other samples than the {len(indices_N)} given",
                    expected="the indices the entry was made with",
                    mend="Ask the store for the entry of these indices.",
                )
            )
        if output in views.setdefault(view, {}):
            problems.append(f"view {view} was given two entries for {output}")
        views[view][output] = entry
    expected = {LOGITS, *(entry.key.output for entry in entries)}
    for view, outputs in views.items():
        missing = sorted(expected - outputs.keys())
        if missing:
            problems.append(
                problem(
                    f"view {view} was given no entry for {', '.join(missing)}",
                    expected="the logits and the same features in every view",
                    mend="Ask the store for an entry of each.",
                )
            )
    if problems:
        raise StoreError(*problems)
    return views


def _feature_chunk_rows(layout: FeatureFormat) -> int:
    """Return a power of two: chunks of every output then begin and end with those of the logits."""
    row_bytes = layout.num_columns * np.dtype(layout.word_dtype).itemsize
    num_rows = max(1, MAX_FEATURE_CHUNK_BYTES // row_bytes)
    return min(CHUNK_ROWS, 1 << (num_rows.bit_length() - 1))


def _wrong_output(key: StoreKey, method: str, expected: str) -> InputError:
    return InputError(
        problem(
            f"OutputStore.{method} was given a key whose output is '{key.output}'",
            expected=expected,
            mend="Use entry for logits and feature_entry for features.",
        )
    )


def indices_sha256(sample_indices_N: Tensor) -> str:
    """Return the hash of the samples an entry's rows belong to, which is part of its address.

    Raises:
        InputError: none, or not strictly ascending.
    """
    if len(sample_indices_N) == 0 or bool((sample_indices_N.diff() <= 0).any()):
        raise InputError(
            problem(
                f"{len(sample_indices_N)} sample indices that are empty or do not ascend",
                expected="ascending indices without repetition",
                mend="Sort them: row r of an entry belongs to the r-th index.",
            )
        )
    indices = np.ascontiguousarray(sample_indices_N.numpy(), dtype="<i8")
    return hashlib.sha256(indices.tobytes()).hexdigest()
