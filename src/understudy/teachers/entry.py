"""One entry of the store: the rows of one output of one teacher for one view, chunk by chunk."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from understudy.artifacts import file_hash, write_bytes
from understudy.errors import StoreError, problem
from understudy.teachers.entry_files import (
    ARRAY_NAME,
    LOCK_NAME,
    SEAL_NAME,
    clear_disk_errors,
    damaged,
    decoded,
    encoded,
    locked,
    read_manifest,
)
from understudy.teachers.packing import Words, row_format

LOGITS = "logits"


@dataclass(frozen=True)
class StoreKey:
    """What determines a teacher's output, besides which samples and how its rows are kept.

    Attributes:
        teacher: hash of the teacher's weights, architecture and input conversion.
        data: fingerprint of the data.
        transform: hash of the view's specification.
        seed: of the views.
        view: number of the view.
        precision: the arithmetic that changes outputs materially: "float32", "bfloat16",
            "int8 of 7-bit weights".
        output: "logits", or the key of the tap whose features these are ("layer3:attention").
    """

    teacher: str
    data: str
    transform: str
    seed: int
    view: int
    precision: str = "float32"
    output: str = LOGITS

    def fields(self) -> dict[str, Any]:
        """Return what goes into the address, JSON-able."""
        fields = asdict(self)
        if self.output == LOGITS:
            # As it was before features were stored: what is in a store already stays valid.
            del fields["output"]
        return fields


class _AtomicStore(LocalStore):
    """Zarr's local store with an fsync before the rename, so a crash leaves no empty chunk."""

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread(write_bytes, self.root / key, value.to_bytes())

    def set_sync(self, key: str, value: Buffer) -> None:
        self._check_writable()
        write_bytes(self.root / key, value.to_bytes())


