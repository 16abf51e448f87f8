"""Picture files and arrays to what the network was trained on: uint8 [C, H, W] of its own size.

The decoder is the one that the training data went through, so that a picture means the same pixels
in service as in training. What was done to a picture is reported with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from understudy.data.decode import (
    GREY_MODES,
    MAX_PIXELS,
    SIXTEEN_BIT_MODES,
    BrokenImageError,
    decode_into,
    exif_orientation,
    quiet_decoding,
    read_header,
)
from understudy.errors import DataError, problem
from understudy.package.manifest import Preprocessing

Pixels = NDArray[np.uint8]
ColorOrder = Literal["RGB", "BGR", "GRAY"]
ArrayLayout = Literal["NCHW", "NHWC"]

MAX_FILE_BYTES = 256 << 20
# Pixels of their own. Others that Pillow knows draw with foreign programs (EPS) or hold no picture.
FORMATS = frozenset(
    "AVIF BMP DIB GIF ICO JPEG JPEG2000 MPO PNG PPM TGA TIFF WEBP".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Picture:
    """A picture as the network takes it.

    Attributes:
        original_size: (height, width) as the picture is shown.
        changes: what was done to it, in words, in order.
    """

    pixels_CHW: Pixels
    source: str
    original_size: tuple[int, int]
    changes: tuple[str, ...]


def load_pictures(paths: Sequence[Path], preprocessing: Preprocessing) -> list[Picture]:
    """Read picture files.

    Raises:
        DataError: with every picture that cannot be used, and why.
    """
    pictures: list[Picture] = []
    problems: list[str] = []
    for path in paths:
        try:
            pictures.append(load_picture(Path(path), preprocessing))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return pictures


def load_picture(path: Path, preprocessing: Preprocessing) -> Picture:
    """Read one picture file: see ``Preprocessing`` for what is done to it.

    Of several frames the first is taken.

    Raises:
        DataError: it is no picture, damaged, or larger than ``MAX_FILE_BYTES`` or ``MAX_PIXELS``
            (which the header says, before a pixel is decoded).
    """
    _check_file(path)
    try:
        with quiet_decoding():
            # Above twice this many pixels Pillow itself refuses; between the two decode does.
            changes = _look(path, preprocessing)
            header = read_header(path)
            num_channels = preprocessing.image_shape[0]
            full_CHW = np.empty((num_channels, header.height, header.width), np.uint8)
            decode_into(full_CHW, path, resize=False)
    except (BrokenImageError, MemoryError) as error:
        raise DataError(
            problem(
                f"{path} cannot be used: {str(error) or 'it needs more memory than there is'}",
                expected=f"an intact picture of at most {MAX_PIXELS:,} pixels",
                mend="Open it in a viewer and save it again as PNG or JPEG.",
            )
        ) from None
    pixels_CHW = fitted(full_CHW, preprocessing)
    size = (header.height, header.width)
    if pixels_CHW.shape[1:] != size:
        changes.append(_size_change(size, preprocessing))
    return Picture(pixels_CHW, str(path), size, tuple(changes))


def fitted(pixels_CHW: Pixels, preprocessing: Preprocessing) -> Pixels:
    """Return a picture brought to the network's size; one that has it is returned as it is."""
    num_channels, height, width = preprocessing.image_shape
    if pixels_CHW.shape == preprocessing.image_shape:
        return pixels_CHW
    pixels = pixels_CHW[0] if num_channels == 1 else np.ascontiguousarray(_last(pixels_CHW))
    image = Image.fromarray(pixels)
    if preprocessing.resize == "stretch":
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    else:
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    pixels_HWC = np.asarray(image).reshape(height, width, num_channels)
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))


