"""The C project around a generated network: a small API, a self-test, programs and a Makefile.

``student.c``, ``student.h``, ``student_network.c`` and ``student_network.h`` are the student; the
other files test and measure it.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from understudy.artifacts import write_text
from understudy.export.c_network import CNetwork
from understudy.export.c_text import c_string
from understudy.export.onnx_run import open_session, run_images

NUM_TEST_IMAGES = 4
RELATIVE_TOLERANCE = {"float32": 1e-5, "int8": 0.02}
STUDENT_FILES = ("student.c", "student.h", "student_network.c", "student_network.h")
_COPIED = (
    "student.c",
    "student_network.h",
    "main.c",
    "classify.c",
    "footprint.c",
    "measure.c",
    "board.c",
    "board.h",
    "board.ld",
    "startup.c",
    "Makefile",
)
_MADE = ("student.h", "student_network.c", "test_vector.h")


@dataclass(frozen=True)
class ReferenceVector:
    """Images with the logits that ONNX Runtime returns for them.

    Attributes:
        images_NCHW: uint8.
        tolerance: largest |difference| of a logit that passes the self-test.
    """

    images_NCHW: np.ndarray
    logits_NK: np.ndarray
    tolerance: float


def write_project(
    folder: Path,
    network: CNetwork,
    vector: ReferenceVector,
    *,
    class_names: Sequence[str],
    precision: str,
    metadata: Mapping[str, str],
) -> tuple[str, ...]:
    """Write all files of the project atomically and return their names, ``student.c`` first."""
    channels, height, width = vector.images_NCHW.shape[1:]
    values = {
        "channels": channels,
        "height": height,
        "width": width,
        "num_pixels": channels * height * width,
        "num_classes": len(class_names),
        "averages_mirror": int(network.averages_mirror),
        "precision": c_string(precision),
        "recipe": c_string(metadata.get("recipe_hash", "")),
        "arena_bytes": network.arena_bytes,
        "weight_bytes": network.weight_bytes,
        "class_names": ", \\\n".join(f"    {c_string(name)}" for name in class_names),
    }
    texts = {name: _template(name) for name in _COPIED}
    texts["student.h"] = string.Template(_template("student.h.in")).substitute(values)
    texts["student_network.c"] = network.code
    texts["test_vector.h"] = vector_header(vector)
    for name, text in texts.items():
        write_text(folder / name, text)
    others = sorted({*_COPIED, *_MADE} - {*STUDENT_FILES})
    return (*STUDENT_FILES, *others)


def _template(name: str) -> str:
    return (resources.files("understudy.export") / "templates" / "c" / name).read_text("utf-8")


def make_vector(
    path: Path,
    image_shape: tuple[int, int, int],
    images_NCHW: Tensor | None,
    *,
    precision: str,
) -> ReferenceVector:
    """Run a few images through the ONNX file, one at a time as the C code does.

    Args:
        images_NCHW: uint8 images, of which the first are taken; without any, noise is.
    """
    if images_NCHW is None or len(images_NCHW) == 0:
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_TEST_IMAGES, *image_shape)
        images_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    images_NCHW = images_NCHW[:NUM_TEST_IMAGES].cpu()
    session = open_session(path, num_threads=1)
    logits_NK = torch.cat(
        [run_images(session, image) for image in torch.split(images_NCHW, 1)]
    ).numpy()
    tolerance = RELATIVE_TOLERANCE[precision] * max(1.0, float(np.abs(logits_NK).max()))
    if precision == "int8":
        # The order of a sum can tip a value over the border between two steps.
        tolerance = max(tolerance, 1.5 * _logit_step(path))
    return ReferenceVector(images_NCHW.numpy(), logits_NK, tolerance)


def _logit_step(path: Path) -> float:
    """Return the quantisation step of the logits; 0 where they are not quantised."""
    graph = onnx.load(path).graph
    last = graph.node[-1]
    if last.op_type != "DequantizeLinear":
        return 0.0
    scales = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == last.input[1]]
    return float(scales[0].max()) if scales else 0.0


def vector_header(vector: ReferenceVector) -> str:
    """Return ``test_vector.h``: images as bytes, logits as exact hexadecimal floats."""
    num_images = len(vector.images_NCHW)
    images = [
        _braces([str(value) for value in image])
        for image in vector.images_NCHW.reshape(num_images, -1)
    ]
    logits = [
        _braces([f"{float(value).hex()}f" for value in logits_K]) for logits_K in vector.logits_NK
    ]
    return "\n".join(
        [
            "/* Images, and the logits that ONNX Runtime returns for them. */",
            "#ifndef TEST_VECTOR_H",
            "#define TEST_VECTOR_H",
            "",
            "#include <stdint.h>",
            "",
            '#include "student.h"',
            "",
            f"#define TEST_NUM_IMAGES {num_images}",
            "/* Largest difference of a logit that passes. */",
            f"#define TEST_TOLERANCE {np.float32(vector.tolerance).item()!r}f",
            "",
            "static const uint8_t test_images[TEST_NUM_IMAGES][STUDENT_NUM_PIXELS] = {",
            ",\n".join(images),
            "};",
            "",
            "static const float test_logits[TEST_NUM_IMAGES][STUDENT_NUM_CLASSES] = {",
            ",\n".join(logits),
            "};",
            "",
            "#endif",
            "",
        ]
    )


def _braces(values: Sequence[str], per_line: int = 24) -> str:
    lines = [", ".join(values[i : i + per_line]) for i in range(0, len(values), per_line)]
    return "{" + ",\n ".join(lines) + "}"
