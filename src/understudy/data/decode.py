"""Encoded pictures to uint8 pixels of one layout, with Pillow.

A picture may come from anywhere, so nothing about it is trusted: its size is read from the header
and judged before a pixel is decoded, and whatever a decoder raises makes the picture "broken".
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]
# An encoded picture: its bytes, or the file that holds them; None where the row has no picture.
Encoded = bytes | Path | None

# 50 million pixels (7,000 x 7,000) are 150 MB once decoded: no training picture is that large, but
# a few hundred hostile bytes can be.
MAX_PIXELS = 50_000_000
GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})
SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
SIDEWAYS = frozenset({5, 6, 7, 8})
WITH_EXIF_HEADER = frozenset({"JPEG", "MPO", "WEBP"})
SAMPLE_ID_BYTES = 16
# What becomes of a picture of another size than a network's.
ResizeRule = Literal["shorter_side_center_crop", "stretch"]


class BrokenImageError(ValueError):
    """One picture cannot be decoded; the text says why."""


@dataclass(frozen=True)
class Layout:
    """What every decoded picture looks like: channels (1 grey, 3 RGB), height and width."""

    num_channels: int
    height: int
    width: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.num_channels, self.height, self.width)


@dataclass(frozen=True)
class Header:
    """What is known of a picture before decoding: size as it is shown, and whether it is grey."""

    height: int
    width: int
    is_grey: bool


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Silence Pillow's warnings about single pictures: what is wrong with one becomes an issue."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def read_header(encoded: Encoded) -> Header:
    """Return a picture's header without decoding it. Raises BrokenImageError."""
    with _opened(encoded) as image:
        width, height = image.size
        if exif_orientation(image) in SIDEWAYS:
            width, height = height, width
        return Header(height, width, image.mode in GREY_MODES)


def decode_into(pixels_CHW: Pixels, encoded: Encoded, *, resize: bool) -> None:
    """Decode a picture into an array whose shape says the layout. Raises BrokenImageError.

    Grey (C = 1) or RGB (C = 3); what is transparent is laid on black; with ``resize`` another size
    is brought to H x W (bilinear), without it another size is an error.
    """
    num_channels, height, width = pixels_CHW.shape
    with _opened(encoded) as image:
        shown = ImageOps.exif_transpose(image) if exif_orientation(image) > 1 else image
        converted = _in_mode(shown, "L" if num_channels == 1 else "RGB")
        if converted.size != (width, height):
            if not resize:
                raise BrokenImageError(
                    f"its size is {converted.height}x{converted.width} and not {height}x{width}"
                )
            converted = converted.resize((width, height), Image.Resampling.BILINEAR)
        pixels_HWC = np.frombuffer(converted.tobytes(), np.uint8)
        pixels_CHW[:] = pixels_HWC.reshape(height, width, num_channels).transpose(2, 0, 1)


def sample_id(pixels_CHW: Pixels) -> str:
    """Return the identity of a picture: a hash (hex) of its shape and decoded pixels."""
    digest = hashlib.blake2b(repr(pixels_CHW.shape).encode(), digest_size=SAMPLE_ID_BYTES)
    digest.update(np.ascontiguousarray(pixels_CHW).data)
    return digest.hexdigest()


@contextmanager
def _opened(encoded: Encoded) -> Iterator[Image.Image]:
    """Yield an image whose size is acceptable; every failure inside is a BrokenImageError."""
    if encoded is None:
        raise BrokenImageError("there is no image")
    try:
        # Not by its path: Pillow maps some TIFF files into memory then, and turns them wrongly.
        file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded.open("rb")
        with file, Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImageError(
                    f"{image.height}x{image.width} pixels are more than the {MAX_PIXELS:,} allowed"
                )
            yield image
    except BrokenImageError:
        raise
    except FileNotFoundError:
        raise BrokenImageError("the image file does not exist") from None
    except UnidentifiedImageError:
        raise BrokenImageError("it is not an image of a known format") from None
    # Decoders raise nearly everything (OSError, ValueError, SyntaxError, struct.error, ...) on
    # damaged bytes; whatever it is, this picture cannot be used and the others can.
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BrokenImageError(f"it cannot be decoded ({text})") from error


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1 to 8, 1 is upright) of a picture that is not decoded yet.

    What follows the pixels of a PNG, and its text in place of EXIF, does not count: a header must
    do to tell the size. Of a TIFF it is always 1, because Pillow turns it by itself.
    """
    if image.format != "TIFF" and (image.format in WITH_EXIF_HEADER or "exif" in image.info):
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(found) if found in range(2, 9) else 1
    return 1


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return the picture in mode "L" or "RGB", never losing a range or an alpha channel unseen."""
    if image.mode == mode and "transparency" not in image.info:
        image.load()
        return image
    if image.mode in SIXTEEN_BIT_MODES:
        image = _eight_bit(image)
    elif image.mode == "F":
        raise BrokenImageError("it has floating-point pixels, whose range is not known")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, rgba).convert("RGB")
    return image.convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return a 16-bit grey picture as "L", scaled 0..65535 to 0..255 (Pillow itself would clip)."""
    values_HW = np.asarray(image).astype(np.int64).clip(0, 65535)
    # In PNG one value may be transparent.
    values_HW[values_HW == image.info.get("transparency", -1)] = 0
    return Image.fromarray(((values_HW + 128) // 257).astype(np.uint8))
