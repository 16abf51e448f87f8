"""Pictures without labels: read from a source of their own, or with their labels hidden.

Their label is ``NO_LABEL``. They are training samples like any other for views and stored teacher
outputs; only what asks for a label leaves them out.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from understudy.data.bad_rows import judge_rows, refuse_bad_rows
from understudy.data.cache import cache_key, load_scan, save_scan
from understudy.data.images import (
    NO_LABEL,
    DataFacts,
    DecodedBatches,
    ImageSource,
    InMemoryImages,
    StreamedImages,
    data_fingerprint,
    default_num_workers,
)
from understudy.data.locate import Location, locate_pictures
from understudy.data.scan import Scan, fits, scan
from understudy.data.sources import load_data
from understudy.errors import DataError, problem
from understudy.progress import log

if TYPE_CHECKING:
    from understudy.data.tables import TableImages

PART = "unlabelled"


def load_unlabelled(
    source: str,
    *,
    image_column: str | None = None,
    image_size: tuple[int, int] | None = None,
    on_bad: str = "error",
    memory_limit_bytes: int = 4 << 30,
    cache: Path | None = None,
) -> ImageSource:
    """Read and check the pictures of a source; labels are neither needed nor read.

    Args:
        source: as for ``load_data``. Tables need no label column, and in a folder of pictures
            these may lie anywhere. Of a source with parts the training part is taken.
        image_column, image_size, on_bad, memory_limit_bytes, cache: as for ``load_data``.

    Returns:
        Training rows with the label -1 and no class names.

    Raises:
        DataError: with everything that is wrong.
    """
    if source == "digits":
        digits = load_data(source)
        hidden = hide_labels(digits, torch.ones(digits.num_samples, dtype=torch.bool))
        return replace(hidden, facts=replace(hidden.facts, class_names=()))
    location = locate_pictures(source)
    images, found = _read(location, image_column, image_size, memory_limit_bytes, cache)
    num_rows = len(found.sample_ids)
    root = Path(location.root)
    judged = judge_rows(
        splits=["train"] * num_rows,
        labels=[0] * num_rows,
        class_names=["none"],
        sample_ids=found.sample_ids,
        broken=found.broken,
        names=[str(path.relative_to(root)) for path in location.files["train"]]
        if location.kind == "images"
        else None,
    )
    refuse_bad_rows(judged, on_bad=on_bad, source=source)
    kept_N = torch.tensor(judged.kept, dtype=torch.int64)
    facts = _unlabelled_facts(
        found.layout.image_shape, [found.sample_ids[row] or "" for row in judged.kept]
    )
    facts = replace(facts, issues=tuple(replace(issue, split=PART) for issue in judged.issues))
    if found.images_NCHW is not None:
        return InMemoryImages(facts, torch.from_numpy(found.images_NCHW)[kept_N])
    assert images is not None, "what is not in memory has been opened"
    batches = DecodedBatches(images, found.layout, resize=image_size is not None)
    return StreamedImages(facts, batches, kept_N, default_num_workers())


def _read(
    location: Location,
    image_column: str | None,
    image_size: tuple[int, int] | None,
    memory_limit_bytes: int,
    cache: Path | None,
) -> tuple[TableImages | None, Scan]:
    """Return the encoded pictures (None if all are in the scan) and the scan."""
    from understudy.data.tables import open_pictures

    folder: Path | None = None
    if cache is not None and location.kind != "hub":
        options = {"image_column": image_column, "image_size": image_size, "labels": False}
        folder = cache / cache_key(location, options)
        kept = load_scan(folder)
        if kept is not None and kept[0].images_NCHW is not None:
            found = kept[0]
            if fits(found.layout, len(found.sample_ids), memory_limit_bytes):
                return None, found
    images = open_pictures(
        location,
        image_column=image_column,
        memory_limit_bytes=memory_limit_bytes,
        cache=None if folder is None else folder / "arrow",
    )
    num_rows = images.rows.num_rows
    found = scan(
        images,
        num_rows,
        image_size=image_size,
        memory_limit_bytes=memory_limit_bytes,
        places=[f"row {row} of {location.root}" for row in range(num_rows)],
    )
    # Files that a table only names may change unseen; those of an image folder are in the key.
    if folder is not None and (location.kind == "images" or not images.names_other_files()):
        save_scan(folder, found, {})
    return images, found


def _unlabelled_facts(image_shape: tuple[int, int, int], sample_ids: list[str]) -> DataFacts:
    labels, splits = [NO_LABEL] * len(sample_ids), ["train"] * len(sample_ids)
    return DataFacts(
        image_shape,
        (),
        torch.tensor(labels, dtype=torch.int64),
        tuple(sample_ids),
        tuple(splits),
        data_fingerprint(
            image_shape, (), labels=labels, sample_ids=sample_ids, given_splits=splits
        ),
    )


@dataclass(frozen=True, eq=False)
class JoinedImages(ImageSource):
    """Labelled pictures, and after them pictures without labels.

    Attributes:
        labelled: the first samples.
        unlabelled: where the others are.
        rows_N: the number in ``unlabelled`` of each sample after the labelled ones, int64.
    """

    labelled: ImageSource
    unlabelled: ImageSource
    rows_N: Tensor

    def images(self, indices_N: Tensor) -> Tensor:
        """Return uint8 images_NCHW of these samples."""
        first_N, own_N, other_N = self._parts(indices_N)
        return _merged(first_N, self.labelled.images(own_N), self.unlabelled.images(other_N))

    def iter_images(self, index_batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield ``images`` of each batch of indices, in order; both parts read ahead."""
        parts = itertools.tee(map(self._parts, index_batches), 3)
        both = zip(
            (first_N for first_N, _, _ in parts[0]),
            self.labelled.iter_images(own_N for _, own_N, _ in parts[1]),
            self.unlabelled.iter_images(other_N for _, _, other_N in parts[2]),
            strict=True,
        )
        return itertools.starmap(_merged, both)

    def _parts(self, indices_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which samples are labelled, their numbers, and the others' in their source."""
        first_N = indices_N < self.labelled.num_samples
        other_N = self.rows_N[indices_N[~first_N] - self.labelled.num_samples]
        return first_N, indices_N[first_N], other_N


def _merged(first_N: Tensor, own_NCHW: Tensor, other_NCHW: Tensor) -> Tensor:
    images_NCHW = own_NCHW.new_empty((len(first_N), *own_NCHW.shape[1:]))
    images_NCHW[first_N] = own_NCHW
    images_NCHW[~first_N] = other_NCHW
    return images_NCHW


def join_unlabelled(labelled: ImageSource, unlabelled: ImageSource) -> JoinedImages:
    """Return both sources as one, the labelled samples first and under their own numbers.

    A picture that the labelled source holds as well, in whichever split, is left out of the
    unlabelled ones: a test picture must not be trained on, with or without its label.

    Raises:
        DataError: the shapes differ, or no picture is left.
    """
    if labelled.image_shape != unlabelled.image_shape:
        raise DataError(
            problem(
                f"the unlabelled images are {list(unlabelled.image_shape)} (channels, height, "
                f"width) and the labelled ones {list(labelled.image_shape)}",
                expected="one shape",
                mend="Set data.image_size to have sizes changed; gray and colour do not mix.",
            )
        )
    known = set(labelled.sample_ids)
    rows = [row for row, sample in enumerate(unlabelled.sample_ids) if sample not in known]
    num_known = unlabelled.num_samples - len(rows)
    if not rows:
        raise DataError(
            problem(
                f"the labelled data holds all {num_known} unlabelled images already",
                expected="other images",
                mend="Give other images in data.unlabelled, or hide labels with "
                "data.labelled_fraction.",
            )
        )
    if num_known:
        log.warning("%d unlabelled images are in the labelled data too: left out", num_known)
    sample_ids = [*labelled.sample_ids, *(unlabelled.sample_ids[row] for row in rows)]
    given_splits = [*labelled.given_splits, *["train"] * len(rows)]
    labels_N = torch.cat([labelled.labels_N, torch.full((len(rows),), NO_LABEL)])
    facts = replace(
        labelled.facts,
        labels_N=labels_N,
        sample_ids=tuple(sample_ids),
        given_splits=tuple(given_splits),
        fingerprint=data_fingerprint(
            labelled.image_shape,
            labelled.class_names,
            labels=labels_N.tolist(),
            sample_ids=sample_ids,
            given_splits=given_splits,
        ),
        metadata={
            name: [*values, *[None] * len(rows)] for name, values in labelled.metadata.items()
        },
        issues=(*labelled.issues, *unlabelled.issues),
    )
    return JoinedImages(facts, labelled, unlabelled, torch.tensor(rows, dtype=torch.int64))


def hide_labels(source: ImageSource, hidden_N: Tensor) -> ImageSource:
    """Return the source with the label -1 where ``hidden_N`` (bool) says so."""
    labels_N = torch.where(hidden_N, NO_LABEL, source.labels_N)
    fingerprint = data_fingerprint(
        source.image_shape,
        source.class_names,
        labels=labels_N.tolist(),
        sample_ids=source.sample_ids,
        given_splits=source.given_splits,
    )
    return replace(source, facts=replace(source.facts, labels_N=labels_N, fingerprint=fingerprint))


def hidden_labels(source: ImageSource, train_N: Tensor, *, fraction: float, seed: int) -> Tensor:
    """Return hidden_N (bool) that leaves ``fraction`` of each class's training labels visible.

    At least one label of each class stays. A hash of the picture and the seed decides.
    """
    hidden_N = torch.zeros(source.num_samples, dtype=torch.bool)
    for label in range(len(source.class_names)):
        members = train_N[source.labels_N[train_N] == label].tolist()
        members.sort(key=lambda index: _rank(source.sample_ids[index], seed))
        # Less a millionth of a millionth: 0.07 of 100 is a little over 7 in floating point.
        num_visible = max(1, math.ceil(fraction * len(members) * (1 - 1e-12)))
        hidden_N[members[num_visible:]] = True
    return hidden_N


def _rank(sample_id: str, seed: int) -> bytes:
    return hashlib.sha256(f"label/{seed}/{sample_id}".encode()).digest()
