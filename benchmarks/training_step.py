"""Training steps: this package against the plain PyTorch loop.

    python benchmarks/training_step.py [--num-repeats 15] [--num-steps 3] [--num-threads 2]
                                       [--only student --only ts6 --only teacher6 --only separable]
    UNDERSTUDY_NATIVE=0 python benchmarks/training_step.py      # without the native kernels

Four trainings, each of the same network both ways, with AdamW on batches of 100 pictures of 32x32
that are padded, cropped, flipped and normalised at random, in float32:

    student     the paper's student (11,444 parameters, dropout 0.2), on labels
    ts6         the same student taught by Teacher 6: the plain loop runs the teacher on every
                batch, as the paper does; here its stored outputs are read
    teacher6    the paper's Teacher 6 (57,876 parameters), on labels
    separable   a depthwise-separable network of 11,506 parameters, on labels

Each way has a process of its own, as a user would run it, and repeats alternate between them, so
that a busy machine slows both. Printed as JSON: milliseconds a step of wall and of processor time
(median, quartiles, n), the share of the input pipeline, the ratio of the medians, the ratios of
neighbouring repeats, hardware and versions; and the floor: three times the multiply-adds of a
forward pass, two operations each, at the rate of a large matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from understudy.data.batches import epoch_order, index_batches
from understudy.data.views import Views
from understudy.models.build import NormalizedModel
from understudy.models.cost import count_macs
from understudy.models.dropout import set_dropout_step
from understudy.models.native import kernels
from understudy.models.paper import PaperStudent, PaperTeacher
from understudy.models.separable import SeparableNet
from understudy.runtime import hardware_facts, keep_freed_memory, package_versions

BATCH_SIZE = 100
NUM_IMAGES = 5000
DROPOUT = 0.2
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
SEPARABLE_STAGES = ((16, 1), (32, 2), (48, 1), (56, 2), (64, 1))


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


class PlainTeacher(nn.Module):
    """Teacher 6 from torch.nn alone."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.LeakyReLU()]
        layers.append(nn.Dropout(DROPOUT))
        for _ in range(6):
            layers += [nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.LeakyReLU()]
            layers += [nn.BatchNorm2d(32), nn.Dropout(DROPOUT)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 30), nn.LeakyReLU()]
        self.layers = nn.Sequential(*layers, nn.Dropout(DROPOUT), nn.Linear(30, 10))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        logits_NK: Tensor = self.layers(images_NCHW)
        return logits_NK


def separable() -> SeparableNet:
    return SeparableNet(num_classes=10, stages=SEPARABLE_STAGES)


@dataclass(frozen=True)
class Case:
    """One training: its network both ways, and whether Teacher 6 teaches it."""

    plain: Callable[[], nn.Module]
    ours: Callable[[], nn.Module]
    taught: bool = False


CASES: dict[str, Case] = {
    "student": Case(PlainStudent, lambda: PaperStudent(num_classes=10, dropout=DROPOUT)),
    "ts6": Case(PlainStudent, lambda: PaperStudent(num_classes=10, dropout=DROPOUT), taught=True),
    "teacher6": Case(
        PlainTeacher, lambda: PaperTeacher(num_classes=10, num_layers=6, dropout=DROPOUT)
    ),
    "separable": Case(separable, separable),
}


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


def loss_of(logits_NK: Tensor, labels_N: Tensor, teacher_NK: Tensor | None) -> Tensor:
    """The paper's loss: the mean of cross-entropy and KL at temperature 1."""
    loss = F.cross_entropy(logits_NK, labels_N)
    if teacher_NK is None:
        return loss
    own, teacher = F.log_softmax(logits_NK, 1), F.log_softmax(teacher_NK, 1)
    return (loss + F.kl_div(own, teacher, reduction="batchmean", log_target=True)) / 2


def plain_steps(case: Case, images_NCHW: Tensor, labels_N: Tensor) -> Iterator[float]:
    """Train the plain way for ever; yield the seconds that each step spent on its input."""
    model = case.plain().train()
    teacher = PlainTeacher().eval() if case.taught else None
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(PlainDataset(images_NCHW, labels_N), BATCH_SIZE, shuffle=True)
    while True:
        started = time.perf_counter()
        for images, labels in loader:
            input_seconds = time.perf_counter() - started
            teacher_NK = None
            if teacher is not None:
                with torch.no_grad():
                    teacher_NK = teacher(images)
            optimizer.zero_grad()
            loss_of(model(images), labels, teacher_NK).backward()
            optimizer.step()
            yield input_seconds
            started = time.perf_counter()


