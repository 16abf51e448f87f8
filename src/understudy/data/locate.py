"""What a data source is, and which files or parts of it are train, validation and test.

Only names are looked at here: nothing is read, and the libraries that read are not imported.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from understudy.data.images import GIVEN_SPLITS
from understudy.errors import DataError, problem
from understudy.progress import log

Kind = Literal["parquet", "arrow", "images", "saved", "hub"]

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
SPLIT_WORD = re.compile(rf"(?:^|[-_. ])({'|'.join(SPLIT_WORDS)})(?=$|[-_. \d])")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
PARQUET_SUFFIXES = frozenset({".parquet"})
ARROW_SUFFIXES = frozenset({".arrow", ".feather"})
TABLE_SUFFIXES = PARQUET_SUFFIXES | ARROW_SUFFIXES
IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("png", "jpg", "jpeg", "jpe", "jfif", "bmp", "dib", "gif", "webp", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "avif", "jp2", "tga"),
    )
)
MAX_NAMES = 20
ACCEPTED = (
    "'digits', a .parquet or .arrow file, a folder of such files, a folder written by "
    "save_to_disk, an image folder (train/CLASS/*.png or CLASS/*.png), or a name on the hub"
)


@dataclass(frozen=True)
class Location:
    """A source's kind, and its files by given split, in the order of ``GIVEN_SPLITS``.

    Attributes:
        kind: how it is read.
        root: the file or folder; for the hub its name ("owner/name" or "owner/name:config").
        files: all files that the split's content depends on, sorted; empty for the hub.
        parts: where the source names its parts itself: split to that name (the class folders'
            parent, the key of a saved or hub data set).
    """

    kind: Kind
    root: str
    files: Mapping[str, tuple[Path, ...]]
    parts: Mapping[str, str]


def locate(source: str, splits: Mapping[str, str] | None) -> Location:
    """Return what ``source`` is. Raises DataError if it is nothing that can be read.

    ``splits`` maps "train", "validation" and "test" to the source's own name of that part: a file
    name or pattern, a sub-folder, or a key; without it the parts are recognised by their names.
    """
    unknown = sorted(set(splits or {}) - set(GIVEN_SPLITS))
    if unknown:
        raise DataError(
            problem(
                f"data.splits names {', '.join(map(repr, unknown))}",
                expected=", ".join(GIVEN_SPLITS),
                mend="Give for each of these the name of that part in the source.",
            )
        )
    path = Path(source).expanduser()
    if path.is_file():
        return _single_file(path)
    if path.is_dir():
        return _folder(path, splits)
    looks_like_path = source.startswith((".", "/", "~")) or path.suffix.lower() in TABLE_SUFFIXES
    if looks_like_path or HUB_NAME.fullmatch(source) is None:
        raise DataError(
            problem(
                f"{source} does not exist",
                expected=ACCEPTED,
                mend="Correct the path; it is taken relative to the current folder.",
            )
        )
    return Location("hub", source, {}, dict(splits or {}))


def locate_pictures(source: str) -> Location:
    """Return what a source of pictures without labels is, the part for training where it has parts.

    In a folder of pictures they may lie anywhere. Raises DataError as ``locate`` does.
    """
    root = Path(source).expanduser()
    if not root.is_dir() or _table_folder(root, None) is not None:
        return locate(source, None)
    parts = [path for path in sorted(root.iterdir()) if path.is_dir() and _is_split_folder(path)]
    training = [path for path in parts if SPLIT_WORDS[path.name.lower()] == "train"]
    files = [path for folder in training or [root] for path in _all_files(folder)]
    pictures = tuple(path for path in files if is_image_name(path))
    if not pictures:
        raise DataError(problem(f"{root} holds no data", expected=ACCEPTED, mend="Check the path."))
    _require_utf8(pictures)
    return Location("images", str(root), {"train": pictures}, {})


def choose_parts(
    names: Sequence[str], splits: Mapping[str, str] | None, *, where: str
) -> dict[str, list[str]]:
    """Return split to the names that belong to it.

    By the patterns in ``splits``, else by words in the names ("train-00000", "cifar_test"). Names
    without such a word are training rows if no name has one, otherwise they are not used.
    """
    chosen: dict[str, list[str]] = {}
    if splits:
        for split in filter(splits.__contains__, GIVEN_SPLITS):
            chosen[split] = fnmatch.filter(names, splits[split])
        missing = [split for split, matching in chosen.items() if not matching]
        if missing:
            raise DataError(
                *(
                    problem(
                        f"data.splits.{split} is '{splits[split]}', which {where} does not have",
                        expected=f"one of {', '.join(sorted(names))}",
                        mend="Correct the name." + nearest_hint(splits[split], names),
                    )
                    for split in missing
                )
            )
        return chosen
    unnamed = []
    for name in names:
        found = SPLIT_WORD.search(name.lower())
        if found:
            chosen.setdefault(SPLIT_WORDS[found[1]], []).append(name)
        else:
            unnamed.append(name)
    if not chosen:
        return {"train": unnamed}
    if unnamed:
        log.warning("%s: %s not used, being no train, validation or test part", where, unnamed)
    return {split: chosen[split] for split in GIVEN_SPLITS if split in chosen}


def nearest_hint(name: str, known: Sequence[str]) -> str:
    """Return " Did you mean ...?" if a known name is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _single_file(path: Path) -> Location:
    suffix = path.suffix.lower()
    if suffix in PARQUET_SUFFIXES:
        return Location("parquet", str(path), {"train": (path,)}, {})
    if suffix in ARROW_SUFFIXES:
        return Location("arrow", str(path), {"train": (path,)}, {})
    raise DataError(problem(f"{path} is no data set", expected=ACCEPTED, mend="Name one of these."))


