"""Opens a package. Every name, size and hash is checked before anything in it is used.

Nothing in a package is run by reading it: the scripts in it are for those who have only it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import struct
import tempfile
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from understudy.artifacts import file_hash
from understudy.errors import InputError, problem
from understudy.package.manifest import (
    FETCH_AGAIN,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    ArtifactEntry,
    Manifest,
    parse_manifest,
    unsafe_name,
)

MAX_PACKAGE_BYTES = 4 << 30
MAX_FILES = 10_000
CHUNK_BYTES = 1 << 20
# Others can make far more of one byte than deflate's thousand.
COMPRESSIONS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
# What zipfile raises on damaged bytes, beside its own error.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)


class Package:
    """A package whose files are what its manifest says.

    Attributes:
        source: the folder or zip that was read.
        folder: where the files lie; for a zip a private folder that goes with this object, at the
            end of a ``with`` block at the latest.
    """

    def __init__(
        self, manifest: Manifest, *, source: Path, folder: Path, is_unpacked: bool
    ) -> None:
        self.manifest = manifest
        self.source = source
        self.folder = folder
        self._remove = (
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            if is_unpacked
            else None
        )

    def artifact(self, name: str | None = None) -> ArtifactEntry:
        """Return the artifact of this name, or the default one.

        Raises:
            InputError: there is none of that name.
        """
        wanted = name or self.manifest.default_artifact
        for artifact in self.manifest.artifacts:
            if artifact.name == wanted:
                return artifact
        names = ", ".join(artifact.name for artifact in self.manifest.artifacts)
        raise InputError(
            problem(
                f"{self.source} holds no artifact '{wanted}'",
                expected=f"one of {names}",
                mend="Choose one of those, or none for the default.",
            )
        )

    def close(self) -> None:
        """Remove what was unpacked."""
        if self._remove is not None:
            self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_package(path: Path, *, max_bytes: int = MAX_PACKAGE_BYTES) -> Package:
    """Open a package folder or zip after checking everything in it.

    Args:
        max_bytes: the most that all files together may take.

    Raises:
        InputError: with every file that is missing, changed, too many or badly named.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path, max_bytes)
        if path.is_file() and zipfile.is_zipfile(path):
            return _read_zip(path, max_bytes)
        is_there = path.exists()
        given = f"{path} is not a zip file" if is_there else f"there is no file or folder {path}"
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        given = f"{path} is too long a name"
    raise InputError(
        problem(
            given,
            expected="a package as `understudy release` writes it, a folder or a zip",
            mend="Check the path; an incomplete download is not a zip either.",
        )
    )


def _read_folder(folder: Path, max_bytes: int) -> Package:
    path = folder / MANIFEST_NAME
    if path.is_symlink() or not path.is_file():
        raise InputError(_no_manifest(folder))
    _check_manifest_size(folder, path.stat().st_size)
    manifest = parse_manifest(path.read_bytes(), where=str(folder))
    _check_total(manifest, max_bytes, where=folder)
    problems = [
        sentence
        for name in manifest.files
        if (sentence := _damage(folder, name, manifest)) is not None
    ]
    problems += [_extra(folder, name) for name in unlisted_files(folder, manifest.files)]
    if problems:
        raise InputError(*problems)
    return Package(manifest, source=folder, folder=folder, is_unpacked=False)


def _damage(folder: Path, name: str, manifest: Manifest) -> str | None:
    """Return what is wrong with one file of a folder, or None."""
    entry = manifest.files[name]
    path = folder / name
    parents = [folder / parent for parent in PurePosixPath(name).parents][:-1]
    if any(one.is_symlink() for one in (path, *parents)):
        return problem(
            f"{folder}: {name} is, or lies behind, a symbolic link",
            expected="a file of its own",
            mend="Copy the package with the files that its links point to.",
        )
    if not path.is_file():
        return _missing(folder, name)
    if path.stat().st_size != entry.bytes:
        return problem(
            f"{folder}: {name} has {path.stat().st_size:,} bytes",
            expected=f"{entry.bytes:,}",
            mend=FETCH_AGAIN,
        )
    digest = file_hash(path)
    return None if digest == entry.sha256 else _changed(folder, name, digest, entry.sha256)


def unlisted_files(folder: Path, listed: Collection[str]) -> list[str]:
    """Return files and links below a package folder that are neither listed nor built there.

    Whatever lies beside a script or a header can change what runs, so nothing else may.
    """
    found = []
    for place, folders, files in os.walk(folder):
        below = Path(place)
        links = [name for name in folders if (below / name).is_symlink()]
        found += [(below / name).relative_to(folder) for name in files + links]
    names = {name.as_posix() for name in found if not _is_built(name.parts)}
    return sorted(names - {MANIFEST_NAME, *listed})


def _is_built(parts: tuple[str, ...]) -> bool:
    """Return whether a file is what ``make``, Python or a file manager put there."""
    in_build = len(parts) > 3 and parts[0] == "artifacts" and parts[2] == "build"
    is_cached = len(parts) > 1 and parts[-2] == "__pycache__" and parts[-1].endswith(".pyc")
    is_litter = parts[-1] in (".DS_Store", "Thumbs.db", "desktop.ini")
    return in_build or is_cached or is_litter or parts == ("run_c", "classify")


