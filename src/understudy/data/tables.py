"""Rows of a source through the Hugging Face ``datasets`` library: pictures still encoded.

Importing this module imports ``datasets``; it is imported only where a source has to be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from understudy.data.columns import (
    Columns,
    RowFacts,
    encode_labels,
    find_columns,
    find_image_column,
    is_scalar,
    plain_value,
)
from understudy.data.decode import Encoded
from understudy.data.images import GIVEN_SPLITS
from understudy.data.locate import Location, class_names, one_part_each
from understudy.errors import DataError, problem

IMAGE = "image"


@dataclass(frozen=True)
class Table:
    """One given split as ``datasets`` reads it, with the column types that its files state."""

    rows: datasets.Dataset
    features: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class TableImages:
    """The encoded pictures of all rows of a source. Picklable; large tables stay on disk."""

    rows: datasets.Dataset

    def encoded(self, rows: Sequence[int]) -> list[Encoded]:
        """Return the encoded pictures of these rows."""
        return [_encoded(value) for value in self.rows[list(rows)][IMAGE]]

    def names_other_files(self) -> bool:
        """Whether a row names a file instead of holding the bytes."""
        return any(
            pc.any(
                pc.and_(pc.is_null(chunk.field("bytes")), pc.is_valid(chunk.field("path")))
            ).as_py()
            for chunk in self.rows.data.column(IMAGE).chunks
        )


def _encoded(value: Mapping[str, Any] | None) -> Encoded:
    if value is None:
        return None
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    return None if value["path"] is None else Path(value["path"])


def open_tables(
    location: Location,
    *,
    image_column: str | None,
    label_column: str | None,
    memory_limit_bytes: int,
    cache: Path | None,
) -> tuple[RowFacts, TableImages]:
    """Return what each row says besides its picture, and the encoded pictures.

    Files larger than the limit are converted once to Arrow files that are mapped, not read, in
    ``cache`` or else where ``datasets`` keeps its own. Raises DataError.
    """
    with _quiet_datasets():
        if location.kind == "images":
            tables = _read_image_folder(location)
        else:
            tables = _read_tables(location, memory_limit_bytes, cache)
        features = {split: table.features for split, table in tables.items()}
        columns = find_columns(features, image_column=image_column, label_column=label_column)
        images = datasets.concatenate_datasets(
            [_only_images(table.rows, columns.image) for table in tables.values()]
        )
        return _row_facts(tables, columns), TableImages(images)


def open_pictures(
    location: Location, *, image_column: str | None, memory_limit_bytes: int, cache: Path | None
) -> TableImages:
    """Return the encoded pictures alone, of the training part where there are several parts.

    Other arguments and errors as those of ``open_tables``.
    """
    with _quiet_datasets():
        if location.kind == "images":
            encoded = [{"bytes": None, "path": str(path)} for path in location.files["train"]]
            features = datasets.Features({IMAGE: datasets.Image(decode=False)})
            return TableImages(datasets.Dataset.from_dict({IMAGE: encoded}, features=features))
        tables = _read_tables(location, memory_limit_bytes, cache)
        chosen = [tables["train"]] if "train" in tables else list(tables.values())
        return TableImages(
            datasets.concatenate_datasets(
                [
                    _only_images(table.rows, find_image_column(table.features, image_column))
                    for table in chosen
                ]
            )
        )


def _read_tables(
    location: Location, memory_limit_bytes: int, cache: Path | None
) -> dict[str, Table]:
    if location.kind == "hub":
        return _read_hub(location)
    return {
        split: _read_files(location, split, memory_limit_bytes, cache) for split in location.files
    }


def _row_facts(tables: Mapping[str, Table], columns: Columns) -> RowFacts:
    """Return splits, labels and metadata of all rows, read without the pictures."""
    scalars: dict[str, list[Any]] = {}
    splits: list[str] = []
    for split, table in tables.items():
        names = [
            name
            for name, feature in table.features.items()
            if name in table.rows.column_names and name != columns.image and is_scalar(feature)
        ]
        values = table.rows.select_columns(names).with_format("arrow")[:].to_pydict()
        num_rows = table.rows.num_rows
        for name in {*scalars, *names}:
            # A column that only some splits have is empty in the others.
            before = scalars.setdefault(name, [None] * len(splits))
            before += values.get(name, [None] * num_rows)
        splits += [split] * num_rows
    raw_labels = scalars.pop(columns.label)
    feature = next(iter(tables.values())).features[columns.label]
    labels, class_names = encode_labels(raw_labels, feature, column=columns.label)
    all_features = {name: f for table in tables.values() for name, f in table.features.items()}
    return RowFacts(
        splits=splits,
        labels=labels,
        class_names=class_names,
        metadata={
            name: [plain_value(value, all_features[name]) for value in values]
            for name, values in sorted(scalars.items())
        },
    )


def _only_images(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Return the picture column alone, under one name and undecoded."""
    only = rows.select_columns([column])
    if column != IMAGE:
        only = only.rename_column(column, IMAGE)
    try:
        return only.cast_column(IMAGE, datasets.Image(decode=False))
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError) as error:
        raise DataError(
            problem(
                f"the column '{column}' cannot be read as images ({error})",
                expected="encoded image files: bytes, or a struct of bytes and path",
                mend="Name another column with data.image_column, or store PNG or JPEG bytes.",
            )
        ) from error


