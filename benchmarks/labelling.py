"""Labelling with a ResNet-56: the plain eager float32 loop against ours, over the same images.

    python benchmarks/labelling.py [--checkpoint FILE --data FOLDER] [--json FILE]

All variants run in turn within one round, rounds are repeated, and medians are compared, so that a
machine that slows down meanwhile slows all of them. Without a checkpoint the weights are random
and the images noise, which changes outputs and not speed; int8 is then calibrated on noise, and
only its time means something.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.artifacts import write_json
from understudy.data.images import DataFacts, InMemoryImages
from understudy.data.sources import load_data
from understudy.data.views import Views
from understudy.models.build import NormalizedModel, build_network
from understudy.models.load import load_weights
from understudy.runtime import hardware_facts, package_versions
from understudy.teachers.inference import Inference, fast_inference
from understudy.teachers.label import label_views, view_keys
from understudy.teachers.store import OutputStore

BATCH_SIZE = 100
NUM_CLASSES = 10
IMAGE_SHAPE = (3, 32, 32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_CALIBRATION_IMAGES = 512


def main() -> None:
    """Measure, print a table, and write all of it as JSON where asked to."""
    arguments = parsed_arguments()
    load_before = os.getloadavg()[0]
    model = teacher(arguments.checkpoint)
    images_NCHW, sample_NCHW = pictures(arguments.data, arguments.num_images)
    plain = plain_loop(arguments.checkpoint, images_NCHW)
    runs: dict[str, Callable[[Tensor], Tensor]] = {"plain eager float32": plain}
    chosen: dict[str, Inference] = {}
    for precision in arguments.precisions:
        infer = fast_inference(
            model, image_shape=IMAGE_SHAPE, precision=precision, sample_images_NCHW=sample_NCHW
        )
        name = f"{precision}: {infer.runtime}"
        chosen[name] = infer
        runs[name] = in_batches(infer)
        if precision == "auto":
            runs[f"{name}, with views and store"] = whole_labelling(infer)
    outputs = {name: run(images_NCHW) for name, run in runs.items()}
    seconds = interleaved(runs, images_NCHW, num_rounds=arguments.num_rounds)
    result = {
        "num_images": len(images_NCHW),
        "batch_size": BATCH_SIZE,
        "num_rounds": arguments.num_rounds,
        # Two busy processes slow each other far more than twofold: near 0, or the figures are void.
        "load_before": load_before,
        "num_threads": torch.get_num_threads(),
        "hardware": hardware_facts(),
        "versions": package_versions(),
        "variants": compared(seconds, outputs, chosen),
    }
    show(result)
    if arguments.json:
        write_json(arguments.json, result)


def parsed_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, help="weights of a CIFAR ResNet-56")
    parser.add_argument("--data", help="pictures of 32x32, as `understudy` takes them")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--num-rounds", type=int, default=7)
    parser.add_argument(
        "--precisions", nargs="+", default=["auto", "int8"], help="of auto, bfloat16, int8"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def teacher(checkpoint: Path | None) -> NormalizedModel:
    """Return a ResNet-56 in evaluation mode."""
    torch.manual_seed(0)
    network = build_network("resnet56", num_classes=NUM_CLASSES, image_shape=IMAGE_SHAPE)
    if checkpoint is not None:
        load_weights(network, checkpoint)
    return NormalizedModel(network, mean=MEAN, std=STD).eval()


def pictures(data: str | None, num_images: int) -> tuple[Tensor, Tensor]:
    """Return the images to label, and other ones to choose a runtime on."""
    total = num_images + NUM_CALIBRATION_IMAGES
    if data is None:
        generator = torch.Generator().manual_seed(0)
        shape = (total, *IMAGE_SHAPE)
        images_NCHW = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    else:
        images_NCHW = load_data(data).images(torch.arange(total))
    return images_NCHW[:num_images].clone(), images_NCHW[num_images:].clone()


def plain_loop(checkpoint: Path | None, images_NCHW: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what one writes first: normalise in float32, run the network, NCHW, no gradients.

    It has a process of its own, as a user would run it: ours changes how memory is kept.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    request = checkpoint, images_NCHW.numpy(), torch.get_num_threads()
    context.Process(target=serve_plain, args=(*request, theirs), daemon=True).start()

    def run(images_NCHW: Tensor) -> Tensor:
        ours.send(True)
        return torch.from_numpy(ours.recv())

    return run


def serve_plain(checkpoint: Path | None, images: Any, num_threads: int, requests: Any) -> None:
    """Label the images as often as asked."""
    torch.set_num_threads(num_threads)
    network = teacher(checkpoint).network
    images_NCHW = torch.from_numpy(images)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with contextlib.suppress(EOFError):  # the end of the one who asks
        while requests.recv():
            with torch.no_grad():
                batches = torch.split(images_NCHW, BATCH_SIZE)
                logits = [network((batch.float() / 255 - mean) / std) for batch in batches]
            requests.send(torch.cat(logits).numpy())


def in_batches(infer: Inference) -> Callable[[Tensor], Tensor]:
    """Return the loop over batches alone, which is what the plain loop does."""
    return lambda images_NCHW: torch.cat([infer(b) for b in torch.split(images_NCHW, BATCH_SIZE)])


def whole_labelling(infer: Inference) -> Callable[[Tensor], Tensor]:
    """Return the stage as it is run: crop and flip, teacher, compressed and checked store."""

    def run(images_NCHW: Tensor) -> Tensor:
        count = len(images_NCHW)
        indices_N = torch.arange(count)
        names = tuple(map(str, range(NUM_CLASSES)))
        ids = tuple(map(str, range(count)))
        given = ("train",) * count
        facts = DataFacts(IMAGE_SHAPE, names, indices_N % NUM_CLASSES, ids, given, "none")
        source = InMemoryImages(facts, images_NCHW)
        views = Views([{"pad_crop": {"padding": 4}}, {"flip": {}}], seed=0, partner_pool=indices_N)
        with tempfile.TemporaryDirectory() as folder:
            [key] = view_keys(source, views, teacher="t", num_views=1, precision=infer.precision)
            entry = OutputStore(Path(folder)).entry(
                key, sample_indices_N=indices_N, num_classes=NUM_CLASSES
            )
            label_views(infer, source, views, indices_N, entries=[entry], batch_size=BATCH_SIZE)
            return entry.read(indices_N)

    return run


def interleaved(
    runs: dict[str, Callable[[Tensor], Tensor]], images_NCHW: Tensor, *, num_rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of every variant in every round. All have run once before."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run(images_NCHW)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def compared(
    seconds: dict[str, list[float]], outputs: dict[str, Tensor], chosen: dict[str, Inference]
) -> dict[str, dict[str, Any]]:
    """Return median, spread, ratio to the plain loop and difference of the outputs."""
    plain = next(iter(seconds))
    plain_median = median(seconds[plain])
    variants: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        variants[name] = {
            "median_s": median(times),
            "min_s": min(times),
            "max_s": max(times),
            "seconds": times,
            "images_per_second": len(outputs[name]) / median(times),
            "times_faster": plain_median / median(times),
        }
        if name == plain or name in chosen:
            variants[name] |= differences(outputs[name], outputs[plain])
    return variants


def differences(logits_NK: Tensor, plain_NK: Tensor) -> dict[str, float]:
    """Return how far the outputs are from those of the plain loop."""
    kl = F.kl_div(
        logits_NK.log_softmax(1), plain_NK.log_softmax(1), log_target=True, reduction="batchmean"
    )
    return {
        "max_abs_difference": (logits_NK - plain_NK).abs().max().item(),
        "mean_abs_difference": (logits_NK - plain_NK).abs().mean().item(),
        "max_abs_logit": plain_NK.abs().max().item(),
        "kl": kl.item(),
        "agreement": (logits_NK.argmax(1) == plain_NK.argmax(1)).float().mean().item(),
    }


def median(values: list[float]) -> float:
    """Return the middle value (the lower one of two)."""
    return sorted(values)[(len(values) - 1) // 2]


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    hardware = result["hardware"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "onnxruntime"))
    print(
        f"ResNet-56, {result['num_images']} images of 32x32 in batches of {BATCH_SIZE}, "
        f"{result['num_rounds']} rounds, load before {result['load_before']:.2f}"
    )
    print(f"{hardware['processor']}, {result['num_threads']} threads; {versions}")
    print(f"{'variant':52} {'median s (min to max)':>26} {'images/s':>9} {'ratio':>6}  outputs")
    for name, values in result["variants"].items():
        spread = f"{values['median_s']:.3f} ({values['min_s']:.3f} to {values['max_s']:.3f})"
        outputs = ""
        if "kl" in values:
            outputs = (
                f"max {values['max_abs_difference']:.2g} of {values['max_abs_logit']:.3g}, "
                f"KL {values['kl']:.2g}, same class {100 * values['agreement']:.1f} %"
            )
        print(
            f"{name:52} {spread:>26} {values['images_per_second']:9.0f} "
            f"{values['times_faster']:5.2f}x  {outputs}"
        )
    print(json.dumps({name: round(v["times_faster"], 2) for name, v in result["variants"].items()}))


if __name__ == "__main__":
    main()
