"""Writes a package, under its final name only when it is whole and has been read back."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

import understudy
from understudy.artifacts import atomic_path, file_hash
from understudy.data.decode import ResizeRule
from understudy.errors import InputError, problem
from understudy.package import c_runner
from understudy.package.card import CARD_NAME, ModelCard, render_card
from understudy.package.manifest import (
    CODE_TARGETS,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    ArtifactEntry,
    Manifest,
    Preprocessing,
    manifest_text,
    seal,
    unsafe_name,
    validation_problems,
)
from understudy.package.placing import check_package_path, move, part_folder, sync_folder
from understudy.package.predict import RUNTIMES_FOLDER
from understudy.package.reading import read_package

STATISTICS_NAME = "reference_statistics.json"
RUNNER_NAME = "run.py"
TEMPLATES_FOLDER = Path(__file__).parent / "templates"
FIRST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


class ArtifactFiles(Protocol):
    """What is packed: ``understudy.export.target.Artifact`` is one.

    ``files`` are names in ``folder``, files or folders of files; the runtime opens the first.
    """

    @property
    def target(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def files(self) -> tuple[str, ...]: ...
    @property
    def batch(self) -> str: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class PackageContents:
    """What a package says beside its artifacts.

    Attributes:
        name, version: of the release, chosen by its maker.
        created: when, in ISO 8601; given, so that equal contents are equal bytes.
        image_shape: (C, H, W); one channel is grey, three are RGB.
        statistics: as ``reference_statistics`` returns them.
        default_artifact: "<target>-<precision>"; None is an ONNX file where there is one.
        resize: what the training data's loading did to pictures of other sizes.
        measured: artifact name to accuracy, latency and the like, such as
            {"onnx-int8": {"accuracy": 0.786, "latency_ms": 0.05}}.
    """

    name: str
    version: str
    created: str
    class_names: Sequence[str]
    image_shape: tuple[int, int, int]
    card: ModelCard
    statistics: Mapping[str, Any]
    default_artifact: str | None = None
    resize: ResizeRule = "shorter_side_center_crop"
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def write_package(
    target: Path,
    artifacts: Sequence[ArtifactFiles],
    contents: PackageContents,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Write a package to a folder, or to a zip where the name ends in ".zip".

    Equal contents give equal bytes (of a zip: with the same zlib). Needs jinja2, not torch. A kill
    at any moment leaves nothing, or a whole package, under the final name. When a folder is
    overwritten, a moment with nothing there is possible: after a kill in it, the next call for
    this name brings the old package back first.

    Args:
        overwrite: replace a package that is there. What is not a package, or holds files of
            others, is never replaced.

    Raises:
        InputError: the target exists, artifacts are missing files, or something does not fit.
    """
    # Through a link, so that what it points to is replaced and not the link.
    target = Path(target).resolve()
    check_package_path(target, overwrite=overwrite)
    _check_artifacts(artifacts, contents)
    target.parent.mkdir(parents=True, exist_ok=True)
    with part_folder(target) as part:
        # Again: what a killed writer had set aside may be there now.
        is_zip = check_package_path(target, overwrite=overwrite)
        staged = part / "package"
        try:
            manifest = _write_folder(staged, artifacts, contents)
        except ValidationError as error:
            raise InputError(*validation_problems(error, "the package to write")) from None
        read_package(staged)
        if is_zip:
            zipped = part / target.name
            _write_zip(zipped, staged, manifest)
            zipped.replace(target)
            sync_folder(target.parent)
        else:
            move(staged, target, part)
    return manifest


def _write_folder(
    folder: Path, artifacts: Sequence[ArtifactFiles], contents: PackageContents
) -> Manifest:
    folder.mkdir()
    entries = [_copy_artifact(folder, one, contents) for one in artifacts]
    preprocessing = Preprocessing(
        image_shape=contents.image_shape,
        color_order="GRAY" if contents.image_shape[0] == 1 else "RGB",
        resize=contents.resize,
    )
    runners, notes = _write_runners(folder, entries, contents)
    card = render_card(
        contents.card,
        title=f"{contents.name} {contents.version}",
        created=contents.created,
        preprocessing=preprocessing,
        class_names=contents.class_names,
        artifacts=entries,
        notes=notes,
    )
    _write(folder / CARD_NAME, card)
    _write(folder / STATISTICS_NAME, _json_text(contents.statistics, "the reference statistics"))
    manifest = seal(
        {
            "schema_version": SCHEMA_VERSION,
            "name": contents.name,
            "version": contents.version,
            "created": contents.created,
            "made_by": f"understudy {understudy.__version__}",
            "class_names": list(contents.class_names),
            "preprocessing": preprocessing.model_dump(mode="json"),
            "default_artifact": contents.default_artifact or _default(entries),
            "artifacts": [entry.model_dump(mode="json") for entry in entries],
            "runners": runners,
            "notes": notes,
            "files": _hashes(folder),
        }
    )
    _write(folder / MANIFEST_NAME, manifest_text(manifest))
    _sync(folder)
    return manifest


