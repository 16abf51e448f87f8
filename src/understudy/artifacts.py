"""Records on disk: what a stage produced, from what, with what; and files that are never half.

A record is one ``record.json`` in the stage's folder. Its ``key`` is a hash of everything the stage
depends on (recipe section, parents' hashes, code schema), so a stage whose key is unchanged and
whose files are intact is not run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from understudy.errors import InputError, problem
from understudy.runtime import hardware_facts, package_versions

RECORD_NAME = "record.json"
ASIDE_NAME = "replaced"  # in a ``.part`` folder: what had the final name before
SCHEMA_VERSION = 1
PART_NAME = re.compile(r"\..+\.[a-z0-9_]{8}\.part")


def canonical_json(value: Any) -> str:
    """Return ``value`` as JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON-able value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it to ``path`` on success.

    The rename happens after an fsync, so a crash or a full disk at any moment leaves either the
    old file or the new one under the final name, never a part of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is as readable as the umask allows.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError:
        raise
    except Exception:
        raise_disk_error(temporary)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def clear_part(part: Path) -> None:
    """Remove what a killed process wrote and did not finish, ``.NAME.<random>.part``.

    A folder that it had set aside to be replaced gets its name back, unless that is taken.
    """
    if not part.is_dir():
        part.unlink()
        return
    name = part.name.removeprefix(".").rsplit(".", 2)[0]
    if (part / ASIDE_NAME).exists() and not part.with_name(name).exists():
        (part / ASIDE_NAME).rename(part.with_name(name))
    shutil.rmtree(part)


def clear_parts(folder: Path, *, below: bool = False) -> None:
    """Clear what killed processes left in a folder, and with ``below`` in all folders in it.

    Only names as ``tempfile`` makes them here: a user's hidden files stay.
    """
    for part in list(folder.rglob(".*.part") if below else folder.glob(".*.part")):
        # One may have gone with the folder that it was in.
        if PART_NAME.fullmatch(part.name) and part.exists():
            clear_part(part)


def raise_disk_error(path: Path) -> None:
    """Raise the system's OSError if nothing more can be written to ``path``.

    Libraries that write report a full disk each in a class and words of its own.
    """
    with path.open("ab") as file:
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. NaN and infinity are errors: null means "no value"."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Record:
    """What one stage produced. Immutable; on disk it is ``record.json`` beside its files.

    Attributes:
        kind: the stage's noun ("split", "teacher", "labels", "student", "control", ...).
        key: hash of everything the stage depends on; equal key means equal work.
        parents: noun of each parent record to its hash.
        payload: the stage's results, JSON-able.
        files: path relative to the record's folder to SHA-256 of the content.
        timing: seconds and rates; kept outside the hash, so that doing equal work again gives an
            equal hash and nothing downstream is run again for it.
    """

    kind: str
    key: str
    seed: int
    payload: dict[str, Any]
    parents: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=package_versions)
    hardware: dict[str, Any] = field(default_factory=hardware_facts)
    schema_version: int = SCHEMA_VERSION

    @property
    def hash(self) -> str:
        """Content hash: what was made and from what, without when and on which machine."""
        return content_hash([self.kind, self.key, self.parents, self.payload, self.files])

    def save(self, folder: Path) -> Self:
        """Write ``folder/record.json`` atomically; the files it names must exist already."""
        write_json(folder / RECORD_NAME, {**asdict(self), "hash": self.hash})
        return self

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``folder/record.json``; a damaged or foreign file is an InputError."""
        path = folder / RECORD_NAME
        try:
            values = json.loads(path.read_text())
            stored_hash = values.pop("hash")
            record = cls(**values)
        except FileNotFoundError:
            raise InputError(
                problem(
                    f"there is no record at {path}",
                    expected="the record of a finished stage",
                    mend="Run the stage that makes it, or `understudy distill` for all stages.",
                )
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                problem(
                    f"{path} is not a readable record ({error})",
                    expected=f"a record of schema version {SCHEMA_VERSION}",
                    mend="Delete it and run the stage again.",
                )
            ) from None
        if stored_hash != record.hash:
            raise InputError(
                problem(
                    f"{path} was changed after it was written",
                    expected=f"content hash {stored_hash[:12]}",
                    mend="Delete it and run the stage again.",
                )
            )
        return record

    def damaged_files(self, folder: Path) -> list[str]:
        """Return the names of files that are missing or whose content changed."""
        return [
            name
            for name, digest in self.files.items()
            if not (folder / name).is_file() or file_hash(folder / name) != digest
        ]


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """Return the ``files`` mapping of a record for files below ``folder``."""
    return {name: file_hash(folder / name) for name in names}


def reusable_record(folder: Path, key: str) -> Record | None:
    """Return the finished record in ``folder`` if it has this key and intact files, else None."""
    try:
        record = Record.load(folder)
    except InputError:
        return None
    if record.key != key or record.schema_version != SCHEMA_VERSION:
        return None
    return None if record.damaged_files(folder) else record


def stage_key(kind: str, section: Mapping[str, Any], parents: Mapping[str, str]) -> str:
    """Return the hash of everything a stage depends on."""
    return content_hash([SCHEMA_VERSION, kind, dict(section), dict(parents)])


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the run folder: a second process on the same run is an InputError, not a mix-up.

    The lock is the kernel's (flock), so it goes with the process however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                problem(
                    f"another process is working on {folder}",
                    expected="one process a run folder",
                    mend="Wait for it, stop it, or choose another folder with --out.",
                )
            ) from None
        yield