def _folder(root: Path, splits: Mapping[str, str] | None) -> Location:
    return _table_folder(root, splits) or _image_folder(root, splits)


def _table_folder(root: Path, splits: Mapping[str, str] | None) -> Location | None:
    """A folder with tables in it; None if there are none."""
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _saved(root, splits)
    tables: tuple[tuple[Kind, frozenset[str]], ...] = (
        ("parquet", PARQUET_SUFFIXES),
        ("arrow", ARROW_SUFFIXES),
    )
    for kind, suffixes in tables:
        # Copies of hub repositories keep their tables in a folder named data.
        for folder in (root, root / "data"):
            found = _visible(folder, suffixes) if folder.is_dir() else []
            if found:
                by_name = {path.name: path for path in found}
                parts = choose_parts(list(by_name), splits, where=str(folder))
                files = {
                    split: tuple(by_name[name] for name in names) for split, names in parts.items()
                }
                return Location(kind, str(root), files, {})
    return None


def _saved(root: Path, splits: Mapping[str, str] | None) -> Location:
    """A folder that ``datasets`` has written with save_to_disk, with or without splits."""
    if not (root / "dataset_dict.json").is_file():
        return Location("saved", str(root), {"train": _all_files(root)}, {})
    try:
        names = list(json.loads((root / "dataset_dict.json").read_text())["splits"])
    except (ValueError, KeyError, TypeError):
        raise DataError(
            problem(
                f"{root / 'dataset_dict.json'} is damaged",
                expected="the list of splits that save_to_disk writes",
                mend="Write the data set anew.",
            )
        ) from None
    parts = one_part_each(names, splits, where=str(root))
    files = {split: _all_files(root / name) for split, name in parts.items()}
    return Location("saved", str(root), files, parts)


def one_part_each(
    names: Sequence[str], splits: Mapping[str, str] | None, *, where: str
) -> dict[str, str]:
    """Return split to the single part it is; several parts for one split are an error."""
    parts = choose_parts(names, splits, where=where)
    problems = [
        problem(
            f"{where} has the parts {', '.join(several)}, and which is the {split} part is not "
            "clear",
            expected="one part for each of train, validation and test",
            mend=f"Name it with data.splits, for instance {{{split}: {several[0]}}}.",
        )
        for split, several in parts.items()
        if len(several) > 1
    ]
    if problems:
        raise DataError(*problems)
    return {split: several[0] for split, several in parts.items()}


