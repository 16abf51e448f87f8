"""A teacher that answers from the store."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from understudy.data.batches import Batch
from understudy.errors import StoreError, problem
from understudy.teachers.entry_files import clear_disk_errors
from understudy.teachers.outputs import TeacherOutputs
from understudy.teachers.packing import OutputFormat, Words
from understudy.teachers.store import LOGITS, Entry, entries_by_view

MEMORY_LIMIT_BYTES = 1 << 30


class StoredTeacher:
    """A teacher that answers from the store, one view at hand at a time.

    The smallest outputs of the view are held in memory, up to a limit. The rest, large feature
    maps, is decoded into a nameless file on the store's disk, once whenever the view changes, and
    mapped from there: shuffled batches need rows of every chunk.

    Args:
        entries: of every view the logits, and the features to answer with, the same in each.
        indices_N: the samples the entries were made with.
        memory_limit_bytes: how much of the view to hold in memory.

    Raises:
        StoreError: an entry is incomplete, for other samples or missing in a view.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        indices_N: Tensor,
        *,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    ) -> None:
        self._views = entries_by_view(entries, indices_N)
        check_complete(entries)
        self._indices_N = indices_N.contiguous()
        self._memory_limit_bytes = memory_limit_bytes
        self._view: int | None = None
        self._words: dict[str, Words] = {}

    def outputs(self, batch: Batch, *, view: int) -> TeacherOutputs:
        """Return what the teacher said of these samples in this view.

        Raises:
            StoreError: a view or sample that was not labelled, damage in the view's files, or no
                room to decode large features.
        """
        return self.rows(batch.indices_N, view=view)

    def rows(self, indices_N: Tensor, *, view: int, with_features: bool = True) -> TeacherOutputs:
        """Return the same, given only the samples' numbers.

        Without features nothing of them is read: for all samples at once they may not fit memory.
        """
        if view not in self._views:
            raise StoreError(f"view {view} is not stored; stored are {sorted(self._views)}")
        if view != self._view:
            # The former view goes before this one comes.
            self._view, self._words = view, {}
        rows_N = torch.searchsorted(self._indices_N, indices_N)
        rows_N.clamp_(max=len(self._indices_N) - 1)
        if not torch.equal(self._indices_N[rows_N], indices_N):
            raise StoreError("outputs were asked for samples that are not in the labelled split")
        logits_format = self._views[view][LOGITS].format
        words = self._all_words(LOGITS)[rows_N.numpy()]
        logits_NK = torch.from_numpy(logits_format.unpack(words))
        features = {
            output: torch.from_numpy(entry.format.unpack(self._all_words(output)[rows_N.numpy()]))
            for output, entry in self._views[view].items()
            if with_features and output != LOGITS
        }
        largest = logits_format.largest(words) if isinstance(logits_format, OutputFormat) else None
        if largest is None:
            return TeacherOutputs(logits_NK, features)
        values_Nk, classes_Nk = map(torch.from_numpy, largest)
        return TeacherOutputs(logits_NK, features, top_k=(values_Nk, classes_Nk))

    def _all_words(self, output: str) -> Words:
        """Return all rows of the present view as stored, loaded when first asked for."""
        assert self._view is not None
        if output not in self._words:
            entries = self._views[self._view]
            # Smaller outputs have the memory first, whether they are loaded yet or not.
            by_size = sorted(entries.values(), key=lambda e: (_decoded_bytes(e), e.key.output))
            up_to_it = by_size[: by_size.index(entries[output]) + 1]
            fits = sum(map(_decoded_bytes, up_to_it)) <= self._memory_limit_bytes
            self._words[output] = entries[output].load_words() if fits else _mapped(entries[output])
        return self._words[output]


def load_view(entry: Entry) -> Tensor:
    """Return all rows of one entry, [num_rows, *row_shape], float16 if so stored densely.

    Raises:
        StoreError: a chunk is missing or damaged.
    """
    words = entry.load_words()
    if isinstance(entry.format, OutputFormat) and entry.format.top_k is not None:
        return torch.from_numpy(entry.format.unpack(words))
    return torch.from_numpy(words.reshape(len(words), *entry.format.row_shape))


def check_complete(entries: Sequence[Entry]) -> None:
    """Raise StoreError unless all rows of every entry are there."""
    for entry in entries:
        if not entry.complete:
            raise StoreError(
                problem(
                    f"view {entry.key.view} lacks {len(entry.missing_chunks())} of "
                    f"{entry.num_chunks} chunks of teacher outputs ({entry.key.output})",
                    expected="a complete view",
                    mend="Run the labelling stage; it computes only what is missing.",
                )
            )


def _decoded_bytes(entry: Entry) -> int:
    row_bytes = entry.format.num_columns * np.dtype(entry.format.word_dtype).itemsize
    return entry.num_rows * row_bytes


def _mapped(entry: Entry) -> Words:
    """Return all rows, mapped from a file without a name, which goes with this process."""
    entry.note_use()
    shape = (entry.num_rows, entry.format.num_columns)
    with clear_disk_errors(entry.path), tempfile.TemporaryFile(dir=entry.path.parent) as file:
        # Written, not stored through the map: there a full disk would kill the process.
        for chunk in range(entry.num_chunks):
            file.write(entry.read_words(chunk).tobytes())
        file.flush()
        words: Words = np.memmap(file, dtype=entry.format.word_dtype, mode="r", shape=shape)
    return np.asarray(words)
