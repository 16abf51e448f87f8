"""Opens an ncnn network, one image at a time. NumPy and ncnn are all it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("ncnn", "numpy")
# The names that pnnx gives to the first input and the first output.
INPUT_NAME = "in0"
OUTPUT_NAME = "out0"


class NcnnModel:
    """A loaded network: float32 images [n, C, H, W] in [0, 1] to logits [n, K].

    All sums are in float32: ncnn's float16, bfloat16 and int8 short cuts are off.
    """

    def __init__(self, path: str, *, num_threads: int) -> None:
        import ncnn

        self.ncnn = ncnn
        self.net = ncnn.Net()
        options = self.net.opt
        options.num_threads = num_threads
        options.use_vulkan_compute = False
        for name in dir(options):
            if name.startswith(("use_fp16_", "use_bf16_", "use_int8_")):
                setattr(options, name, False)
        self.num_threads = num_threads
        weights = str(Path(path).with_suffix(".bin"))
        for load, file in ((self.net.load_param, path), (self.net.load_model, weights)):
            # ncnn itself takes a missing file for an empty network in some versions.
            if not Path(file).is_file() or load(file) != 0:
                raise ValueError(f"ncnn does not read {file}")
        self.facts: dict[str, Any] = {
            "num_threads": num_threads,
            "num_layers": len(self.net.layers()),
        }

    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        logits = [self._run(image_CHW) for image_CHW in images_NCHW]
        return np.stack(logits)

    def _run(self, image_CHW: np.ndarray) -> np.ndarray:
        extractor = self.net.create_extractor()
        # Mat takes the array's memory as it is, and keeps no reference to the array.
        pixels = np.ascontiguousarray(image_CHW, dtype=np.float32)
        extractor.input(INPUT_NAME, self.ncnn.Mat(pixels))
        status, logits = extractor.extract(OUTPUT_NAME)
        if status != 0:
            raise ValueError(f"ncnn ended with status {status} on an image of {image_CHW.shape}")
        return np.array(logits, dtype=np.float32).reshape(-1)


def open_model(path: str, *, num_threads: int) -> NcnnModel:
    """Load the network ``path`` (.param, its .bin beside it) with this many threads."""
    return NcnnModel(path, num_threads=num_threads)
