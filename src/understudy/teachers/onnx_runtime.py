"""A teacher in ONNX Runtime: exported to memory, in float32 or calibrated to int8."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from understudy.teachers.tap_points import collecting

INPUT_NAME = "images"
CALIBRATION_BATCH = 32
NOISY_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "root")


def exported(model: nn.Module, example_NCHW: Tensor) -> tuple[onnx.ModelProto, list[str]]:
    """Return the model as ONNX, and the keys of its features.

    It takes uint8 images NCHW of any number, and gives logits and then the features of its tap
    points in the order of the keys.
    """
    with_features = _WithFeatures(model).eval()
    with _quiet():
        with torch.no_grad():
            with_features(example_NCHW)
        program = torch.onnx.export(
            with_features,
            (example_NCHW,),
            input_names=[INPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto, with_features.keys


def runner(
    model: onnx.ModelProto, keys: Sequence[str]
) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
    """Return a function from uint8 images NCHW to logits and features by key, both float32.

    It runs in ONNX Runtime on the CPU.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def run(images_NCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = session.run(None, {INPUT_NAME: images_NCHW.cpu().numpy()})
        logits_NK, *features = map(torch.from_numpy, outputs)
        return logits_NK, dict(zip(keys, features, strict=True))

    return run


def quantized(model: onnx.ModelProto, calibration_images_NCHW: Tensor) -> onnx.ModelProto:
    """Return the model with 7-bit weights (a scale per channel) and uint8 activations.

    Ranges are the smallest and largest values seen on the calibration images: on a CIFAR-10
    ResNet-56 entropy calibration gave the same numbers and percentiles slightly worse ones, both
    after three times as long, and leaving the first and last layer in float32 cost a third of the
    speed for nothing. Signed activations run without VNNI kernels and are four times slower.

    Weights of 8 bits would overflow on a processor without VNNI instructions, whose kernels add
    two products in 16 bits with saturation: a ResNet-56 then came 0.0041 nats from float32 (mean
    KL over 1,000 pictures), and the outputs were others on every kind of processor. With 7 bits,
    as fast, it is 0.0003 on such a processor and with exact sums alike.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        # Through a file: given the model itself, the preparation moves its weights elsewhere.
        given, prepared, result = (
            Path(folder, f"{name}.onnx") for name in ("given", "pre", "int8")
        )
        onnx.save(model, given)
        quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(result),
            _Calibration(calibration_images_NCHW.numpy()),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
        return onnx.load(result)


class _WithFeatures(nn.Module):
    """A network that returns what its tap points keep, as further outputs in a fixed order."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._collect = collecting(network, network)
        self.network = network
        self.keys: list[str] = []

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        logits_NK, features = self._collect(images_NCHW)
        self.keys = list(features)
        return logits_NK, *features.values()


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images_NCHW: NDArray[np.uint8]) -> None:
        starts = range(0, len(images_NCHW), CALIBRATION_BATCH)
        self._batches = iter([images_NCHW[start : start + CALIBRATION_BATCH] for start in starts])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what exporters say to their own developers; failures still raise."""
    loggers = [logging.getLogger(name if name != "root" else None) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