class Entry:
    """One output of one teacher for one view: rows of chunks, each there whole or not at all.

    Raises:
        StoreError: the entry's metadata is missing or was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = read_manifest(path)
        self.key = StoreKey(**manifest["key"])
        self.format = row_format(manifest["format"])
        self.num_rows: int = manifest["num_rows"]
        self.chunk_rows: int = manifest["chunk_rows"]
        self.sample_indices_sha256: str = manifest["sample_indices_sha256"]
        if not (path / ARRAY_NAME).is_file():
            raise damaged(path / ARRAY_NAME, "it is missing")
        if file_hash(path / ARRAY_NAME) != manifest["zarr_sha256"]:
            raise damaged(path / ARRAY_NAME, "its content changed")
        self._array: zarr.Array[Any] = zarr.open_array(_AtomicStore(path), mode="r+")

    @property
    def entry_id(self) -> str:
        """The entry's address in its store."""
        return self.path.name

    @property
    def num_chunks(self) -> int:
        """Chunks of a complete entry."""
        return -(-self.num_rows // self.chunk_rows)

    @property
    def complete(self) -> bool:
        """Whether all rows are there and sealed. Damage is for ``verify`` and for reading."""
        return (self.path / SEAL_NAME).is_file() and not self.missing_chunks()

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Return first row and one past the last row of a chunk."""
        start = chunk * self.chunk_rows
        return start, min(start + self.chunk_rows, self.num_rows)

    def chunk_path(self, chunk: int) -> Path:
        """Return where a chunk lies."""
        return self.path / f"c.{chunk}.0"

    def has_chunk(self, chunk: int) -> bool:
        """Whether somebody has written this chunk."""
        return self.chunk_path(chunk).exists()

    def missing_chunks(self) -> list[int]:
        """Return the numbers of the chunks that are still to be computed."""
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        return [c for c in range(self.num_chunks) if self.chunk_path(c).name not in names]

    def damaged_chunks(self) -> list[int]:
        """Return the chunks whose bytes are not those that were written. Reads everything.

        Raises:
            StoreError: the seal itself is damaged.
        """
        sealed = self._sealed_hashes()
        return [
            chunk
            for chunk in range(self.num_chunks)
            if self.has_chunk(chunk) and not self._intact(chunk, sealed)
        ]

    def drop_damaged(self) -> list[int]:
        """Delete damaged chunks (and the seal), so that labelling computes them again.

        Returns:
            The numbers of the deleted chunks.
        """
        try:
            chunks = self.damaged_chunks()
        except StoreError:
            (self.path / SEAL_NAME).unlink(missing_ok=True)
            chunks = self.damaged_chunks()
        if chunks:
            self.drop_chunks(chunks)
        return chunks

    def drop_chunks(self, chunks: list[int]) -> None:
        """Delete these chunks (and the seal), so that labelling computes them again."""
        with clear_disk_errors(self.path), locked(self.path):
            (self.path / SEAL_NAME).unlink(missing_ok=True)
            for chunk in chunks:
                self.chunk_path(chunk).unlink(missing_ok=True)

    def write_chunk(self, chunk: int, values: Tensor) -> bool:
        """Store one chunk and seal the entry if it was the last; False if it was there already.

        Args:
            chunk: its number.
            values: float logits_NK, or features [N, *row_shape], of exactly the rows
                ``chunk_range(chunk)``.

        Raises:
            StoreError: wrong shape, values that cannot be stored, no space left, no permission.
        """
        start, stop = self.chunk_range(chunk)
        expected_shape = (stop - start, *self.format.row_shape)
        if tuple(values.shape) != expected_shape:
            raise StoreError(
                f"chunk {chunk} of {self.key.output} was given shape {tuple(values.shape)}; "
                f"expected {expected_shape}"
            )
        words = self.format.pack(values.float().cpu().numpy(), first_row=start)
        with clear_disk_errors(self.path), locked(self.path):
            written = not self.has_chunk(chunk)
            if written:
                # A seal over a chunk that was lost and is now replaced says nothing any more.
                (self.path / SEAL_NAME).unlink(missing_ok=True)
                self._array[start:stop] = words
            self._seal()
        return written

    def seal(self) -> None:
        """Write the list of all chunks' hashes if every chunk is there. Harmless to repeat."""
        with clear_disk_errors(self.path), locked(self.path):
            self._seal()

    def read_words(self, chunk: int) -> Words:
        """Return one chunk as stored.

        Raises:
            StoreError: the chunk is missing or damaged.
        """
        path = self.chunk_path(chunk)
        if not path.exists():
            raise StoreError(
                problem(
                    f"{path} does not exist: {self.key.output} of rows "
                    f"{self.chunk_range(chunk)[0]} and up of view {self.key.view} are not computed",
                    expected=f"{self.num_chunks} chunks",
                    mend="Run the labelling stage; it computes only what is missing.",
                )
            )
        start, stop = self.chunk_range(chunk)
        try:
            return np.asarray(self._array[start:stop])
        except Exception as error:
            # Checksum, decompression and decoding each fail with classes of their own.
            raise damaged(path, f"it cannot be read: {error}") from error

    def note_use(self) -> None:
        """Note that the entry is in use, for ``store gc``; one that may only be read stays as is.

        Checks read chunks without it: they keep nothing in use.
        """
        with contextlib.suppress(OSError):
            (self.path / LOCK_NAME).touch()

    def load_words(self) -> Words:
        """Return all rows as stored, [num_rows, columns].

        Raises:
            StoreError: a chunk is missing or damaged.
        """
        self.note_use()
        for chunk in self.missing_chunks():
            self.read_words(chunk)
        try:
            return np.asarray(self._array[:])
        except Exception:
            return np.concatenate([self.read_words(chunk) for chunk in range(self.num_chunks)])

    def read(self, rows_N: Tensor) -> Tensor:
        """Return these rows, float32 [N, *row_shape]; only the chunks they lie in are read.

        Raises:
            StoreError: a chunk is missing or damaged.
        """
        self.note_use()
        rows = rows_N.numpy()
        chunks = rows // self.chunk_rows
        words = np.empty((len(rows), self.format.num_columns), dtype=self.format.word_dtype)
        for chunk in np.unique(chunks).tolist():
            inside = chunks == chunk
            words[inside] = self.read_words(chunk)[rows[inside] - chunk * self.chunk_rows]
        return torch.from_numpy(self.format.unpack(words))

    def _seal(self) -> None:
        seal_path = self.path / SEAL_NAME
        if seal_path.exists() or self.missing_chunks():
            return
        chunks = [self.chunk_path(chunk) for chunk in range(self.num_chunks)]
        hashes = {path.name: file_hash(path) for path in chunks}
        write_bytes(seal_path, encoded({"chunks": hashes}))

    def _sealed_hashes(self) -> dict[str, str]:
        seal_path = self.path / SEAL_NAME
        return dict(decoded(seal_path)["chunks"]) if seal_path.exists() else {}

    def _intact(self, chunk: int, sealed: dict[str, str]) -> bool:
        path = self.chunk_path(chunk)
        if path.name in sealed and file_hash(path) != sealed[path.name]:
            return False
        try:
            self.read_words(chunk)
        except StoreError:
            return False
        return True
