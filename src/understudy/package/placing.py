"""Gives a package its final name, and replaces there what is a package and nothing else."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from understudy.artifacts import ASIDE_NAME, clear_part, exclusive
from understudy.errors import InputError, problem
from understudy.package.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SCHEMA_VERSION
from understudy.package.reading import DAMAGE, unlisted_files

NUM_SHOWN = 3


def check_package_path(target: Path, *, overwrite: bool) -> bool:
    """Return whether a package of this name is a zip; raise InputError where none can be written.

    Args:
        overwrite: a package may be there already. What is not a package, or holds files of
            others, is never replaced.
    """
    is_zip = target.suffix.lower() == ".zip"
    above = next(path for path in target.absolute().parents if path.exists())
    if not above.is_dir():
        raise InputError(
            problem(
                f"{target} cannot be a package: {above} is a file",
                expected="a path where a folder or zip can be made",
                mend="Choose another name.",
            )
        )
    _check_free(target, is_zip=is_zip, overwrite=overwrite)
    return is_zip


def _check_free(target: Path, *, is_zip: bool, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not is_zip and not any(target.iterdir())):
        return
    # A folder NAME.zip and a file without the suffix are not what would be written there.
    replaceable = target.is_dir() != is_zip and _is_package(target)
    if not (overwrite and replaceable):
        raise InputError(
            problem(
                f"{target} exists" + ("" if replaceable else " and is not a package"),
                expected="a new name",
                mend="Choose another name"
                + (", or overwrite it on purpose." if replaceable else "."),
            )
        )
    if not is_zip and (foreign := _foreign_files(target)):
        shown = ", ".join(repr(name) for name in foreign[:NUM_SHOWN])
        more = f" and {len(foreign) - NUM_SHOWN:,} more" if len(foreign) > NUM_SHOWN else ""
        raise InputError(
            problem(
                f"{target} holds files that are not the package's: {shown}{more}",
                expected="a package alone, which may be replaced, or a new name",
                mend="Move them elsewhere, or choose another name.",
            )
        )


def _is_package(path: Path) -> bool:
    """Return whether a folder or zip is a package, whole or damaged.

    Web pages, browser extensions and others have files called manifest.json, too.
    """
    values = _loose_manifest(path)
    version = values.get("schema_version")
    return (
        version == SCHEMA_VERSION
        and not isinstance(version, bool)
        and isinstance(values.get("content_sha256"), str)
        and str(values.get("made_by")).startswith("understudy")
    )


def _foreign_files(folder: Path) -> list[str]:
    """Return files and links in a package folder that its manifest does not list."""
    files = _loose_manifest(folder).get("files")
    return unlisted_files(folder, files if isinstance(files, dict) else {})


def _loose_manifest(path: Path) -> dict[str, Any]:
    """Return what manifest.json holds, unchecked; {} where there is none that can be read."""
    data = b""
    try:
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive, archive.open(MANIFEST_NAME) as member:
                data = member.read(MAX_MANIFEST_BYTES)
        elif (path / MANIFEST_NAME).is_file():
            with (path / MANIFEST_NAME).open("rb") as file:
                data = file.read(MAX_MANIFEST_BYTES)
        values = json.loads(data)
    except (*DAMAGE, KeyError, OSError):
        return {}
    return values if isinstance(values, dict) else {}


@contextlib.contextmanager
def part_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside the target to write in, gone afterwards.

    What ``move`` set aside in it gets its name back unless that is taken. So it is with the
    folders that killed writers left for the same name.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        # One without a lock is being made at this moment.
        if _name_of(left) == target.name and (left / ".lock").is_file():
            with contextlib.suppress(InputError, FileNotFoundError), exclusive(left):
                clear_part(left)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    with exclusive(part):
        try:
            yield part
        finally:
            # Where nothing can be brought back or removed, all is left as it is.
            with contextlib.suppress(OSError):
                clear_part(part)


def _name_of(part: Path) -> str:
    return part.name.removeprefix(".").rsplit(".", 2)[0]


def move(staged: Path, target: Path, part: Path) -> None:
    """Give the staged folder its name. A package that has it is set aside in the part folder."""
    if target.exists():
        target.rename(part / ASIDE_NAME)
    staged.rename(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
