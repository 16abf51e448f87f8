"""Teacher outputs on disk: computed once, found by what they depend on, never silently wrong.

One entry holds the outputs of one teacher for one view of the given samples, in a folder named by
the hash of everything that determines them::

    ROOT/ENTRY/zarr.json     the array's metadata (Zarr 3: zstd, then crc32c over the bytes on disk)
    ROOT/ENTRY/c.CHUNK.0     1,024 rows each; a chunk is written once, whole, by rename
    ROOT/ENTRY/entry.json    what the entry is, the SHA-256 of zarr.json, and its own hash
    ROOT/ENTRY/seal.json     SHA-256 of every chunk, written when the last one is there

Any number of processes may write one entry: a short kernel lock covers each commit, and the first
to finish a chunk wins. A killed writer loses the chunk it was computing and nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
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
from understudy.errors import InputError, StoreError, problem
from understudy.teachers.entry_files import (
    ARRAY_NAME,
    MANIFEST_NAME,
    SEAL_NAME,
    clear_disk_errors,
    create_metadata,
    damaged,
    decoded,
    encoded,
    entry_id_of,
    locked,
    looks_like_id,
    read_manifest,
)
from understudy.teachers.packing import OutputFormat, Words

log = logging.getLogger("understudy")

# Part of every address: outputs written under another layout or by another definition of a view's
# pixels are other outputs.
FORMAT_VERSION = 1
CHUNK_ROWS = 1024


@dataclass(frozen=True)
class StoreKey:
    """What determines teacher outputs, besides which samples and how many of the logits are kept.

    Attributes:
        teacher: hash of the teacher's weights, architecture and input conversion.
        data: fingerprint of the data.
        transform: hash of the view's specification.
        seed: of the views.
        view: number of the view.
        precision: the arithmetic that changes outputs materially: "float32", "bfloat16", "int8".
    """

    teacher: str
    data: str
    transform: str
    seed: int
    view: int
    precision: str = "float32"


class _AtomicStore(LocalStore):
    """Zarr's local store with an fsync before the rename, so a crash leaves no empty chunk."""

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread(write_bytes, self.root / key, value.to_bytes())

    def set_sync(self, key: str, value: Buffer) -> None:
        self._check_writable()
        write_bytes(self.root / key, value.to_bytes())


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
        """Return the entry for these outputs, made empty when it does not exist yet.

        Args:
            key: what determines the outputs.
            sample_indices_N: the samples, strictly ascending; row ``r`` belongs to the ``r``-th.
            num_classes: K.
            top_k: how many logits to keep; None keeps all.
            dtype: "float16" or "float32".

        Raises:
            InputError: impossible top_k or dtype; indices that do not ascend.
            StoreError: the entry cannot be written.
        """
        layout = OutputFormat(num_classes, top_k, dtype)
        description = {
            "format_version": FORMAT_VERSION,
            "key": asdict(key),
            "sample_indices_sha256": indices_sha256(sample_indices_N),
            "num_rows": len(sample_indices_N),
            "chunk_rows": CHUNK_ROWS,
            "format": asdict(layout),
        }
        path = self.root / entry_id_of(description)
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


class Entry:
    """The outputs of one teacher for one view: rows of chunks, each there whole or not at all.

    Raises:
        StoreError: the entry's metadata is missing or was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = read_manifest(path)
        self.key = StoreKey(**manifest["key"])
        self.format = OutputFormat(**manifest["format"])
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
        names = {path.name for path in self.path.iterdir()}
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

    def write_chunk(self, chunk: int, logits_NK: Tensor) -> bool:
        """Store one chunk and seal the entry if it was the last; False if it was there already.

        Args:
            chunk: its number.
            logits_NK: float logits of exactly the rows ``chunk_range(chunk)``.

        Raises:
            StoreError: wrong shape, values that cannot be stored, no space left, no permission.
        """
        start, stop = self.chunk_range(chunk)
        expected_shape = (stop - start, self.format.num_classes)
        if tuple(logits_NK.shape) != expected_shape:
            raise StoreError(
                f"chunk {chunk} was given shape {tuple(logits_NK.shape)}; expected {expected_shape}"
            )
        words = self.format.pack(logits_NK.float().cpu().numpy(), first_row=start)
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
                    f"{path} does not exist: rows {self.chunk_range(chunk)[0]} and up of view "
                    f"{self.key.view} are not computed",
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

    def load_words(self) -> Words:
        """Return all rows as stored, [num_rows, columns].

        Raises:
            StoreError: a chunk is missing or damaged.
        """
        for chunk in self.missing_chunks():
            self.read_words(chunk)
        try:
            return np.asarray(self._array[:])
        except Exception:
            return np.concatenate([self.read_words(chunk) for chunk in range(self.num_chunks)])

    def read(self, rows_N: Tensor) -> Tensor:
        """Return logits_NK (float32) of these rows; only the chunks they lie in are read.

        Raises:
            StoreError: a chunk is missing or damaged.
        """
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
