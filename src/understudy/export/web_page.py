"""The page that classifies a picture on the reader's own device: its files, and its rule in Python.

The page is static: what is particular to a network stands in ``model.json``, which the page reads
and shows as text, so that no class name is ever part of its HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from understudy.artifacts import content_hash, file_hash
from understudy.data.decode import (
    MAX_PIXELS,
    BrokenImageError,
    Pixels,
    ResizeRule,
    decode_into,
    quiet_decoding,
    read_header,
)
from understudy.errors import DataError, InputError, problem
from understudy.export.target import Precision

ASSETS = Path(__file__).parent / "web_assets"
INDEX_NAME = "index.html"
# The page is last: a folder without it is one that was not finished.
PAGE_FILES = (
    "app.js",
    "icon.svg",
    "licenses.txt",
    "model.js",
    "picture.js",
    "sha256.js",
    "start.js",
    "style.css",
    INDEX_NAME,
)
DESCRIPTION_NAME = "model.json"
DESCRIPTION_FORMAT = 3
MAX_FILE_BYTES = 64 * 2**20

DEFAULT_RESIZE: ResizeRule = "shorter_side_center_crop"
# What picture.js does with a picture of any size; ``picture_pixels`` is the same in Python.
PREPROCESSING = {
    "orientation": "exif",
    "color_profile": "ignored",
    "transparent_on": "black",
    "grey": "ITU-R 601-2",
    "resample": "Pillow's BILINEAR, all columns first, then all rows",
    "scale": "pixel / 255",
}


def describe_model(
    model_path: Path,
    *,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    precision: Precision,
    tensor_names: tuple[str, str],
    resize: str,
    runtime: dict[str, Any],
) -> dict[str, Any]:
    """Return what ``model.json`` holds; ``content_sha256`` is the hash of all other fields.

    Args:
        model_path: the ONNX file, which lies beside the page.
        tensor_names: of the file's input and output.
        resize: one of ``ResizeRule``, that of the training data.
        runtime: "package", "version", "script", "wasm" (file names) of the JavaScript runtime.

    Raises:
        InputError: no such ``resize``.
    """
    if resize not in get_args(ResizeRule):
        raise InputError(
            problem(
                f"the page is asked for pictures brought to size by '{resize}'",
                expected=f"one of {', '.join(get_args(ResizeRule))}",
                mend="Give the rule of the training data.",
            )
        )
    input_name, output_name = tensor_names
    description = {
        "format": DESCRIPTION_FORMAT,
        "class_names": list(class_names),
        "image_shape": list(image_shape),
        "preprocessing": {**PREPROCESSING, "resize": resize},
        "limits": {"max_pixels": MAX_PIXELS, "max_file_bytes": MAX_FILE_BYTES},
        "model": {
            "file": model_path.name,
            "sha256": file_hash(model_path),
            "size_bytes": model_path.stat().st_size,
            "precision": precision,
            "input": input_name,
            "output": output_name,
        },
        "runtime": runtime,
    }
    return {**description, "content_sha256": content_hash(description)}


def picture_pixels(
    encoded: bytes | Path,
    image_shape: tuple[int, int, int],
    *,
    resize: ResizeRule = DEFAULT_RESIZE,
) -> Pixels:
    """Return the uint8 pixels CHW that the page would give the network for this picture.

    Decoded as training pictures are (upright, transparent on black, colours as stored). A picture
    of the network's size is unchanged; of another, all of it ("stretch") or the largest centred
    part with the network's proportions is brought to its size, bilinear over all pixels covered.

    Args:
        image_shape: (C, H, W); C is 1 (grey) or 3 (RGB).
        resize: that of the training data, so that a picture means the same pixels here as there
            (one level of 255 apart at most: Pillow does rows or columns first as it likes).

    Raises:
        DataError: the picture is broken, of no known format, or above ``data.decode.MAX_PIXELS``.
    """
    num_channels, height, width = image_shape
    try:
        with quiet_decoding():
            header = read_header(encoded)
            decoded_CHW = np.empty((num_channels, header.height, header.width), np.uint8)
            decode_into(decoded_CHW, encoded, resize=False)
    except BrokenImageError as error:
        name = f"the picture {encoded}" if isinstance(encoded, Path) else "the picture"
        raise DataError(
            problem(
                f"{name} cannot be used: {error}",
                expected=f"an intact picture of at most {MAX_PIXELS:,} pixels",
                mend="Choose another one.",
            )
        ) from error
    decoded_HWC = decoded_CHW.transpose(1, 2, 0)
    image = Image.fromarray(decoded_HWC[:, :, 0] if num_channels == 1 else decoded_HWC)
    fitted = _fit(image, width, height, resize)
    pixels_HWC = np.asarray(fitted, np.uint8).reshape(height, width, num_channels)
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))


def _fit(image: Image.Image, width: int, height: int, resize: ResizeRule) -> Image.Image:
    """Bring the picture, or its largest centred part with these proportions, to this size."""
    ratio = image.width / image.height if resize == "stretch" else width / height
    crop_width, crop_height = float(image.width), float(image.height)
    if image.width / image.height > ratio:
        crop_width = ratio * image.height
    elif image.width / image.height < ratio:
        crop_height = image.width / ratio
    left, top = (image.width - crop_width) * 0.5, (image.height - crop_height) * 0.5
    # Two calls: which of the two directions one call does first, and so its rounding, depends on
    # the version of Pillow and the sizes.
    columns = image.resize(
        (width, image.height),
        Image.Resampling.BILINEAR,
        box=(left, 0, left + crop_width, image.height),
    )
    return columns.resize(
        (width, height), Image.Resampling.BILINEAR, box=(0, top, width, top + crop_height)
    )
