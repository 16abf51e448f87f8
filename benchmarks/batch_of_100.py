"""One batch of 100 pictures in ONNX Runtime against eager PyTorch, in turns, on one thread.

    python benchmarks/batch_of_100.py [--rounds 7]

The paper's budget is 50 ms a batch on a CPU. Weights are fresh ones: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from understudy.evaluate.compare import compare_artifacts
from understudy.evaluate.eager import write_eager
from understudy.export.onnx_file import export_onnx
from understudy.models.build import NormalizedModel, build_network
from understudy.runtime import hardware_facts, package_versions

SHAPE = (3, 32, 32)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "the paper's student": ("paper_student", {}),
    "recipe cifar10": (
        "separable",
        {"stages": [[16, 1], [32, 2], [48, 1], [56, 2], [64, 1]]},
    ),
    "ResNet-8 of MLPerf Tiny": ("resnet8", {"shortcut": "conv"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    images_NCHW = np.random.default_rng(0).integers(0, 256, (200, *SHAPE), dtype=np.uint8)
    print("| network | ONNX Runtime, ms | eager PyTorch, ms | ratio (quartiles) | n |")
    print("|---|---|---|---|---|")
    for title, (name, arguments) in NETWORKS.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            network = build_network(name, num_classes=10, image_shape=SHAPE, arguments=arguments)
            model = NormalizedModel(network, mean=[0.5] * 3, std=[0.25] * 3)
            path = Path(folder) / "student.onnx"
            export_onnx(model, path, image_shape=SHAPE, class_names=list("abcdefghij"))
            eager = write_eager(
                Path(folder),
                name,
                num_classes=10,
                image_shape=SHAPE,
                arguments=arguments,
                conversions={"mean": [0.5] * 3, "std": [0.25] * 3},
            )
            comparison = compare_artifacts(
                (eager, path),
                images_NCHW,
                batch_sizes=(100,),
                num_threads=(1,),
                num_rounds=options.rounds,
            )
        (row,) = comparison.ratios
        print(
            f"| {title} | {row.p50_ms:.3g} | {row.reference_p50_ms:.3g} | {row.ratio:.3f} "
            f"({row.lower:.3f} to {row.upper:.3f}) | {row.num_rounds} |",
            flush=True,
        )
    print(hardware_facts(), package_versions())


if __name__ == "__main__":
    main()
