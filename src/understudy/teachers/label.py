"""Compute the teacher's outputs for every view of the training samples, and answer with them."""

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
from understudy.errors import ModelError, StoreError, problem
from understudy.teachers.packing import Words
from understudy.teachers.store import Entry, StoreKey, indices_sha256

log = logging.getLogger("understudy")


@dataclass(frozen=True)
class LabelReport:
    """What labelling did.

    Attributes:
        num_computed: rows computed and stored now, over all views.
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
    source: ImageSource, views: Views | None, *, teacher: str, num_views: int, precision: str
) -> list[StoreKey]:
    """Return the address part of every view; untouched images (``views`` None) have one view."""
    transform = views.fingerprint if views is not None else "untouched"
    seed = views.seed if views is not None else 0
    return [
        StoreKey(teacher, source.facts.fingerprint, transform, seed, view, precision)
        for view in range(num_views if views is not None else 1)
    ]


def label_views(
    infer: Callable[[Tensor], Tensor],
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
    chunks are kept, missing and damaged ones are computed.

    Args:
        infer: uint8 images NCHW to float32 logits_NK (``fast_inference``).
        source: the pictures.
        views: how they are shown; None for untouched images.
        indices_N: the samples, ascending; row r of an entry belongs to the r-th.
        entries: one for each view to label, in any order (``OutputStore.entry``).
        batch_size: images the teacher is given at once.
        progress: called with (rows done, rows in all) after every batch.

    Raises:
        ModelError: the teacher answers with another number of classes.
        StoreError: an entry is for other samples, an output cannot be stored, the disk is full.
    """
    started = time.perf_counter()
    _check_entries(entries, indices_N)
    num_repaired = sum(_repair(entry) for entry in entries)
    num_rows = sum(entry.num_rows for entry in entries)
    num_reused = num_rows - sum(_rows_in(entry, entry.missing_chunks()) for entry in entries)
    num_computed = 0
    if progress is not None:
        progress(num_reused, num_rows)
    for entry in entries:
        for num_more in _label_entry(infer, source, views, indices_N, entry, batch_size):
            num_computed += num_more
            if progress is not None:
                progress(min(num_rows, num_reused + num_computed), num_rows)
        entry.seal()
    seconds = time.perf_counter() - started
    report = LabelReport(
        num_computed=num_computed,
        num_reused=num_rows - num_computed,
        num_repaired=num_repaired,
        seconds=seconds,
        images_per_second=num_computed / seconds,
    )
    log.info(
        "Teacher outputs: %d computed (%.0f images/s), %d reused, %d damaged chunks computed again",
        report.num_computed,
        report.images_per_second,
        report.num_reused,
        report.num_repaired,
    )
    return report


class StoredTeacher:
    """A teacher that answers from the store, one view in memory at a time.

    Raises:
        StoreError: an entry is incomplete, or for other samples.
    """

    def __init__(self, entries: Sequence[Entry], indices_N: Tensor) -> None:
        _check_entries(entries, indices_N)
        for entry in entries:
            if not entry.complete:
                raise StoreError(
                    problem(
                        f"view {entry.key.view} lacks {len(entry.missing_chunks())} of "
                        f"{entry.num_chunks} chunks of teacher outputs",
                        expected="a complete view",
                        mend="Run the labelling stage; it computes only what is missing.",
                    )
                )
        self._entries = {entry.key.view: entry for entry in entries}
        self._indices_N = indices_N.contiguous()
        self._view: int | None = None
        self._words: Words | None = None

    def outputs(self, indices_N: Tensor, *, view: int) -> Tensor:
        """Return logits_NK, float32, of these samples in this view.

        Raises:
            StoreError: a view or sample that was not labelled, or damage in the view's files.
        """
        if view not in self._entries:
            raise StoreError(f"view {view} is not stored; stored are {sorted(self._entries)}")
        entry = self._entries[view]
        if self._words is None or view != self._view:
            self._view, self._words = view, entry.load_words()
        rows_N = torch.searchsorted(self._indices_N, indices_N)
        rows_N.clamp_(max=len(self._indices_N) - 1)
        if not torch.equal(self._indices_N[rows_N], indices_N):
            raise StoreError("outputs were asked for samples that are not in the labelled split")
        return torch.from_numpy(entry.format.unpack(self._words[rows_N.numpy()]))


def load_view(entry: Entry) -> Tensor:
    """Return all rows of one view: logits [num_rows, K], float16 if so stored densely.

    Raises:
        StoreError: a chunk is missing or damaged.
    """
    words = entry.load_words()
    return torch.from_numpy(words if entry.format.top_k is None else entry.format.unpack(words))


def _label_entry(
    infer: Callable[[Tensor], Tensor],
    source: ImageSource,
    views: Views | None,
    indices_N: Tensor,
    entry: Entry,
    batch_size: int,
) -> Iterator[int]:
    """Compute the missing chunks of one view; yields the number of rows after every batch."""
    planned: deque[tuple[int, bool]] = deque()
    batches = _plan(entry, indices_N, batch_size, planned)
    parts: list[Tensor] = []
    for batch in iter_view_batches(source, views, batches, view=entry.key.view):
        chunk, last = planned.popleft()
        parts.append(_checked(infer(batch.images_NCHW), entry.format.num_classes))
        if last:
            entry.write_chunk(chunk, torch.cat(parts))
            parts = []
        yield len(batch.indices_N)


def _plan(
    entry: Entry, indices_N: Tensor, batch_size: int, planned: deque[tuple[int, bool]]
) -> Iterator[Tensor]:
    """Yield index batches, and note in ``planned`` their chunk and whether they complete it."""
    for chunk in entry.missing_chunks():
        if entry.has_chunk(chunk):
            continue  # another writer was here meanwhile
        batches = torch.split(indices_N[slice(*entry.chunk_range(chunk))], batch_size)
        for number, batch_N in enumerate(batches, start=1):
            planned.append((chunk, number == len(batches)))
            yield batch_N


def _checked(logits_NK: Tensor, num_classes: int) -> Tensor:
    if logits_NK.dim() == 2 and logits_NK.shape[1] == num_classes:
        return logits_NK
    raise ModelError(
        problem(
            f"the teacher answers with shape {tuple(logits_NK.shape)}",
            expected=f"[N, {num_classes}], one logit for each class of the data",
            mend="Give num_classes and the teacher's class order, or another teacher.",
        )
    )


def _check_entries(entries: Sequence[Entry], indices_N: Tensor) -> None:
    digest = indices_sha256(indices_N)
    for entry in entries:
        if entry.sample_indices_sha256 != digest:
            raise StoreError(
                problem(
                    f"entry {entry.entry_id} holds other samples than the {len(indices_N)} given",
                    expected="the indices the entry was made with",
                    mend="Ask the store for the entry of these indices.",
                )
            )


def _repair(entry: Entry) -> int:
    chunks = entry.drop_damaged()
    for chunk in chunks:
        log.warning("%s is damaged and computed again", entry.chunk_path(chunk))
    return len(chunks)


def _rows_in(entry: Entry, chunks: Sequence[int]) -> int:
    return sum(stop - start for start, stop in map(entry.chunk_range, chunks))
