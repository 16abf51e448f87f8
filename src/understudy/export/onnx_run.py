"""Runs an ONNX file in ONNX Runtime, on images as the data holds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from understudy.errors import InputError, problem
from understudy.progress import Progress, silent
from understudy.runtime import num_usable_cores

if TYPE_CHECKING:
    from understudy.data.sources import ImageSource


def open_session(path: Path, *, num_threads: int | None = None) -> Any:
    """Return an ``onnxruntime.InferenceSession`` on the CPU with this many threads (None: all).

    Raises:
        InputError: ONNX Runtime cannot load the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or num_usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # This process has other work: pool threads that spin between runs would take its cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )
    # ONNX Runtime's exceptions have no common base but Exception.
    except Exception as error:
        raise InputError(
            problem(
                f"ONNX Runtime cannot load {path} ({error})",
                expected="an intact ONNX file",
                mend="Export the model again with `understudy export`.",
            )
        ) from error


def run_images(session: Any, images_NCHW: Tensor) -> Tensor:
    """Return logits [n, K] of a session for uint8 images (scaled to [0, 1]) or float images."""
    pixels_NCHW = images_NCHW.cpu().numpy()
    if pixels_NCHW.dtype == np.uint8:
        pixels_NCHW = pixels_NCHW.astype(np.float32) / np.float32(255)
    (logits_NK,) = session.run(
        [session.get_outputs()[0].name], {session.get_inputs()[0].name: pixels_NCHW}
    )
    return torch.from_numpy(logits_NK)


def onnx_logits(
    path: Path,
    source: ImageSource,
    indices: Tensor,
    *,
    batch_size: int = 500,
    num_threads: int | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Return float32 logits [n, K] of the file for the images at ``indices``, in order.

    This is what the file itself answers, for the same evaluator that the trained model went
    through.
    """
    session = open_session(path, num_threads=num_threads)
    logits: list[Tensor] = []
    num_done = 0
    for images_NCHW in source.iter_images(torch.split(indices, batch_size)):
        logits.append(run_images(session, images_NCHW).float())
        num_done += len(images_NCHW)
        progress(num_done, len(indices))
    return torch.cat(logits)
