"""One batch of 100 pictures in ONNX Runtime against eager PyTorch, in turns, on one thread.

    python benchmarks/batch_of_100.py [--rounds 7]

The paper's budget is 50 ms a batch on a CPU. Weights are fresh ones: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from understudy.evaluate.compare import compare_artifacts
from understudy.evaluate.eager import write_eager
from understudy.export.onnx_file import export_onnx
from understudy.models.build import NormalizedModel, build_network
from understudy.recipes.files import read_recipe
from understudy.runtime import hardware_facts, package_versions

SHAPE = (3, 32, 32)
RECIPES = ("cifar10", "cifar10_12k", "cifar10_80k", "mlperf_tiny")
PIXELS = {"mean": [0.5] * 3, "std": [0.25] * 3}


def networks() -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Yield title, network, arguments and whether mirror images are averaged."""
    yield "the paper's student", "paper_student", {}, False
    for recipe in RECIPES:
        values, _ = read_recipe(recipe, ())
        student, model = values["student"], values["student"]["model"]
        flips = student.get("flip_average", False)
        yield f"recipe {recipe}", model["name"], model.get("arguments", {}), flips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    images_NCHW = np.random.default_rng(0).integers(0, 256, (200, *SHAPE), dtype=np.uint8)
    print("| network | ONNX Runtime, ms | eager PyTorch, ms | ratio (quartiles) | n |")
    print("|---|---|---|---|---|")
    for title, name, arguments, flips in networks():
        conversions = {**PIXELS, "flip_average": flips}
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            network = build_network(name, num_classes=10, image_shape=SHAPE, arguments=arguments)
            model = NormalizedModel(network, **conversions)
            path = Path(folder) / "student.onnx"
            export_onnx(model, path, image_shape=SHAPE, class_names=list("abcdefghij"))
            eager = write_eager(
                Path(folder),
                name,
                num_classes=10,
                image_shape=SHAPE,
                arguments=arguments,
                conversions=conversions,
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