def _read_image_folder(location: Location) -> dict[str, Table]:
    roots = {split: Path(location.root) / name for split, name in location.parts.items()}
    names = class_names(location)
    features = datasets.Features(
        {IMAGE: datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)}
    )
    tables = {}
    for split in filter(roots.__contains__, GIVEN_SPLITS):
        files = location.files[split]
        class_of = [names.index(path.relative_to(roots[split]).parts[0]) for path in files]
        encoded = [{"bytes": None, "path": str(path)} for path in files]
        rows = datasets.Dataset.from_dict({IMAGE: encoded, "label": class_of}, features=features)
        tables[split] = Table(rows, features)
    return tables


def _read_files(
    location: Location, split: str, memory_limit_bytes: int, cache: Path | None
) -> Table:
    files = location.files[split]
    try:
        if location.kind == "saved":
            folder = Path(location.root) / location.parts.get(split, ".")
            rows = datasets.load_from_disk(str(folder))
            return Table(rows, rows.features)
        if sum(path.stat().st_size for path in files) <= memory_limit_bytes:
            read = pq.read_table if location.kind == "parquet" else _read_arrow
            table = pa.concat_tables(map(read, files), promote_options="default")
            rows = datasets.Dataset(table)
            return Table(rows, rows.features)
        schemas = [_schema(location.kind, path) for path in files]
        features = datasets.Features.from_arrow_schema(schemas[0])
        rows = datasets.load_dataset(
            location.kind,
            data_files=list(map(str, files)),
            split="train",
            # Labels as plain numbers: ``datasets`` refuses a file for one label out of range.
            features=datasets.Features(
                {
                    name: datasets.Value("int64") if _is_class(feature) else feature
                    for name, feature in features.items()
                }
            ),
            cache_dir=None if cache is None else str(cache),
        )
        return Table(rows, features)
    except DataError:
        raise
    # pyarrow and datasets raise many kinds on damaged files, none of them about our own code.
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        KeyError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise DataError(
            problem(
                f"the {split} part of {location.root} cannot be read ({_first_line(error)})",
                expected=f"readable {location.kind} data with the same columns in all files",
                mend="Check that the files are whole, or write them anew.",
            )
        ) from error


def _is_class(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel)


def _read_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as mapped:
        try:
            return pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(mapped).read_all()


def _schema(kind: str, path: Path) -> pa.Schema:
    if kind == "parquet":
        return pq.read_schema(path)
    with pa.memory_map(str(path)) as mapped:
        try:
            return pa.ipc.open_stream(mapped).schema
        except pa.ArrowInvalid:
            return pa.ipc.open_file(mapped).schema


def _read_hub(location: Location) -> dict[str, Table]:
    name, _, config = location.root.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    # Being offline, a wrong name, a private or gated repository: every library below raises its
    # own kinds for these, and to the user they are one thing.
    except Exception as error:
        raise DataError(
            problem(
                f"{name} is no local file or folder, and the hub did not give it "
                f"({type(error).__name__}: {_first_line(error)})",
                expected="an existing path, or the name of a data set on the Hugging Face hub and "
                "a connection to it",
                mend="Correct the path or name, connect, or download the data set elsewhere and "
                "give its Parquet files.",
            )
        ) from error
    parts = one_part_each(list(loaded), location.parts or None, where=name)
    return {split: Table(loaded[part], loaded[part].features) for split, part in parts.items()}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Switch the library's own progress bars off meanwhile: the log is the user's."""
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()
