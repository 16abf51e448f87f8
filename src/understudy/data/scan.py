"""One look at every picture: its header, then its pixels, identity and whether it can be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from understudy.data.decode import (
    BrokenImageError,
    Header,
    Layout,
    Pixels,
    decode_into,
    quiet_decoding,
    read_header,
    sample_id,
)
from understudy.data.images import EncodedImages, default_num_workers, ordered_loader
from understudy.errors import DataError, problem
from understudy.progress import shown_progress

ROWS_PER_STEP = 500
MAX_SIZES_NAMED = 5
MIN_ROWS_FOR_WORKERS = 5000


@dataclass(frozen=True)
class Scan:
    """What the pictures of all rows are.

    Attributes:
        layout: the one they are decoded to.
        sample_ids: identity of each row's picture, None where it is broken.
        broken: row to why its picture cannot be decoded.
        images_NCHW: all pixels (zeros where broken), or None where they do not fit in memory.
    """

    layout: Layout
    sample_ids: list[str | None]
    broken: dict[int, str]
    images_NCHW: Pixels | None = field(repr=False)


def scan(
    images: EncodedImages,
    num_rows: int,
    *,
    image_size: tuple[int, int] | None,
    memory_limit_bytes: int,
    places: Sequence[str],
) -> Scan:
    """Read every picture once; ``places`` says for messages where each row stands.

    Raises DataError if sizes differ and no ``image_size`` (height, width) is given.
    """
    with quiet_decoding():
        layout, broken = _find_layout(images, num_rows, image_size, places)
    in_memory = fits(layout, num_rows, memory_limit_bytes)
    reader = _Reader(images, layout, dict(broken), image_size is not None, in_memory)
    images_NCHW = np.zeros((num_rows, *layout.image_shape), np.uint8) if in_memory else None
    sample_ids: list[str | None] = []
    # Starting worker processes costs more than decoding a few thousand small pictures.
    num_workers = default_num_workers() if num_rows >= MIN_ROWS_FOR_WORKERS else 0
    with shown_progress("decode images") as progress:
        for read in ordered_loader(reader, _steps(num_rows), num_workers):
            if images_NCHW is not None:
                start = len(sample_ids)
                images_NCHW[start : start + len(read["sample_ids"])] = read["pixels_NCHW"].numpy()
            sample_ids += read["sample_ids"]
            broken |= read["broken"]
            progress(len(sample_ids), num_rows)
    return Scan(layout, sample_ids, broken, images_NCHW)


def fits(layout: Layout, num_rows: int, memory_limit_bytes: int) -> bool:
    """Whether the decoded pictures fit in the limit."""
    num_channels, height, width = layout.image_shape
    return num_rows * num_channels * height * width <= memory_limit_bytes


def _steps(num_rows: int) -> Iterator[range]:
    for start in range(0, num_rows, ROWS_PER_STEP):
        yield range(start, min(start + ROWS_PER_STEP, num_rows))


def _find_layout(
    images: EncodedImages,
    num_rows: int,
    image_size: tuple[int, int] | None,
    places: Sequence[str],
) -> tuple[Layout, dict[int, str]]:
    """Return the common layout and the rows whose header is unreadable, from the headers alone."""
    kinds: Counter[Header] = Counter()
    examples: dict[tuple[int, int], str] = {}
    broken: dict[int, str] = {}
    for rows in _steps(num_rows):
        for row, encoded in zip(rows, images.encoded(rows), strict=True):
            try:
                header = read_header(encoded)
            except BrokenImageError as error:
                broken[row] = str(error)
                continue
            kinds[header] += 1
            examples.setdefault((header.height, header.width), places[row])
    if not kinds:
        reason = f", for instance: {places[0]}, {broken[0]}" if broken else ""
        raise DataError(
            problem(
                f"none of the {num_rows} rows holds an image that can be read{reason}",
                expected="encoded images such as PNG or JPEG",
                mend="Name the image column with data.image_column, or check the files.",
            )
        )
    num_channels = 1 if all(header.is_grey for header in kinds) else 3
    if image_size is not None:
        return Layout(num_channels, *image_size), broken
    if len(examples) > 1:
        raise DataError(_mixed_sizes(kinds, examples))
    [(height, width)] = examples
    return Layout(num_channels, height, width), broken


def _mixed_sizes(kinds: Counter[Header], examples: dict[tuple[int, int], str]) -> str:
    sizes: Counter[tuple[int, int]] = Counter()
    for header, count in kinds.items():
        sizes[header.height, header.width] += count
    named = [
        f"{height}x{width} ({count} images, for instance {examples[height, width]})"
        for (height, width), count in sizes.most_common(MAX_SIZES_NAMED)
    ]
    more = f" and {len(sizes) - len(named)} more" if len(sizes) > len(named) else ""
    [((height, width), _)] = sizes.most_common(1)
    return problem(
        f"the images have {len(sizes)} sizes (height x width): {', '.join(named)}{more}",
        expected="one size",
        mend=f"Set data.image_size, for instance [{height}, {width}], to have them resized.",
    )


@dataclass(frozen=True, eq=False)
class _Reader(Dataset[dict[str, Any]]):
    """For ``DataLoader`` and its workers: a range of rows in, what they hold out."""

    images: EncodedImages
    layout: Layout
    broken: dict[int, str]
    resize: bool
    keep_pixels: bool

    def __getitem__(self, rows: range) -> dict[str, Any]:
        """Return identities (None where broken), newly broken rows, and pixels if they are kept."""
        pixels_NCHW = np.zeros((len(rows), *self.layout.image_shape), np.uint8)
        sample_ids: list[str | None] = []
        broken: dict[int, str] = {}
        with quiet_decoding():
            encoded_rows = self.images.encoded(rows)
            for pixels_CHW, row, encoded in zip(pixels_NCHW, rows, encoded_rows, strict=True):
                identity = None
                if row not in self.broken:
                    try:
                        decode_into(pixels_CHW, encoded, resize=self.resize)
                        identity = sample_id(pixels_CHW)
                    except BrokenImageError as error:
                        broken[row] = str(error)
                sample_ids.append(identity)
        kept = torch.from_numpy(pixels_NCHW) if self.keep_pixels else None
        return {"sample_ids": sample_ids, "broken": broken, "pixels_NCHW": kept}