def _image_folder(root: Path, splits: Mapping[str, str] | None) -> Location:
    """train/CLASS/*.png (and validation, test), or CLASS/*.png."""
    folders = {path.name: path for path in sorted(root.iterdir()) if _is_visible_folder(path)}
    if splits:
        parts = one_part_each(list(folders), splits, where=str(root))
    else:
        # A folder named train that holds pictures and not folders is a class (of vehicles).
        named = [name for name, path in folders.items() if _is_split_folder(path)]
        parts = one_part_each(named, None, where=str(root)) if named else {"train": "."}
        unused = sorted(set(folders) - set(named)) if named else []
        if unused:
            log.warning(
                "%s: folders %s not used, being no train, validation or test part", root, unused
            )
    files, problems = {}, []
    for split, name in parts.items():
        folder = root / name
        files[split] = tuple(path for path in _all_files(folder) if is_image_name(path))
        stray = [path for path in files[split] if path.parent == folder]
        if stray:
            problems.append(
                problem(
                    f"{folder} holds {len(stray)} images outside of a class folder, for instance "
                    f"{stray[0].name}",
                    expected="a folder a class: CLASS/*.png",
                    mend="Move them into folders named after their classes.",
                )
            )
    if not any(files.values()):
        raise DataError(problem(f"{root} holds no data", expected=ACCEPTED, mend="Check the path."))
    if problems:
        raise DataError(*problems)
    location = Location("images", str(root), files, parts)
    _require_utf8(
        [*map(Path, class_names(location)), *(p for found in files.values() for p in found)]
    )
    return location


def _is_split_folder(path: Path) -> bool:
    if path.name.lower() not in SPLIT_WORDS:
        return False
    inside = list(path.iterdir())
    return any(map(_is_visible_folder, inside)) and not any(map(is_image_name, inside))


def is_image_name(path: Path) -> bool:
    """Whether a file is a picture by its name."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def class_names(location: Location) -> list[str]:
    """Return the class names of all parts of an image folder, sorted; empty classes too."""
    roots = [Path(location.root) / name for name in location.parts.values()]
    return sorted({name for root in roots for name in class_folders(root)})


def class_folders(root: Path) -> list[str]:
    """Return the class names of one part of an image folder, sorted; empty classes too."""
    return sorted(path.name for path in root.iterdir() if _is_visible_folder(path))


def _is_visible_folder(path: Path) -> bool:
    return path.is_dir() and not _is_hidden(path.name)


def _visible(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith(".")
    )


def _all_files(folder: Path) -> tuple[Path, ...]:
    """Return all files below, sorted, without hidden ones; links to folders are followed."""
    found: list[Path] = []
    # The real folders on the way to each: a link back to one of them would never end. Two links
    # to one folder are both followed, as a class must not lose its pictures to another.
    ways = {str(folder): frozenset({os.path.realpath(folder)})}
    for parent, folders, names in os.walk(folder, followlinks=True):
        way, entered = ways.pop(parent), []
        for path in (Path(parent, name) for name in folders if not _is_hidden(name)):
            real = os.path.realpath(path)
            if real not in way:
                entered.append(path.name)
                ways[os.path.join(parent, path.name)] = way | {real}  # noqa: PTH118 (as walk names it)
        folders[:] = entered
        found += [Path(parent, name) for name in names if not _is_hidden(name)]
    return tuple(path for path in sorted(found) if path.is_file())


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _require_utf8(paths: Iterable[Path]) -> None:
    """Raise one DataError for all names that no table, record or message can hold."""
    bad = [os.fsencode(path) for path in paths if not _is_utf8(str(path))]
    if bad:
        named = ", ".join(map(repr, bad[:MAX_NAMES]))
        more = f" and {len(bad) - MAX_NAMES} more" if len(bad) > MAX_NAMES else ""
        raise DataError(
            problem(
                f"{len(bad)} file or folder names are not UTF-8: {named}{more}",
                expected="names in UTF-8, for pictures and their classes",
                mend="Rename them: the pictures stay as they are.",
            )
        )


def _is_utf8(text: str) -> bool:
    # What is not is held in surrogates, which cannot be encoded.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