def _read_zip(path: Path, max_bytes: int) -> Package:
    try:
        with zipfile.ZipFile(path) as archive:
            members = _safe_members(path, archive, max_bytes)
            if MANIFEST_NAME not in members:
                raise InputError(_no_manifest(path))
            _check_manifest_size(path, members[MANIFEST_NAME].file_size)
            data = b"".join(_chunks(archive, MANIFEST_NAME))
            manifest = parse_manifest(data, where=str(path))
            _check_total(manifest, max_bytes, where=path)
            _check_members(path, members, manifest)
            folder = Path(tempfile.mkdtemp(prefix="understudy-package-"))
            try:
                problems = _unpack(path, archive, manifest, folder)
                if problems:
                    raise InputError(*problems)
                (folder / MANIFEST_NAME).write_bytes(data)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except DAMAGE as error:
        raise InputError(
            problem(
                f"{path} cannot be unpacked ({error})",
                expected="an intact zip file",
                mend=FETCH_AGAIN,
            )
        ) from None
    return Package(manifest, source=path, folder=folder, is_unpacked=True)


def _safe_members(
    path: Path, archive: zipfile.ZipFile, max_bytes: int
) -> dict[str, zipfile.ZipInfo]:
    """Return the files by name; whatever could do harm when unpacked is an InputError."""
    every = archive.infolist()
    declared = sum(member.file_size for member in every)
    if len(every) > MAX_FILES or declared > max_bytes:
        raise InputError(
            problem(
                f"{path} declares {len(every):,} files of {declared:,} bytes",
                expected=f"at most {MAX_FILES:,} files of {max_bytes:,} bytes",
                mend="Do not unpack it: it may be a zip bomb.",
            )
        )
    problems = []
    counts = Counter(member.filename for member in every)
    for member in every:
        reason = unsafe_name(member.filename.removesuffix("/"))
        if stat.S_ISLNK(member.external_attr >> 16):
            reason = "it is a symbolic link"
        elif counts[member.filename] > 1:
            reason = "it is there more than once"
        elif member.flag_bits & 0x1:
            reason = "it is encrypted"
        elif member.compress_type not in COMPRESSIONS:
            reason = f"it is compressed with method {member.compress_type}"
        if reason:
            problems.append(
                problem(
                    f"{path}: {member.filename!r} cannot be used: {reason}",
                    expected="plain files inside the package, stored or deflated",
                    mend="Do not unpack it; get the package from a source that you trust.",
                )
            )
    if problems:
        raise InputError(*dict.fromkeys(problems))
    return {member.filename: member for member in every if not member.is_dir()}


def _check_members(path: Path, members: dict[str, zipfile.ZipInfo], manifest: Manifest) -> None:
    present = members.keys() - {MANIFEST_NAME}
    problems = [_missing(path, name) for name in sorted(manifest.files.keys() - present)]
    problems += [_extra(path, name) for name in sorted(present - manifest.files.keys())]
    problems += [
        problem(
            f"{path}: {name} declares {members[name].file_size:,} bytes",
            expected=f"{entry.bytes:,}",
            mend=FETCH_AGAIN,
        )
        for name, entry in manifest.files.items()
        if name in present and members[name].file_size != entry.bytes
    ]
    if problems:
        raise InputError(*problems)


def _unpack(path: Path, archive: zipfile.ZipFile, manifest: Manifest, folder: Path) -> list[str]:
    """Unpack the files and return what is wrong with them. No more is written than declared."""
    problems = []
    for name, entry in manifest.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        try:
            with target.open("xb") as file:
                for chunk in _chunks(archive, name):
                    digest.update(chunk)
                    file.write(chunk)
        except DAMAGE as error:
            problems.append(
                problem(
                    f"{path}: {name} cannot be unpacked ({error})",
                    expected=f"{entry.bytes:,} bytes of SHA-256 {entry.sha256[:12]}",
                    mend=FETCH_AGAIN,
                )
            )
            continue
        if digest.hexdigest() != entry.sha256:
            problems.append(_changed(path, name, digest.hexdigest(), entry.sha256))
    return problems


def _chunks(archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    """Yield the bytes of a member. One that begins where no file ends is damaged, too."""
    try:
        with archive.open(name) as member:
            while chunk := member.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise zipfile.BadZipFile(str(error)) from None


def _check_manifest_size(where: Path, num_bytes: int) -> None:
    if num_bytes > MAX_MANIFEST_BYTES:
        raise InputError(
            problem(
                f"{where}: {MANIFEST_NAME} has {num_bytes:,} bytes",
                expected=f"at most {MAX_MANIFEST_BYTES:,}",
                mend=FETCH_AGAIN,
            )
        )


def _check_total(manifest: Manifest, max_bytes: int, *, where: Path) -> None:
    if len(manifest.files) > MAX_FILES or manifest.total_bytes > max_bytes:
        raise InputError(
            problem(
                f"{where}: {MANIFEST_NAME} lists {len(manifest.files):,} files of "
                f"{manifest.total_bytes:,} bytes",
                expected=f"at most {MAX_FILES:,} files of {max_bytes:,} bytes",
                mend="Raise max_bytes if the package is from a source that you trust.",
            )
        )


def _no_manifest(where: Path) -> str:
    return problem(
        f"{where} has no {MANIFEST_NAME} at its top",
        expected="a package as `understudy release` writes it",
        mend="Name the folder or zip that holds the manifest itself.",
    )


def _missing(where: Path, name: str) -> str:
    return problem(f"{where}: {name} is missing", expected="every file", mend=FETCH_AGAIN)


def _extra(where: Path, name: str) -> str:
    return problem(
        f"{where}: {name!r} is not in the manifest",
        expected="only files that the manifest lists",
        mend="Remove it, if you know where it came from, or get the package again.",
    )


def _changed(where: Path, name: str, given: str, expected: str) -> str:
    return problem(
        f"{where}: {name} was changed, its SHA-256 is {given[:12]}",
        expected=expected[:12],
        mend=FETCH_AGAIN,
    )