def pictures_from_arrays(
    images: NDArray[Any],
    preprocessing: Preprocessing,
    *,
    order: ColorOrder,
    layout: ArrayLayout,
) -> list[Picture]:
    """Take pixels that are in memory already, of the network's own size.

    Args:
        images: uint8, [n, C, H, W] or [n, H, W, C] as ``layout`` says.
        order: of the channels. It has to be said, because nothing in the pixels tells RGB from
            BGR (as OpenCV reads): a wrong one costs accuracy without an error.

    Raises:
        DataError: type, shape, order or layout do not fit.
    """
    _check_words(preprocessing, order=order, layout=layout)
    num_channels, height, width = preprocessing.image_shape
    shape = (num_channels, height, width) if layout == "NCHW" else (height, width, num_channels)
    if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) == 0:
        text = ", ".join(map(str, ("n", *shape)))
        raise DataError(
            problem(
                f"the pictures are {images.dtype} of shape {images.shape}",
                expected=f"uint8 of shape ({text}), values 0 to 255, n at least 1",
                mend="Convert them, or give picture files, which are brought to size.",
            )
        )
    images_NCHW = images if layout == "NCHW" else images.transpose(0, 3, 1, 2)
    if order == "BGR":
        images_NCHW = images_NCHW[:, ::-1]
    changes = ("channels turned from BGR to RGB",) if order == "BGR" else ()
    return [
        Picture(np.ascontiguousarray(pixels_CHW), f"array[{row}]", (height, width), changes)
        for row, pixels_CHW in enumerate(images_NCHW)
    ]


def _check_words(preprocessing: Preprocessing, *, order: str, layout: str) -> None:
    orders = ("GRAY",) if preprocessing.color_order == "GRAY" else ("RGB", "BGR")
    problems = [
        problem(f"{name} is {given!r}", expected=" or ".join(allowed), mend=f"Give {name}.")
        for name, given, allowed in (
            ("order", order, orders),
            ("layout", layout, ("NCHW", "NHWC")),
        )
        if given not in allowed
    ]
    if problems:
        raise DataError(*problems)


def _last(pixels_CHW: Pixels) -> Pixels:
    return pixels_CHW.transpose(1, 2, 0)


def _check_file(path: Path) -> None:
    given = None
    try:
        if not path.exists():
            given = f"there is no file {path}"
        elif not path.is_file():
            given = f"{path} is not a file"
        elif path.stat().st_size > MAX_FILE_BYTES:
            given = f"{path} has {path.stat().st_size:,} bytes"
    # A name of too many characters, or a folder that may not be entered.
    except OSError as error:
        given = f"{path} cannot be looked at ({error.strerror})"
    if given:
        raise DataError(
            problem(
                given,
                expected=f"a picture file of at most {MAX_FILE_BYTES >> 20} MB",
                mend="Check the path.",
            )
        )


def _look(path: Path, preprocessing: Preprocessing) -> list[str]:
    """Return what decoding is going to change, from the header alone."""
    try:
        with Image.open(path) as image:
            if image.format not in FORMATS:
                raise BrokenImageError(f"its format {image.format} is not read here")
            changes = []
            if getattr(image, "is_animated", False):
                changes.append("first frame taken")
            orientation = exif_orientation(image)
            if orientation > 1:
                changes.append(f"turned upright from EXIF orientation {orientation}")
            if image.mode in SIXTEEN_BIT_MODES:
                changes.append("16-bit values scaled to 8 bits")
            if image.has_transparency_data:
                changes.append("transparency laid on black")
            is_grey = image.mode in GREY_MODES
            if is_grey != (preprocessing.color_order == "GRAY") or image.mode in ("CMYK", "YCbCr"):
                changes.append(f"{image.mode} converted to {preprocessing.color_order}")
            return changes
    except BrokenImageError:
        raise
    except Exception as error:
        # Decoders raise nearly everything on damaged bytes.
        raise BrokenImageError(_reason(error)) from None


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.replace("cannot identify image file", "no known picture format in")


def _size_change(size: tuple[int, int], preprocessing: Preprocessing) -> str:
    _, height, width = preprocessing.image_shape
    how = "stretched" if preprocessing.resize == "stretch" else "shorter side, centre crop"
    return f"resized from {size[0]}x{size[1]} to {height}x{width} ({how})"
