"""The manifest of a package: what is in it, how pictures are brought to the network, every hash.

Nothing here trusts the file. It imports no torch: a package is read where only a runtime is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)

from understudy.artifacts import content_hash
from understudy.data.decode import ResizeRule
from understudy.errors import InputError, printable, problem
from understudy.settings import Section

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20
MAX_NAME_LENGTH = 240
MAX_PART_BYTES = 255  # of most file systems
MAX_TITLE_LENGTH = 200

FETCH_AGAIN = "Get the package again from where it came, or write it again."

# What runs one of these compiles and runs code out of the package, where others read data.
CODE_TARGETS = frozenset({"c"})


def unsafe_name(name: str) -> str | None:
    """Return why a file name may not be used inside a package, or None where it may."""
    if not name or len(name) > MAX_NAME_LENGTH:
        return f"it has {len(name)} characters"
    if not name.isprintable():
        return "it has control characters"
    if "\\" in name or ":" in name:
        return "it has a backslash or a colon"
    if name.startswith("/"):
        return "it is absolute"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "it has an empty part, '.' or '..'"
    if any(len(part.encode()) > MAX_PART_BYTES for part in name.split("/")):
        return f"it has a part of more than {MAX_PART_BYTES} bytes"
    return None


def _safe_name(name: str) -> str:
    reason = unsafe_name(name)
    if reason:
        raise ValueError(f"not a name inside the package: {reason}")
    return name


def _printable(text: str) -> str:
    # Names end up on terminals, where control characters could rewrite what is shown.
    if not text.isprintable():
        raise ValueError("has control characters")
    return text


FileName = Annotated[str, AfterValidator(_safe_name)]
Title = Annotated[str, Field(min_length=1, max_length=MAX_TITLE_LENGTH), AfterValidator(_printable)]
Word = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,40}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=1 << 16)]
# More digits than Python writes out could stand in a file.
NumBytes = Annotated[int, Field(ge=0, le=1 << 62)]


class FileEntry(Section):
    """One file of the package."""

    sha256: Sha256
    bytes: NumBytes


class ArtifactEntry(Section):
    """One exported student.

    Attributes:
        folder: where its files are, "artifacts/<target>-<precision>".
        opens: the one of its files (or folder of files) that the runtime is given.
        files: every file, relative to ``folder``.
        runtime: the script that opens it, or None where nothing in Python does.
        measured: accuracy, latency and the like, as they were given; empty where not measured.
        facts: what the files say of themselves.
    """

    target: Word
    precision: Word
    folder: FileName
    opens: FileName
    files: list[FileName]
    size_bytes: NumBytes
    batch: Literal["any", "one"]
    runtime: FileName | None
    measured: dict[str, JsonValue]
    facts: dict[str, JsonValue]
    notes: list[str]

    @property
    def name(self) -> str:
        """What the artifact is chosen by."""
        return f"{self.target}-{self.precision}"


class Preprocessing(Section):
    """How a picture becomes the network's input: float32 [n, C, H, W].

    A picture is turned upright by its EXIF orientation, what is transparent is laid on black,
    16-bit grey values are scaled to 8 bits (of 16-bit colours the upper 8 bits are taken), then the
    colours are converted, then the size and range.

    Attributes:
        resize: what happens to a picture of another size. "shorter_side_center_crop" brings the
            shorter side to size and cuts the centre out; "stretch" ignores the aspect ratio.
    """

    image_shape: tuple[Size, Size, Size]
    color_order: Literal["RGB", "GRAY"]
    value_range: tuple[float, float] = (0.0, 1.0)
    layout: Literal["NCHW"] = "NCHW"
    dtype: Literal["float32"] = "float32"
    resize: ResizeRule
    interpolation: Literal["bilinear"] = "bilinear"
    transparency: Literal["black"] = "black"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        num_channels = {"RGB": 3, "GRAY": 1}[self.color_order]
        if self.image_shape[0] != num_channels:
            raise ValueError(f"{self.color_order} has {num_channels} channels")
        if self.value_range != (0.0, 1.0):
            raise ValueError("value_range must be [0, 1]")
        return self


class Manifest(Section):
    """``manifest.json``. ``content_sha256`` is the hash of all other fields."""

    schema_version: Literal[1]
    name: Title
    version: Title
    created: Title
    made_by: Title
    class_names: Annotated[list[Title], Field(min_length=1)]
    preprocessing: Preprocessing
    default_artifact: Title
    artifacts: Annotated[list[ArtifactEntry], Field(min_length=1)]
    runners: dict[Word, FileName]
    notes: list[str]
    files: dict[FileName, FileEntry]
    content_sha256: Sha256

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        names = [artifact.name for artifact in self.artifacts]
        if len(set(names)) != len(names):
            raise ValueError("two artifacts have the same target and precision")
        if self.default_artifact not in names:
            raise ValueError(f"the default artifact '{self.default_artifact}' is not in the table")
        needed = set(self.runners.values())
        for artifact in self.artifacts:
            files = [f"{artifact.folder}/{name}" for name in artifact.files]
            opens = f"{artifact.folder}/{artifact.opens}"
            needed |= {*files, *([artifact.runtime] if artifact.runtime else [])}
            if not any(file == opens or file.startswith(f"{opens}/") for file in files):
                raise ValueError(
                    f"{artifact.name} opens '{artifact.opens}', which it does not hold"
                )
        if needed - self.files.keys():
            raise ValueError(f"no hash of {', '.join(sorted(needed - self.files.keys()))}")
        if MANIFEST_NAME in self.files:
            raise ValueError(f"{MANIFEST_NAME} cannot hold its own hash")
        clash = clashing_name(self.files)
        if clash:
            raise ValueError(f"'{clash}' cannot lie beside another file of the same name")
        return self

    @property
    def total_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.bytes for entry in self.files.values())


def clashing_name(names: Iterable[str]) -> str | None:
    """Return a name that some file system cannot hold beside another one, or None.

    Two that differ only in case, or a file whose name is a folder of another file.
    """
    seen: set[str] = set()
    folders: set[str] = set()
    for name in names:
        folded = name.casefold()
        if folded in seen:
            return name
        seen.add(folded)
        folders |= {str(parent) for parent in PurePosixPath(folded).parents}
    return next(iter(sorted(seen & folders)), None)


def check_class_names(names: Iterable[str]) -> None:
    """Raise one InputError for all names of classes that a manifest cannot hold."""
    problems = [
        problem(
            f"a package cannot hold the class name {name[:40]!r} of {len(name)} characters",
            expected=f"1 to {MAX_TITLE_LENGTH} characters, none of them a control, a joiner or a "
            "space of another kind than ' '",
            mend="Rename the class in the data.",
        )
        for name in names
        if not (0 < len(name) <= MAX_TITLE_LENGTH and name.isprintable())
    ]
    if problems:
        raise InputError(*problems)


def seal(values: dict[str, Any]) -> Manifest:
    """Return the manifest of these fields with its hash.

    Raises:
        InputError: the fields do not make a manifest.
    """
    try:
        return Manifest.model_validate({**values, "content_sha256": content_hash(values)})
    except ValidationError as error:
        raise InputError(*validation_problems(error, "the package to write")) from None


def manifest_text(manifest: Manifest) -> str:
    """Return ``manifest.json``: equal manifests, equal bytes."""
    return json.dumps(manifest.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        InputError: it is not JSON, of another schema version, incomplete, or was changed.
    """
    try:
        values = json.loads(data)
        text = json.dumps(values)
    # Deep nesting ends in RecursionError, bytes that are no text in a ValueError.
    except (ValueError, RecursionError) as error:
        raise InputError(
            problem(
                f"{where}: {MANIFEST_NAME} is not JSON ({error})",
                expected="the manifest as it was written",
                mend=FETCH_AGAIN,
            )
        ) from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    # True equals 1 in Python.
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError(
            problem(
                f"{where}: {MANIFEST_NAME} has schema version {version!r:.40}",
                expected=f"version {SCHEMA_VERSION}",
                mend="Install the version of understudy that wrote the package.",
            )
        )
    try:
        manifest = Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise InputError(*validation_problems(error, where)) from None
    sealed = {key: value for key, value in values.items() if key != "content_sha256"}
    if _hash(sealed) != manifest.content_sha256:
        raise InputError(
            problem(
                f"{where}: {MANIFEST_NAME} was changed after it was written",
                expected=f"content of SHA-256 {manifest.content_sha256[:12]}",
                mend=FETCH_AGAIN,
            )
        )
    return manifest


def _hash(values: dict[str, Any]) -> str | None:
    try:
        return content_hash(values)
    # json.loads takes NaN and lone surrogates, which a written manifest has not.
    except ValueError:
        return None


def validation_problems(error: ValidationError, where: str) -> list[str]:
    """Return what is wrong with a manifest, one sentence a field."""
    sentences = []
    for one in error.errors(include_url=False, include_input=False):
        place = printable(".".join(str(part) for part in one["loc"])) or MANIFEST_NAME
        reason = re.sub(r"^Value error, ", "", one["msg"])
        sentences.append(
            problem(
                f"{where}: {MANIFEST_NAME}, {place}: {reason}",
                expected=f"a manifest of schema version {SCHEMA_VERSION}",
                mend=FETCH_AGAIN,
            )
        )
    return sentences
