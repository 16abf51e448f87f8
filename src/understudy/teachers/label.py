"""Compute and store the teacher's outputs for every view of the training samples."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.data.batches import iter_view_batches
from understudy.data.images import ImageSource
from understudy.data.views import Views
from understudy.errors import ModelError, problem
from understudy.runtime import keep_freed_memory
from understudy.teachers.outputs import Infer, TeacherOutputs, answered
from understudy.teachers.store import LOGITS, Entry, StoreKey, entries_by_view

log = logging.getLogger("understudy")


@dataclass(frozen=True)
class LabelReport:
    """What labelling did.

    Attributes:
        num_computed: rows computed now, over all views; one row is all outputs of one picture.
        num_reused: rows that were there already.
        num_repaired: chunks that were damaged and computed again.
        seconds: time taken by all of it.
        images_per_second: throughput of views, teacher and store together; 0 if all was there.
    """

    num_computed: int
    num_reused: int
    num_repaired: int
    seconds: float
    images_per_second: float


def view_keys(
    source: ImageSource,
    views: Views | None,
    *,
    teacher: str,
    num_views: int,
    precision: str,
    output: str = LOGITS,
) -> list[StoreKey]:
    """Return the address part of every view; untouched images (``views`` None) have one view.

    ``output`` is "logits", or the key of a tap for its features.
    """
    seed = views.seed if views is not None else 0
    transforms = ["untouched"]
    if views is not None:
        transforms = [views.fingerprint(view) for view in range(num_views)]
    return [
        StoreKey(teacher, source.facts.fingerprint, transform, seed, view, precision, output)
        for view, transform in enumerate(transforms)
    ]


def label_views(
    infer: Infer,
    source: ImageSource,
    views: Views | None,
    indices_N: Tensor,
    *,
    entries: Sequence[Entry],
    batch_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> LabelReport:
    """Store the teacher's outputs of every view that lacks them.

    May be stopped at any moment and started again, and run by several processes at once: whole
    chunks are kept, missing and damaged ones are computed. The teacher runs once on a picture,
    whatever is stored of it; where one output lacks a chunk, the teacher runs on its rows again,
    and what the others have of them is left as it is.

    Args:
        infer: uint8 images NCHW to float32 logits_NK, or to logits and features
            (``fast_inference`` and its ``outputs``).
        source: the pictures.
        views: how they are shown; None for untouched images.
        indices_N: the samples, ascending; row r of an entry belongs to the r-th.
        entries: for each view to label its logits (``OutputStore.entry``) and any features
            (``OutputStore.feature_entry``), in any order.
        batch_size: images the teacher is given at once.
        progress: called with (rows done, rows in all) after every batch.

    Raises:
        ModelError: the teacher answers with another number of classes, or without the features.
        StoreError: an entry is for other samples or missing in a view, an output cannot be stored,
            the disk is full.
    """
    started = time.perf_counter()
    groups = [list(outputs.values()) for outputs in entries_by_view(entries, indices_N).values()]
    num_repaired = sum(_repair(entry) for entry in entries)
    num_rows = len(groups) * len(indices_N)
    num_missing = sum(
        stop - start for group in groups for start, stop in _missing_blocks(group, len(indices_N))
    )
    num_reused, num_computed = num_rows - num_missing, 0
    if progress is not None:
        progress(num_reused, num_rows)
    for group in groups:
        for num_more in _label_view(infer, source, views, indices_N, group, batch_size):
            num_computed += num_more
            if progress is not None:
                progress(min(num_rows, num_reused + num_computed), num_rows)
        for entry in group:
            entry.seal()
    seconds = time.perf_counter() - started
    report = LabelReport(
        num_computed=num_computed,
        num_reused=num_rows - num_computed,
        num_repaired=num_repaired,
        seconds=seconds,
        images_per_second=num_computed / seconds,
    )
    _log_report(report)
    return report


class _Pending:
    """Computed rows of one entry, from the start of a block on, until they make a chunk."""

    def __init__(self, entry: Entry, first_row: int) -> None:
        self._entry = entry
        self._chunk = first_row // entry.chunk_rows
        self._parts: list[Tensor] = []
        self._num_held = 0

    def add(self, outputs: TeacherOutputs) -> None:
        values = _values(outputs, self._entry.key.output)
        self._parts.append(values)
        self._num_held += len(values)
        while self._num_held and self._num_held >= self._num_needed():
            held, num_needed = torch.cat(self._parts), self._num_needed()
            if not self._entry.has_chunk(self._chunk):
                self._entry.write_chunk(self._chunk, held[:num_needed])
            self._chunk += 1
            self._parts, self._num_held = [held[num_needed:]], self._num_held - num_needed

    def _num_needed(self) -> int:
        start, stop = self._entry.chunk_range(self._chunk)
        return stop - start


def _label_view(
    infer: Infer,
    source: ImageSource,
    views: Views | None,
    indices_N: Tensor,
    entries: Sequence[Entry],
    batch_size: int,
) -> Iterator[int]:
    """Compute what is missing of one view; yields the number of rows after every batch."""
    keep_freed_memory()
    block_starts: deque[int | None] = deque()
    batches = _plan(entries, indices_N, batch_size, block_starts)
    [num_classes] = [e.format.row_shape[0] for e in entries if e.key.output == LOGITS]
    pending: list[_Pending] = []
    for batch in iter_view_batches(source, views, batches, view=entries[0].key.view):
        first_row = block_starts.popleft()
        if first_row is not None:
            pending = [_Pending(entry, first_row) for entry in entries]
        outputs = answered(infer, batch.images_NCHW, num_classes=num_classes)
        for rows in pending:
            rows.add(outputs)
        yield len(batch.indices_N)


def _plan(
    entries: Sequence[Entry],
    indices_N: Tensor,
    batch_size: int,
    block_starts: deque[int | None],
) -> Iterator[Tensor]:
    """Yield index batches; ``block_starts`` notes the first row of those that begin a block."""
    for start, stop in _missing_blocks(entries, len(indices_N)):
        if not any(_lacks(entry, start, stop) for entry in entries):
            continue  # another writer was here meanwhile
        for number, batch_N in enumerate(torch.split(indices_N[start:stop], batch_size)):
            block_starts.append(start if number == 0 else None)
            yield batch_N


def _missing_blocks(entries: Sequence[Entry], num_rows: int) -> list[tuple[int, int]]:
    """Return the row ranges in which an entry lacks a chunk, each as long as the longest chunk.

    Chunks of every entry end where these do. Whole ranges are computed even if less is missing:
    equal batches give equal bits.
    """
    block_rows = max(entry.chunk_rows for entry in entries)
    starts = {
        entry.chunk_range(chunk)[0] // block_rows * block_rows
        for entry in entries
        for chunk in entry.missing_chunks()
    }
    return [(start, min(start + block_rows, num_rows)) for start in sorted(starts)]


def _lacks(entry: Entry, start: int, stop: int) -> bool:
    chunks = range(start // entry.chunk_rows, -(-stop // entry.chunk_rows))
    return not all(map(entry.has_chunk, chunks))


def _values(outputs: TeacherOutputs, output: str) -> Tensor:
    if output == LOGITS:
        return outputs.logits_NK
    if output in outputs.features:
        return outputs.features[output]
    raise ModelError(
        problem(
            f"the teacher answers without the features '{output}'",
            expected=f"features {sorted(outputs.features)}" if outputs.features else "only logits",
            mend="Give fast_inference this tap, and label with its `outputs`.",
        )
    )


def _log_report(report: LabelReport) -> None:
    log.info(
        "Teacher outputs: %d computed (%.0f images/s), %d reused, %d damaged chunks computed again",
        report.num_computed,
        report.images_per_second,
        report.num_reused,
        report.num_repaired,
    )


def _repair(entry: Entry) -> int:
    chunks = entry.drop_damaged()
    for chunk in chunks:
        log.warning("%s is damaged and computed again", entry.chunk_path(chunk))
    return len(chunks)
