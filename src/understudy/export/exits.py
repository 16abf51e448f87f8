"""Exits as ONNX files: one file an exit, and one file that chooses where to leave.

Format of the file with the choice (besides that of ``onnx_file``):
    output ``logits``: float32 [batch, K], of the exit at which the batch left, as they are
    output ``exit``: int64, the number of that exit, 0 for the shallowest
    metadata ``understudy.exits``: JSON: thresholds, temperatures
A batch leaves at the first exit at which all of its pictures are confident enough, so what is
chosen for one picture holds for a batch of one. What lies behind that exit is not computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from understudy.errors import InputError, ModelError, problem
from understudy.export.exit_graph import EXIT_NAME, only_exit, with_choice
from understudy.export.onnx_file import (
    OUTPUT_NAME,
    OnnxFacts,
    build_proto,
    file_entries,
    portable_copy,
    read_onnx_facts,
    write_proto,
)
from understudy.export.target_names import DEFAULT_OPSET
from understudy.heads.exits import ExitNetwork

ImageShape = tuple[int, int, int]


class _AllExits(nn.Module):
    def __init__(self, network: ExitNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_NCHW: Tensor) -> list[Tensor]:
        exits: list[Tensor] = self.network(images_NCHW, all_exits=True)
        return exits


class ExitWriter:
    """Writes a network's exits as files; the network is traced once for all of them.

    Args:
        network: with its trained heads.
        image_shape: (C, H, W).
        class_names: in the order of the logits.
        opset: of ONNX.

    Raises:
        ModelError, InputError: as ``export_onnx``.
    """

    def __init__(
        self,
        network: ExitNetwork,
        *,
        image_shape: ImageShape,
        class_names: Sequence[str],
        opset: int = DEFAULT_OPSET,
    ) -> None:
        self.num_exits = network.num_exits
        self._entries = file_entries(image_shape, class_names)
        self._proto = build_proto(
            portable_copy(_AllExits(network)),
            example=torch.full((2, *image_shape), 0.5),
            opset=opset,
            output_names=[f"{OUTPUT_NAME}_{number}" for number in range(self.num_exits)],
        )
        num_classes = self._proto.graph.output[-1].type.tensor_type.shape.dim[1].dim_value
        if num_classes != len(class_names):
            raise ModelError(
                problem(
                    f"{len(class_names)} class names for exits with {num_classes} logits",
                    expected="one class name for each logit",
                    mend="Give the class names of the data that the network was made for.",
                )
            )

    def write_exit(
        self, path: Path, number: int, *, metadata: Mapping[str, str] | None = None
    ) -> OnnxFacts:
        """Write one exit, images to its logits, with nothing in the file that lies behind it.

        ``check_parity`` compares the file with ``SingleExit(network, number)``.
        """
        proto = only_exit(self._proto, number)
        write_proto(proto, path, entries={**self._entries, "exit": str(number), **(metadata or {})})
        return read_onnx_facts(path)

    def write_choice(
        self,
        path: Path,
        *,
        thresholds: Sequence[float],
        temperatures: Sequence[float],
        metadata: Mapping[str, str] | None = None,
    ) -> OnnxFacts:
        """Write all exits with the choice for these thresholds (all but the last) and temperatures.

        Raises:
            InputError: their numbers are not those of the exits.
        """
        if len(thresholds) != self.num_exits - 1 or len(temperatures) != self.num_exits:
            raise InputError(
                problem(
                    f"{len(thresholds)} thresholds and {len(temperatures)} temperatures for "
                    f"{self.num_exits} exits",
                    expected="a temperature for each exit, and a threshold for all but the last",
                    mend="Give the policy that was calibrated for this network.",
                )
            )
        proto = with_choice(self._proto, thresholds=thresholds, temperatures=temperatures)
        policy = {"thresholds": list(thresholds), "temperatures": list(temperatures)}
        entries = {**self._entries, "exits": json.dumps(policy), **(metadata or {})}
        write_proto(proto, path, entries=entries)
        return read_onnx_facts(path)


def run_choice(session: Any, images_NCHW: Tensor) -> tuple[Tensor, int]:
    """Return logits_NK and the exit of a session of a file with the choice inside.

    Args:
        images_NCHW: uint8 (scaled to [0, 1]) or float; they leave together.
    """
    pixels_NCHW = images_NCHW.cpu().numpy()
    if pixels_NCHW.dtype == np.uint8:
        pixels_NCHW = pixels_NCHW.astype(np.float32) / np.float32(255)
    logits_NK, number = session.run(
        [OUTPUT_NAME, EXIT_NAME], {session.get_inputs()[0].name: pixels_NCHW}
    )
    return torch.from_numpy(logits_NK), int(number)
