"""The small files of a store entry: manifest, array metadata, lock; and the errors around them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from understudy.artifacts import content_hash, write_bytes
from understudy.errors import StoreError, problem
from understudy.teachers.packing import RowFormat, row_format

MANIFEST_NAME = "entry.json"
SEAL_NAME = "seal.json"
ARRAY_NAME = "zarr.json"
LOCK_NAME = ".lock"  # its time is that of the last use
REPAIR = "Run `understudy store verify --repair`, then label again: only damaged chunks are redone."
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def entry_id_of(description: dict[str, Any]) -> str:
    """Return the address of the outputs so described."""
    return content_hash(description)[:32]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return an entry's checked manifest.

    Raises:
        StoreError: missing, changed, or in a folder of another name.
    """
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.is_file():
        raise StoreError(
            problem(
                f"there is no stored output at {path}",
                expected=f"the file {MANIFEST_NAME}",
                mend="Run the labelling stage.",
            )
        )
    manifest = decoded(manifest_path)
    description = {name: value for name, value in manifest.items() if name != "zarr_sha256"}
    if entry_id_of(description) != path.name:
        raise damaged(manifest_path, "it belongs to another entry")
    return manifest


def restore_metadata(path: Path) -> None:
    """Write an entry's ``zarr.json`` again from its manifest, after damage.

    Raises:
        StoreError: the manifest is damaged too; then the entry is lost.
    """
    manifest = read_manifest(path)
    manifest.pop("zarr_sha256")
    with clear_disk_errors(path), locked(path):
        create_metadata(path, manifest)


def damaged(path: Path, how: str) -> StoreError:
    """Return the error for a damaged file of the store."""
    return StoreError(
        problem(f"{path} is damaged: {how}", expected="the bytes written", mend=REPAIR)
    )


def create_metadata(path: Path, description: dict[str, Any]) -> None:
    """Write an entry's ``zarr.json`` and manifest; both follow from the description."""
    # The manifest comes last: a folder without it is made anew.
    metadata = _array_metadata(
        row_format(description["format"]), description["num_rows"], description["chunk_rows"]
    )
    write_bytes(path / ARRAY_NAME, metadata)
    zarr_sha256 = hashlib.sha256(metadata).hexdigest()
    write_bytes(path / MANIFEST_NAME, encoded({**description, "zarr_sha256": zarr_sha256}))


def _array_metadata(layout: RowFormat, num_rows: int, chunk_rows: int) -> bytes:
    memory = MemoryStore()
    zarr.create_array(
        memory,
        shape=(num_rows, layout.num_columns),
        chunks=(chunk_rows, layout.num_columns),
        dtype=layout.word_dtype,
        # A value no row can have: Zarr leaves out chunks that are all fill value, so zero would
        # make a chunk of zeros look as if it had never been computed.
        fill_value=layout.fill_value,
        compressors=(ZstdCodec(level=3), Crc32cCodec()),
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    buffer = sync(memory.get(ARRAY_NAME, default_buffer_prototype()))
    assert buffer is not None
    return buffer.to_bytes()


def encoded(values: dict[str, Any]) -> bytes:
    """Return JSON with its own hash inside, always the same bytes for the same values."""
    hashed = {**values, "hash": content_hash(values)}
    return (json.dumps(hashed, indent=1, sort_keys=True) + "\n").encode()


def decoded(path: Path) -> dict[str, Any]:
    """Return what ``encoded`` was given; any other byte in the file is a StoreError."""
    return decoded_bytes(path.read_bytes(), path)


def decoded_bytes(data: bytes, path: Path) -> dict[str, Any]:
    """Return what ``encoded`` was given to make these bytes of the file ``path``."""
    try:
        values: dict[str, Any] = json.loads(data)
        values.pop("hash")
        intact = encoded(values) == data
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged(path, f"it is no manifest ({error})") from None
    if not intact:
        raise damaged(path, "its content changed")
    return values


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the entry while it changes. The lock is the kernel's and dies with its process."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK_NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold the entry unless another process does; yields whether it may be changed."""
    with contextlib.ExitStack() as stack:
        is_free = True
        with contextlib.suppress(OSError):  # no lock was ever taken, or none can be
            file = stack.enter_context((path / LOCK_NAME).open("r+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_free = False
        yield is_free


@contextlib.contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about a disk into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in NO_ROOM
        given = "there is no space left" if full else f"writing failed ({error.strerror})"
        raise StoreError(
            problem(
                f"{given} for teacher outputs in {path}",
                expected="room for the whole view and permission to write",
                mend="Make room (`understudy store gc`) or choose another folder, then run again: "
                "finished chunks are kept.",
            )
        ) from error


def looks_like_id(name: str) -> bool:
    """Whether a folder's name is an entry's address."""
    return len(name) == 32 and all(letter in "0123456789abcdef" for letter in name)