def _copy_artifact(
    folder: Path, artifact: ArtifactFiles, contents: PackageContents
) -> ArtifactEntry:
    name = _name(artifact)
    place = f"artifacts/{name}"
    files = _files_of(artifact)
    for file in files:
        _copy(artifact.folder / file, folder / place / file)
    script = RUNTIMES_FOLDER / f"{artifact.target}.py"
    runtime = f"runtimes/{artifact.target}.py" if script.is_file() else None
    if runtime:
        _copy(script, folder / runtime)
    return ArtifactEntry(
        target=artifact.target,
        precision=artifact.precision,
        folder=place,
        opens=artifact.files[0],
        files=files,
        size_bytes=sum((folder / place / file).stat().st_size for file in files),
        batch="one" if artifact.batch == "one" else "any",
        runtime=runtime,
        measured=_plain(contents.measured.get(name, {}), f"the measurements of {name}"),
        facts=_plain(artifact.facts, f"the facts of {name}"),
        notes=list(artifact.notes),
    )


def _files_of(artifact: ArtifactFiles) -> list[str]:
    """Return every file of an artifact; a folder among its names stands for what is in it."""
    names = []
    for name in artifact.files:
        path = artifact.folder / name
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        names += [one.relative_to(artifact.folder).as_posix() for one in below if one.is_file()]
    return list(dict.fromkeys(names))


def _write_runners(
    folder: Path, entries: Sequence[ArtifactEntry], contents: PackageContents
) -> tuple[dict[str, str], list[str]]:
    """Write run.py and run_c; return them by language, and why one is not there."""
    runners, notes = {}, []
    if any(entry.target == "onnx" for entry in entries):
        _copy(TEMPLATES_FOLDER / RUNNER_NAME, folder / RUNNER_NAME)
        runners["python"] = RUNNER_NAME
    else:
        notes.append("There is no run.py: no artifact is an ONNX file.")
    in_c = next((entry for entry in entries if entry.target == "c"), None)
    if in_c is not None:
        sources = c_runner.runner_files(
            in_c, image_shape=contents.image_shape, class_names=contents.class_names
        )
        for name, text in sources.items():
            _write(folder / name, text)
        runners["c"] = c_runner.MAIN_NAME
    else:
        notes.append("There is no runner in C: no artifact is C code.")
    return runners, notes


def _default(entries: Sequence[ArtifactEntry]) -> str:
    """Return an ONNX file, or else one that runs in Python, or else the first."""
    in_onnx = [entry for entry in entries if entry.target == "onnx"]
    runs = [entry for entry in entries if entry.runtime and entry.target not in CODE_TARGETS]
    return [*in_onnx, *runs, *entries][0].name


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": file_hash(path),
            "bytes": path.stat().st_size,
        }
        for path in files
    }


def _write_zip(target: Path, staged: Path, manifest: Manifest) -> None:
    """Zip the folder: fixed order, dates and modes."""
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in (MANIFEST_NAME, *sorted(manifest.files)):
            member = zipfile.ZipInfo(name, FIRST_ZIP_DATE)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.create_system = 3  # Unix: the one whose modes the next line gives
            member.external_attr = 0o100644 << 16
            with (staged / name).open("rb") as source, archive.open(member, "w") as file:
                shutil.copyfileobj(source, file)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def _copy(source: Path, target: Path) -> None:
    # Not copy2: the source's time and mode are no part of the package.
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _sync(folder: Path) -> None:
    """Bring every file to the disk before the folder gets its name."""
    for place, _, files in os.walk(folder):
        for name in files:
            with (Path(place) / name).open("rb+") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def _plain(values: Mapping[str, Any], what: str) -> Any:
    return json.loads(_json_text(values, what))


def _json_text(values: Mapping[str, Any], what: str) -> str:
    try:
        return json.dumps(values, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            problem(
                f"{what} cannot be written as JSON ({error})",
                expected="finite numbers, text, lists and mappings",
                mend="Leave out what was not measured, or give None.",
            )
        ) from None


def _name(artifact: ArtifactFiles) -> str:
    return f"{artifact.target}-{artifact.precision}"


def _check_artifacts(artifacts: Sequence[ArtifactFiles], contents: PackageContents) -> None:
    names = [_name(artifact) for artifact in artifacts]
    problems = [
        problem(f"{given} is asked for", expected=f"one of {', '.join(names)}", mend="Use one.")
        for given in (contents.default_artifact, *contents.measured)
        if given is not None and given not in names
    ]
    if not artifacts:
        problems.append(
            problem("there are no artifacts", expected="at least one", mend="Export the student.")
        )
    for artifact in artifacts:
        for file in artifact.files:
            reason = unsafe_name(file)
            if not reason and not (artifact.folder / file).exists():
                reason = f"it is not in {artifact.folder}"
            if reason:
                problems.append(
                    problem(
                        f"{_name(artifact)}: the file '{file}' cannot be packed: {reason}",
                        expected="files of the artifact's folder",
                        mend="Export the student again.",
                    )
                )
    if problems:
        raise InputError(*problems)
