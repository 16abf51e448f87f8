"""Eager PyTorch as a runtime like any other: what a file's speed is compared with.

The file is JSON that says how to build the network, and its weights in safetensors beside it. The
process builds the network from its class and calls it, in evaluation and inference mode, in NCHW,
without a compiler: PyTorch as it is used when nothing was exported. Unlike the scripts of
``export/runtimes`` this one needs the package itself, which knows the classes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from understudy.artifacts import write_bytes, write_json
from understudy.errors import InputError, problem
from understudy.models.build import NormalizedModel, build_network

PACKAGES = ("torch", "numpy")
SUFFIX = ".eager.json"


def write_eager(
    folder: Path,
    name: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    arguments: Mapping[str, Any] = MappingProxyType({}),
    conversions: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    title: str | None = None,
) -> Path:
    """Write ``TITLE.eager.json`` and its weights, and return its path.

    Args:
        name: a network that ``build_network`` knows, with its ``arguments``.
        image_shape: (C, H, W).
        conversions: arguments of ``NormalizedModel``; None: the network gets the pixels as they
            are.
        weights: of the network, or of the ``NormalizedModel`` where there are conversions; None:
            as it is built, mostly with fresh weights, which take as long.
        title: what the file is called; None: as the network.
    """
    title = name if title is None else title
    stem = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in title)
    if weights is not None:
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        write_bytes(folder / f"{stem}.safetensors", save(tensors))
    path = folder / f"{stem}{SUFFIX}"
    write_json(
        path,
        {
            "model": name,
            "arguments": dict(arguments),
            "num_classes": num_classes,
            "image_shape": list(image_shape),
            "conversions": None if conversions is None else dict(conversions),
            "weights": None if weights is None else f"{stem}.safetensors",
            # A process that is started by its script's name looks for modules elsewhere.
            "search_path": [str(Path(folder).absolute()) for folder in sys.path],
        },
    )
    return path


class EagerModel:
    """A built network: float32 images [n, C, H, W] in [0, 1] to logits [n, K]."""

    def __init__(self, path: Path) -> None:
        try:
            spec = json.loads(path.read_text())
            sys.path += [folder for folder in spec["search_path"] if folder not in sys.path]
            model: torch.nn.Module = build_network(
                spec["model"],
                num_classes=spec["num_classes"],
                image_shape=tuple(spec["image_shape"]),
                arguments=spec["arguments"],
            )
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                problem(
                    f"{path} does not describe a network ({error!r})",
                    expected="a file of write_eager",
                    mend="Write it again.",
                )
            ) from None
        if spec["conversions"] is not None:
            model = NormalizedModel(model, **spec["conversions"])
        if spec["weights"] is not None:
            model.load_state_dict(load_file(path.parent / spec["weights"]))
        self.model = model.eval()
        self.facts: dict[str, Any] = {
            "image_shape": spec["image_shape"],
            "num_classes": spec["num_classes"],
            "weights": "as built" if spec["weights"] is None else "trained",
            "memory_format": "NCHW",
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", "the system's default"),
        }

    @torch.inference_mode()
    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        return np.asarray(self.model(torch.from_numpy(images_NCHW)).numpy())


def open_model(path: str, *, num_threads: int) -> EagerModel:
    """Build the network and load its weights."""
    torch.set_num_threads(num_threads)
    return EagerModel(Path(path))
