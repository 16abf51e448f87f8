"""Pictures with labels: in memory as one uint8 tensor, or decoded from disk as they are needed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from understudy.artifacts import canonical_json
from understudy.data.decode import (
    BrokenImageError,
    Encoded,
    Layout,
    decode_into,
    quiet_decoding,
    sample_id,
)
from understudy.errors import DataError, problem
from understudy.runtime import num_usable_cores

GIVEN_SPLITS = ("train", "validation", "test")
FINGERPRINT_VERSION = 1
MAX_WORKERS = 4
NO_LABEL = -1


@dataclass(frozen=True)
class DataIssue:
    """Something wrong with one row, or (row -1) with a whole split.

    Attributes:
        kind: "broken_image", "missing_label", "label_out_of_range", "duplicate_across_splits" or
            "empty_class".
        row: number of the row in its split as the source gives it, from 0.
        split: "train", "validation" or "test" as the source gives it.
        message: what is wrong, without row and split.
    """

    kind: str
    row: int
    split: str
    message: str

    def __str__(self) -> str:
        place = self.split if self.row < 0 else f"row {self.row} of {self.split}"
        return f"{place}: {self.message}"


@dataclass(frozen=True, eq=False)
class DataFacts:
    """What is known of N samples besides their pixels.

    Attributes:
        image_shape: (C, H, W) of all pictures; C is 1 (grey) or 3 (RGB).
        class_names: one name for each of the K classes.
        labels_N: int64, 0 to K - 1; -1 for pictures without a label, which are training rows.
        sample_ids: hex hash of each picture's shape and decoded pixels.
        given_splits: "train", "validation" or "test" for each sample.
        fingerprint: hex hash of pixels, labels, class names, given splits and the samples' order;
            equal for equal data, however it is stored. (Order counts because views and stored
            teacher outputs belong to a sample's number.)
        metadata: other scalar columns of the source, N values each.
        issues: what was wrong with rows that were left out.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    labels_N: Tensor
    sample_ids: tuple[str, ...]
    given_splits: tuple[str, ...]
    fingerprint: str
    metadata: Mapping[str, list[Any]] = field(default_factory=dict)
    issues: tuple[DataIssue, ...] = ()


@dataclass(frozen=True, eq=False)
class ImageSource(ABC):
    """N pictures of one shape, with labels, numbered train, validation, test."""

    facts: DataFacts

    @abstractmethod
    def images(self, indices_N: Tensor) -> Tensor:
        """Return uint8 images_NCHW of these samples, in any order, repeated ones allowed."""

    @abstractmethod
    def iter_images(self, index_batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield ``images`` of each batch of indices, in order."""

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.facts.sample_ids)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.facts.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name for each of the K classes."""
        return self.facts.class_names

    @property
    def labels_N(self) -> Tensor:  # noqa: N802
        """Labels, int64, 0 to K - 1; -1 where there is none."""
        return self.facts.labels_N

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Hex hash of each picture."""
        return self.facts.sample_ids

    @property
    def given_splits(self) -> tuple[str, ...]:
        """Split of each sample as the source gives it."""
        return self.facts.given_splits

    @property
    def metadata(self) -> Mapping[str, list[Any]]:
        """Other scalar columns, N values each."""
        return self.facts.metadata

    @property
    def fingerprint(self) -> str:
        """Hex hash of the data, however it is stored."""
        return self.facts.fingerprint

    @property
    def issues(self) -> tuple[DataIssue, ...]:
        """What was wrong with rows that were left out."""
        return self.facts.issues


@dataclass(frozen=True, eq=False)
class InMemoryImages(ImageSource):
    """All pictures as one uint8 tensor: small networks are fed faster than files are decoded."""

    pixels_NCHW: Tensor

    def images(self, indices_N: Tensor) -> Tensor:
        """Return uint8 images_NCHW of these samples."""
        return self.pixels_NCHW.index_select(0, indices_N)

    def iter_images(self, index_batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield ``images`` of each batch of indices, in order."""
        return map(self.images, index_batches)


class EncodedImages(Protocol):
    """Pictures on disk; picklable, so that worker processes can read them."""

    def encoded(self, rows: Sequence[int]) -> list[Encoded]:
        """Return the encoded pictures of these rows."""
        ...


@dataclass(frozen=True, eq=False)
class DecodedBatches(Dataset[Tensor]):
    """For ``DataLoader`` and its workers: a batch of row numbers in, uint8 images_NCHW out."""

    encoded_images: EncodedImages
    layout: Layout
    resize: bool

    def __getitem__(self, rows_N: Tensor) -> Tensor:
        rows = rows_N.tolist()
        images_NCHW = np.empty((len(rows), *self.layout.image_shape), np.uint8)
        with quiet_decoding():
            encoded_images = self.encoded_images.encoded(rows)
            for pixels_CHW, row, encoded in zip(images_NCHW, rows, encoded_images, strict=True):
                try:
                    decode_into(pixels_CHW, encoded, resize=self.resize)
                except BrokenImageError as error:
                    raise DataError(
                        problem(
                            f"the image of stored row {row} could be read before, and now {error}",
                            expected="data that does not change during a run",
                            mend="Restore the data, or start again to have it checked anew.",
                        )
                    ) from None
        return torch.from_numpy(images_NCHW)


@dataclass(frozen=True, eq=False)
class StreamedImages(ImageSource):
    """Pictures that stay encoded on disk and are decoded when asked for.

    Attributes:
        batches: reads and decodes stored rows.
        rows_N: the stored row of each sample, int64.
        num_workers: processes that decode ahead in ``iter_images``; 0 decodes in this one.
    """

    batches: DecodedBatches
    rows_N: Tensor
    num_workers: int = 0

    def images(self, indices_N: Tensor) -> Tensor:
        """Return uint8 images_NCHW of these samples. Raises DataError if a file has changed."""
        return self.batches[self.rows_N[indices_N]]

    def iter_images(self, index_batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield ``images`` of each batch of indices, in order, decoded ahead by the workers."""
        row_batches = (self.rows_N[indices_N] for indices_N in index_batches)
        return iter(ordered_loader(self.batches, row_batches, self.num_workers))


def ordered_loader(dataset: Dataset[Any], items: Iterable[Any], num_workers: int) -> Iterable[Any]:
    """Return a DataLoader that yields ``dataset[item]`` for each item, in order."""
    return DataLoader(
        dataset,
        sampler=items,
        batch_size=None,
        num_workers=num_workers,
        # Without a generator of its own a loader draws from torch's, and training would depend on
        # whether the data is streamed.
        generator=torch.Generator(),
    )


def default_num_workers() -> int:
    """Return how many processes decode ahead: one a core, a few at most."""
    return min(MAX_WORKERS, num_usable_cores())


def data_fingerprint(
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    *,
    labels: Sequence[int],
    sample_ids: Sequence[str],
    given_splits: Sequence[str],
) -> str:
    """Return the hash (hex) of what the data is, whatever it is stored in."""
    head = [FINGERPRINT_VERSION, list(image_shape), list(class_names)]
    digest = hashlib.sha256(canonical_json(head).encode())
    for identity, label, split in zip(sample_ids, labels, given_splits, strict=True):
        digest.update(f"{identity} {label} {split}\n".encode())
    return digest.hexdigest()


def images_from_tensors(
    images_NCHW: Tensor,
    labels_N: Tensor,
    *,
    class_names: Sequence[str],
    given_splits: Sequence[str] | None = None,
    metadata: Mapping[str, list[Any]] | None = None,
) -> InMemoryImages:
    """Return a source of uint8 pictures that are in memory already; all training rows by default.

    Raises DataError for wrong types, shapes or labels.
    """
    splits = tuple(given_splits or ("train",) * len(images_NCHW))
    columns = {"labels": len(labels_N), "given_splits": len(splits)}
    columns |= {name: len(values) for name, values in (metadata or {}).items()}
    problems = _tensor_problems(images_NCHW, labels_N, len(class_names), columns)
    problems += [
        problem(f"a split is named '{name}'", expected=" or ".join(GIVEN_SPLITS), mend="Rename it.")
        for name in sorted(set(splits) - set(GIVEN_SPLITS))
    ]
    if problems:
        raise DataError(*problems)
    _, num_channels, height, width = images_NCHW.shape
    image_shape = (num_channels, height, width)
    sample_ids = tuple(sample_id(pixels_CHW) for pixels_CHW in images_NCHW.numpy())
    fingerprint = data_fingerprint(
        image_shape,
        class_names,
        labels=labels_N.tolist(),
        sample_ids=sample_ids,
        given_splits=splits,
    )
    facts = DataFacts(
        image_shape,
        tuple(class_names),
        labels_N.to(torch.int64),
        sample_ids,
        splits,
        fingerprint,
        dict(metadata or {}),
    )
    return InMemoryImages(facts, images_NCHW)


def _tensor_problems(
    images_NCHW: Tensor, labels_N: Tensor, num_classes: int, columns: Mapping[str, int]
) -> list[str]:
    problems = [
        problem(
            f"there are {len(images_NCHW)} images and {length} values of {name}",
            expected="one value an image",
            mend="Give columns of equal length.",
        )
        for name, length in columns.items()
        if length != len(images_NCHW)
    ]
    is_picture = images_NCHW.ndim == 4 and images_NCHW.shape[1] in (1, 3)
    if images_NCHW.dtype != torch.uint8 or not is_picture:
        problems.append(
            problem(
                f"the images are {images_NCHW.dtype} of shape {tuple(images_NCHW.shape)}",
                expected="torch.uint8 of shape [N, C, H, W] with 1 or 3 channels",
                mend="Convert them, for instance (255 * images).round().to(torch.uint8).",
            )
        )
    labels = labels_N.tolist()
    if labels and not 0 <= min(labels) <= max(labels) < num_classes:
        problems.append(
            problem(
                f"labels run from {min(labels)} to {max(labels)}",
                expected=f"0 to {num_classes - 1}, one number a class name",
                mend="Correct the labels or the class names.",
            )
        )
    return problems
