"""An .onnx file as a black-box network: pictures in, logits out, no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import external_data_helper
from torch import Tensor, nn

from understudy.errors import ModelError, problem

ImageShape = tuple[int, int, int]

_INPUT_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


class OnnxModel(nn.Module):
    """A classifier in an ONNX file, run by ONNX Runtime.

    The input may have any name, be NCHW or NHWC, floating or uint8, and have a fixed batch size
    (then the last batch is padded and the padding's logits are dropped).

    Args:
        path: the file; weights stored beside it are found by their relative names.
        num_classes: K that its output must have.
        image_shape: (C, H, W) of the pictures it will get.

    Raises:
        ModelError: not readable, or not a classifier of these pictures into K classes.
    """

    def __init__(self, path: Path, *, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        self.path = path
        self.num_classes = num_classes
        self.image_shape = image_shape
        self.session = _open_session(path)
        image = _only_input(self.session, path)
        self.input_name: str = image.name
        self.input_type = _INPUT_TYPES[image.type]
        self.layout = _layout(image.shape, image_shape, path)
        self.batch_size: int | None = image.shape[0] if isinstance(image.shape[0], int) else None
        self.output_name = _logits_output(self.session, num_classes, path)
        self._try_once()

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return float32 logits_NK.

        Args:
            images_NCHW: as the file expects them (see ``NormalizedModel``). A uint8 file takes
                uint8, or float in [0, 1], which is what mean 0 and standard deviation 1 give.
        """
        images = images_NCHW.detach().cpu()
        if self.input_type is np.uint8 and images.is_floating_point():
            images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        if self.layout == "NHWC":
            images = images.permute(0, 2, 3, 1)
        pixels = np.ascontiguousarray(
            images.float().numpy() if images.is_floating_point() else images.numpy()
        ).astype(self.input_type, copy=False)
        size = self.batch_size or max(1, len(pixels))
        logits = [self._run(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        if not logits:
            return torch.zeros(0, self.num_classes, device=images_NCHW.device)
        return torch.from_numpy(np.concatenate(logits)).to(images_NCHW.device)

    def _run(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        num_images = len(pixels)
        if self.batch_size is not None and num_images < self.batch_size:
            pixels = np.concatenate(
                [pixels, np.repeat(pixels[-1:], self.batch_size - num_images, axis=0)]
            )
        (logits,) = self.session.run([self.output_name], {self.input_name: pixels})
        return np.asarray(logits, dtype=np.float32)[:num_images]

    def _try_once(self) -> None:
        num_images = self.batch_size or 2
        expected = (num_images, self.num_classes)
        try:
            found = tuple(self(torch.zeros(num_images, *self.image_shape)).shape)
        except Exception as error:  # the runtime raises many kinds
            raise ModelError(
                problem(
                    f"{self.path} on pictures of shape {self.image_shape} failed: "
                    f"{str(error).splitlines()[0]}",
                    expected=f"logits of shape {expected}",
                    mend="Choose another file or data.image_size.",
                )
            ) from error
        if found != expected:
            raise ModelError(
                problem(
                    f"{self.path} returned {found} for {num_images} pictures",
                    expected=f"logits of shape {expected}",
                    mend="Choose a file that classifies into the data's classes.",
                )
            )


def _open_session(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(
            problem(f"there is no file {path}", expected="an .onnx file", mend="Correct the path.")
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    known = onnxruntime.get_available_providers()
    providers = [
        name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in known
    ]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the runtime raises many kinds
        raise ModelError(
            problem(
                f"{path} ({path.stat().st_size} bytes) cannot be opened by ONNX Runtime "
                f"{onnxruntime.__version__}: {str(error).splitlines()[0]}",
                expected="a complete ONNX model (with its .data file, if it has one)",
                mend="Export or copy it again.",
            )
        ) from error


def _only_input(session: Any, path: Path) -> Any:
    inputs = session.get_inputs()
    found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _INPUT_TYPES:
        raise ModelError(
            problem(
                f"{path} has the inputs: {found or 'none'}",
                expected="one input of pictures, four dimensions, floating or uint8",
                mend="Export the network with pictures as its only input.",
            )
        )
    return inputs[0]


def _layout(shape: list[Any], image_shape: ImageShape, path: Path) -> str:
    channels, height, width = image_shape
    for layout, sizes in (
        ("NCHW", (channels, height, width)),
        ("NHWC", (height, width, channels)),
    ):
        # A dynamic dimension has a name or None instead of a number and fits every size.
        if all(
            not isinstance(own, int) or own == size
            for own, size in zip(shape[1:], sizes, strict=True)
        ):
            return layout
    raise ModelError(
        problem(
            f"{path} takes pictures of shape {shape}",
            expected=f"N x {channels} x {height} x {width} or N x {height} x {width} x {channels}",
            mend="Set data.image_size to the teacher's, or choose another teacher.",
        )
    )


def _logits_output(session: Any, num_classes: int, path: Path) -> str:
    outputs = session.get_outputs()
    for output in outputs:
        shape = output.shape
        if len(shape) == 2 and (not isinstance(shape[1], int) or shape[1] == num_classes):
            name: str = output.name
            return name
    found = ", ".join(f"{output.name} {output.shape}" for output in outputs)
    raise ModelError(
        problem(
            f"{path} has the outputs: {found}",
            expected=f"logits of shape N x {num_classes}, one column for each class of the data",
            mend="Choose a teacher of the same classes.",
        )
    )


def external_files(path: Path) -> list[Path]:
    """Return the files beside an ONNX file that hold weights of it, sorted; mostly none.

    None of what cannot be read, which says why when it is opened.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # the parser raises kinds of its own
        return []
    names = {
        entry.value
        for tensor in _tensors(graph)
        if external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path.parent / name for name in sorted(names)]


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield the stored tensors of a graph, of its constants and of the graphs in its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