def understudy_steps(case: Case, images_NCHW: Tensor, labels_N: Tensor) -> Iterator[float]:
    """Train with this package's parts; yield the seconds that each step spent on its input."""
    model = NormalizedModel(case.ours(), mean=MEAN, std=STD).train()
    stored_NK = torch.randn(len(labels_N), 10).numpy() if case.taught else None
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
            teacher_NK = None
            if stored_NK is not None:
                teacher_NK = torch.from_numpy(stored_NK[indices_N.numpy()])
            input_seconds = time.perf_counter() - started
            set_dropout_step(model, seed=0, step=step)
            optimizer.zero_grad()
            loss_of(model(images), labels, teacher_NK).backward()
            optimizer.step()
            yield input_seconds
            step += 1
        epoch += 1


WAYS: dict[str, Callable[[Case, Tensor, Tensor], Iterator[float]]] = {
    "plain": plain_steps,
    "understudy": understudy_steps,
}


def summary(values: list[float]) -> dict[str, float]:
    lower, middle, upper = statistics.quantiles(values, n=4)
    return {
        "median": round(middle, 3),
        "lower_quartile": round(lower, 3),
        "upper_quartile": round(upper, 3),
        "least": round(min(values), 3),
        "n": len(values),
    }


def matrix_rate() -> float:
    """Operations a second of a float32 product of two 2048 x 2048 matrices, the best of 7."""
    side = 2048
    left, right = torch.randn(side, side), torch.randn(side, side)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times[1:])


def floor_ms(case: Case, rate: float) -> float:
    """Milliseconds of a step whose every operation runs at the rate of a matrix product."""
    macs = count_macs(case.ours(), (3, 32, 32))
    return 1000 * 3 * 2 * macs * BATCH_SIZE / rate


def serve(way: str, name: str, num_threads: int, requests: Connection) -> None:
    """In a process of its own: train as asked; answer with seconds, processor's and input's."""
    torch.set_num_threads(num_threads)
    if way == "understudy":
        keep_freed_memory()  # as every training of this package does
    torch.manual_seed(0)
    images_NCHW = torch.randint(256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8)
    labels_N = torch.randint(10, (NUM_IMAGES,))
    steps = WAYS[way](CASES[name], images_NCHW, labels_N)
    while num_steps := requests.recv():
        started, processor_started = time.perf_counter(), time.process_time()
        input_seconds = sum(next(steps) for _ in range(num_steps))
        seconds, processor_seconds = (
            time.perf_counter() - started,
            time.process_time() - processor_started,
        )
        requests.send((seconds, processor_seconds, input_seconds))


def measure(name: str, num_repeats: int, num_steps: int, rate: float) -> dict[str, object]:
    step_ms: dict[str, list[float]] = {way: [] for way in WAYS}
    processor_ms: dict[str, list[float]] = {way: [] for way in WAYS}
    input_shares: dict[str, list[float]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as stack:
        workers = {way: stack.enter_context(worker(way, name)) for way in WAYS}
        for repeat in range(num_repeats + 2):
            for way, requests in workers.items():
                requests.send(num_steps)
                seconds, processor_seconds, input_seconds = requests.recv()
                if repeat >= 2:  # the first two warm up
                    step_ms[way].append(1000 * seconds / num_steps)
                    processor_ms[way].append(1000 * processor_seconds / num_steps)
                    input_shares[way].append(input_seconds / seconds)
    pairs = zip(step_ms["plain"], step_ms["understudy"], strict=True)
    ours, floor = statistics.median(step_ms["understudy"]), floor_ms(CASES[name], rate)
    return {
        "step_ms": {way: summary(values) for way, values in step_ms.items()},
        "processor_ms": {way: summary(values) for way, values in processor_ms.items()},
        "input_share": {way: summary(values) for way, values in input_shares.items()},
        "ratio_of_medians": round(statistics.median(step_ms["plain"]) / ours, 2),
        "ratio_of_neighbours": summary([plain / our for plain, our in pairs]),
        "floor_ms": round(floor, 2),
        "times_the_floor": round(ours / floor, 2),
    }


@contextlib.contextmanager
def worker(way: str, name: str) -> Iterator[Connection]:
    """Start a process that serves; end it with the context."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=serve, args=(way, name, torch.get_num_threads(), theirs), daemon=True
    )
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.send(0)
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-repeats", type=int, default=15)
    parser.add_argument("--num-steps", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", choices=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    rate = matrix_rate()
    cases = {
        name: measure(name, arguments.num_repeats, arguments.num_steps, rate)
        for name in arguments.only or CASES
    }
    facts = {
        "matrix_gflops": round(rate / 1e9, 1),
        "steps_a_repeat": arguments.num_steps,
        "native_kernels": kernels() is not None,
        "num_threads": torch.get_num_threads(),
        "hardware": hardware_facts(),
        "versions": package_versions(),
    }
    print(json.dumps({"cases": cases, **facts}, indent=2))


if __name__ == "__main__":
    main()
