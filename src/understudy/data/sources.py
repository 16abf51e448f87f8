"""Where pictures come from: one function from a name or path to an ``ImageSource``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from understudy.data.bad_rows import Judged, judge_rows, number_in_split, refuse_bad_rows
from understudy.data.cache import cache_key, load_scan, save_scan
from understudy.data.images import (
    DataFacts,
    DataIssue,
    DecodedBatches,
    ImageSource,
    InMemoryImages,
    StreamedImages,
    data_fingerprint,
    default_num_workers,
    images_from_tensors,
)
from understudy.data.locate import Location, class_names, locate
from understudy.data.scan import Scan, fits, scan
from understudy.errors import DataError, problem

if TYPE_CHECKING:
    from understudy.data.tables import TableImages

__all__ = [
    "DataFacts",
    "DataIssue",
    "ImageSource",
    "InMemoryImages",
    "StreamedImages",
    "images_from_tensors",
    "load_data",
]


def load_data(
    source: str,
    *,
    splits: Mapping[str, str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: tuple[int, int] | None = None,
    on_bad: str = "error",
    memory_limit_bytes: int = 4 << 30,
    cache: Path | None = None,
) -> ImageSource:
    """Read, check and (if they fit in memory) decode all pictures of a source.

    Args:
        source: "digits", a Parquet or Arrow file or a folder of them, a folder written by
            ``datasets``' save_to_disk, an image folder, or a hub name ("owner/name[:config]").
        splits: "train", "validation", "test" to the source's own names of these parts (a file
            name or pattern, a folder, a key); None recognises them by their names.
        image_column: None finds it by its type.
        label_column: None finds it by its type, or among usual names.
        image_size: (height, width) that pictures are resized to; None needs them all alike.
        on_bad: "error" raises if any row is bad, "skip" leaves bad rows out and lists them.
        memory_limit_bytes: decoded pictures beyond it are streamed from disk.
        cache: folder that keeps decoded pictures for the next run; None keeps none.

    Raises DataError with everything that is wrong.
    """
    if on_bad not in ("error", "skip"):
        raise DataError(
            problem(f"data.on_bad is '{on_bad}'", expected="'error' or 'skip'", mend="Use one.")
        )
    if source == "digits":
        return _digits()
    location = locate(source, splits)
    columns = {"image_column": image_column, "label_column": label_column}
    images, facts, found = _read(
        location,
        columns=columns,
        image_size=image_size,
        memory_limit_bytes=memory_limit_bytes,
        cache=cache,
    )
    judged = judge_rows(
        splits=facts["splits"],
        labels=facts["labels"],
        class_names=facts["class_names"],
        sample_ids=found.sample_ids,
        broken=found.broken,
        names=_file_names(location),
    )
    refuse_bad_rows(judged, on_bad=on_bad, source=source)
    known = _known_facts(facts, found, judged)
    if found.images_NCHW is not None:
        all_kept = len(judged.kept) == len(found.images_NCHW)
        pixels_NCHW = found.images_NCHW if all_kept else found.images_NCHW[judged.kept]
        return InMemoryImages(known, torch.from_numpy(pixels_NCHW))
    assert images is not None, "what is not in memory has been opened"
    batches = DecodedBatches(images, found.layout, resize=image_size is not None)
    return StreamedImages(known, batches, torch.tensor(judged.kept), default_num_workers())


def _digits() -> InMemoryImages:
    """scikit-learn's handwritten digits: 1,797 grey 8x8 pictures (Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Pixels count inked dots, 0 to 16; int(x * 255 / 16 + 0.5) in whole numbers.
    images_NHW = ((bunch.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    return images_from_tensors(
        torch.from_numpy(images_NHW)[:, None].contiguous(),
        torch.from_numpy(bunch.target.astype(np.int64)),
        class_names=[str(name) for name in bunch.target_names],
        # Further tasks on the same pictures.
        metadata={
            "parity": ["odd" if label % 2 else "even" for label in bunch.target.tolist()],
            "at_least_5": ["yes" if label >= 5 else "no" for label in bunch.target.tolist()],
        },
    )


def _read(
    location: Location,
    *,
    columns: Mapping[str, str | None],
    image_size: tuple[int, int] | None,
    memory_limit_bytes: int,
    cache: Path | None,
) -> tuple[TableImages | None, dict[str, Any], Scan]:
    """Return the encoded pictures (None if all are in the scan), the rows' facts, and the scan."""
    folder: Path | None = None
    # What the hub gives is known only once it is loaded, and the library keeps that itself.
    if cache is not None and location.kind != "hub":
        folder = cache / cache_key(location, {**columns, "image_size": image_size})
        kept = load_scan(folder)
        # Folders without pictures, which are no part of the key, give classes too.
        if kept is not None and (
            location.kind != "images" or kept[1]["class_names"] == class_names(location)
        ):
            found, facts = kept
            fitting = fits(found.layout, len(found.sample_ids), memory_limit_bytes)
            if fitting and found.images_NCHW is not None:
                return None, facts, found
            if not fitting:
                images = _open(location, columns, memory_limit_bytes, folder)[1]
                return images, facts, replace(found, images_NCHW=None)
    facts, images = _open(location, columns, memory_limit_bytes, folder)
    numbers = number_in_split(facts["splits"])
    places = [f"row {row} of {split}" for row, split in zip(numbers, facts["splits"], strict=True)]
    found = scan(
        images,
        len(places),
        image_size=image_size,
        memory_limit_bytes=memory_limit_bytes,
        places=_file_names(location) or places,
    )
    # Files that a table only names may change unseen; those of an image folder are in the key.
    if folder is not None and (location.kind == "images" or not images.names_other_files()):
        save_scan(folder, found, facts)
    return images, facts, found


def _open(
    location: Location,
    columns: Mapping[str, str | None],
    memory_limit_bytes: int,
    folder: Path | None,
) -> tuple[dict[str, Any], TableImages]:
    """Return the rows' facts and their encoded pictures; ``folder`` is that of these very files."""
    from understudy.data.tables import open_tables

    facts, images = open_tables(
        location,
        image_column=columns["image_column"],
        label_column=columns["label_column"],
        memory_limit_bytes=memory_limit_bytes,
        cache=None if folder is None else folder / "arrow",
    )
    if len(facts.class_names) < 2:
        raise DataError(
            problem(
                f"the labels name {len(facts.class_names)} classes: {', '.join(facts.class_names)}",
                expected="at least two classes",
                mend="Name the label column with data.label_column, or check the class folders.",
            )
        )
    return dict(vars(facts)), images


def _file_names(location: Location) -> list[str] | None:
    """Return the name of each row where rows are picture files."""
    if location.kind != "images":
        return None
    return [
        str(path.relative_to(location.root)) for paths in location.files.values() for path in paths
    ]


def _known_facts(facts: Mapping[str, Any], found: Scan, judged: Judged) -> DataFacts:
    """Return what is known of the rows that stay."""
    rows = judged.kept
    labels = [facts["labels"][row] for row in rows]
    sample_ids = [found.sample_ids[row] or "" for row in rows]
    given_splits = [facts["splits"][row] for row in rows]
    return DataFacts(
        image_shape=found.layout.image_shape,
        class_names=tuple(facts["class_names"]),
        labels_N=torch.tensor(labels, dtype=torch.int64),
        sample_ids=tuple(sample_ids),
        given_splits=tuple(given_splits),
        fingerprint=data_fingerprint(
            found.layout.image_shape,
            facts["class_names"],
            labels=labels,
            sample_ids=sample_ids,
            given_splits=given_splits,
        ),
        metadata={
            name: [values[row] for row in rows] for name, values in facts["metadata"].items()
        },
        issues=judged.issues,
    )
