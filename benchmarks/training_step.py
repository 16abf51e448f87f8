"""Training step of the paper's student: this package against the plain PyTorch loop.

    python benchmarks/training_step.py [--num-repeats 15] [--num-steps 3] [--num-threads 2]
    UNDERSTUDY_NATIVE=0 python benchmarks/training_step.py      # without the native kernels

Both train the same network (11,444 parameters, dropout 0.2) with AdamW on batches of 100 pictures
of 32x32 that are padded, cropped, flipped and normalised at random, in float32. Repeats alternate
between the two, so that a busy machine slows both. Printed as JSON: milliseconds a step of wall and
of processor time (median, quartiles, n), the share of the input pipeline, the ratio of the medians,
the ratios of neighbouring repeats, hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from understudy.data.batches import epoch_order, index_batches
from understudy.data.views import Views
from understudy.models.build import NormalizedModel
from understudy.models.dropout import set_dropout_step
from understudy.models.native import kernels
from understudy.models.paper import PaperStudent
from understudy.runtime import hardware_facts, package_versions

BATCH_SIZE = 100
NUM_IMAGES = 5000
DROPOUT = 0.2
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class PlainStudent(nn.Sequential):
    """The same layers from torch.nn alone."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.LeakyReLU(),
            nn.Dropout(DROPOUT),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.LeakyReLU(),
            nn.Dropout(DROPOUT),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 30),
            nn.LeakyReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(30, 10),
        )


class PlainDataset(Dataset[tuple[Tensor, Tensor]]):
    """One picture at a time: pad, crop, flip, to float, normalise."""

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor) -> None:
        self.images_NCHW = images_NCHW
        self.labels_N = labels_N
        self.mean = torch.tensor(MEAN).view(3, 1, 1)
        self.std = torch.tensor(STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = F.pad(self.images_NCHW[index], (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        image = image[:, top : top + 32, left : left + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return (image.float() / 255 - self.mean) / self.std, self.labels_N[index]


def plain_steps(images_NCHW: Tensor, labels_N: Tensor) -> Iterator[float]:
    """Train the plain way for ever; yield the seconds that each step spent on its input."""
    model = PlainStudent().train()
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(PlainDataset(images_NCHW, labels_N), BATCH_SIZE, shuffle=True)
    while True:
        started = time.perf_counter()
        for images, labels in loader:
            input_seconds = time.perf_counter() - started
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            yield input_seconds
            started = time.perf_counter()


def understudy_steps(images_NCHW: Tensor, labels_N: Tensor) -> Iterator[float]:
    """Train with this package's parts; yield the seconds that each step spent on its input."""
    network = PaperStudent(num_classes=10, dropout=DROPOUT)
    model = NormalizedModel(network, mean=MEAN, std=STD).train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    everything = torch.arange(len(labels_N))
    spec = [{"pad_crop": {"padding": 4}}, {"flip": {"probability": 0.5}}]
    views = Views(spec, seed=0, partner_pool=everything)
    epoch = step = 0
    while True:
        order_N = epoch_order(everything, seed=0, epoch=epoch)
        for indices_N in index_batches(order_N, BATCH_SIZE, drop_last=True):
            started = time.perf_counter()
            images, _ = views.apply(images_NCHW[indices_N], indices_N, epoch)
            images = images.contiguous(memory_format=torch.channels_last)
            labels = labels_N[indices_N]
            input_seconds = time.perf_counter() - started
            set_dropout_step(model, seed=0, step=step)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            yield input_seconds
            step += 1
        epoch += 1


def summary(values: list[float]) -> dict[str, float]:
    lower, middle, upper = statistics.quantiles(values, n=4)
    return {
        "median": round(middle, 3),
        "lower_quartile": round(lower, 3),
        "upper_quartile": round(upper, 3),
        "least": round(min(values), 3),
        "n": len(values),
    }


def measure(num_repeats: int, num_steps: int) -> dict[str, object]:
    images_NCHW = torch.randint(256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8)
    labels_N = torch.randint(10, (NUM_IMAGES,))
    loops: dict[str, Callable[[Tensor, Tensor], Iterator[float]]] = {
        "plain": plain_steps,
        "understudy": understudy_steps,
    }
    running = {name: loop(images_NCHW, labels_N) for name, loop in loops.items()}
    step_ms: dict[str, list[float]] = {name: [] for name in loops}
    processor_ms: dict[str, list[float]] = {name: [] for name in loops}
    input_shares: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(num_repeats + 2):
        for name, steps in running.items():
            started, processor_started = time.perf_counter(), time.process_time()
            input_seconds = sum(next(steps) for _ in range(num_steps))
            seconds = time.perf_counter() - started
            processor_seconds = time.process_time() - processor_started
            if repeat >= 2:  # the first two warm up
                step_ms[name].append(1000 * seconds / num_steps)
                processor_ms[name].append(1000 * processor_seconds / num_steps)
                input_shares[name].append(input_seconds / seconds)
    pairs = zip(step_ms["plain"], step_ms["understudy"], strict=True)
    return {
        "step_ms": {name: summary(values) for name, values in step_ms.items()},
        "processor_ms": {name: summary(values) for name, values in processor_ms.items()},
        "input_share": {name: summary(values) for name, values in input_shares.items()},
        "ratio_of_medians": round(
            statistics.median(step_ms["plain"]) / statistics.median(step_ms["understudy"]), 2
        ),
        "ratio_of_neighbours": summary([plain / ours for plain, ours in pairs]),
        "steps_a_repeat": num_steps,
        "native_kernels": kernels() is not None,
        "num_threads": torch.get_num_threads(),
        "hardware": hardware_facts(),
        "versions": package_versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-repeats", type=int, default=15)
    parser.add_argument("--num-steps", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    print(json.dumps(measure(arguments.num_repeats, arguments.num_steps), indent=2))


if __name__ == "__main__":
    main()
