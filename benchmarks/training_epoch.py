"""What a teacher costs a training, and what the input pipeline does: on stored outputs.

Trains the same network with and without a teacher, in turn, on pictures of CIFAR-10's size,
through the package's own loop, store and views, and times the input pipeline alone.

    python benchmarks/training_epoch.py [--network paper_student|separable] [--epochs 5]

Targets: an epoch with stored outputs costs at most 1.05 times one without a teacher; the input
pipeline takes at most 5 % of the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from understudy.data.images import images_from_tensors
from understudy.data.views import Views
from understudy.models.build import NormalizedModel, build_network
from understudy.progress import silent
from understudy.runtime import hardware_facts, package_versions
from understudy.teachers.label import view_keys
from understudy.teachers.store import OutputStore
from understudy.teachers.stored import StoredTeacher
from understudy.train.devices import make_fabric, use_threads
from understudy.train.distill_settings import DistillSettings
from understudy.train.distillation import DistillObjective
from understudy.train.feed import Feed, ViewPlan
from understudy.train.loop import train
from understudy.train.objective import LabelObjective
from understudy.train.plan import TrainPlan
from understudy.train.settings import TrainSettings

NUM_VIEWS = 2
SPEC = [{"pad_crop": {"padding": 4}}, {"flip": {}}]


def stored_teacher(source: Any, views: Views, indices_N: torch.Tensor, root: Path) -> StoredTeacher:
    """Fill a store with random logits: what they say does not matter to the time."""
    entries = []
    store = OutputStore(root)
    for key in view_keys(source, views, teacher="random", num_views=NUM_VIEWS, precision="float32"):
        entry = store.entry(key, sample_indices_N=indices_N, num_classes=10)
        for chunk in entry.missing_chunks():
            start, stop = entry.chunk_range(chunk)
            entry.write_chunk(chunk, torch.randn(stop - start, 10) * 5)
        entries.append(entry)
    return StoredTeacher(entries, indices_N)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="paper_student")
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs of each kind")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=100)
    options = parser.parse_args()
    threads = use_threads(None)
    torch.manual_seed(0)
    source = images_from_tensors(
        torch.randint(0, 256, (options.samples, 3, 32, 32), dtype=torch.uint8),
        torch.arange(options.samples) % 10,
        class_names=[str(k) for k in range(10)],
    )
    indices_N = torch.arange(options.samples)
    views = Views(SPEC, seed=0, partner_pool=indices_N)
    with tempfile.TemporaryDirectory() as folder:
        teacher = stored_teacher(source, views, indices_N, Path(folder))
        kinds = {"control": None, "student": teacher}
        rows: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(options.epochs):
            for kind, kind_teacher in kinds.items():
                run = Path(folder) / f"{kind}{number}"
                rows[kind].append(timed_epoch(options, source, views, indices_N, kind_teacher, run))
        feed = Feed(source, views, indices_N, options.batch_size, ViewPlan(NUM_VIEWS), 0, teacher)
        pipeline = timed_pipeline(feed, options.epochs)
    report(options, rows, pipeline, threads)


def timed_epoch(
    options: argparse.Namespace,
    source: Any,
    views: Views,
    indices_N: torch.Tensor,
    teacher: StoredTeacher | None,
    folder: Path,
) -> float:
    """Train two epochs and return the seconds of the second; the first one warms up."""
    folder.mkdir()
    network = build_network(options.network, num_classes=10, image_shape=(3, 32, 32))
    model = NormalizedModel(network, mean=[0.5] * 3, std=[0.25] * 3)
    settings = TrainSettings(num_epochs=2, batch_size=options.batch_size)
    objective = LabelObjective() if teacher is None else DistillObjective(DistillSettings())
    feed = Feed(source, views, indices_N, options.batch_size, ViewPlan(NUM_VIEWS), 0, teacher)
    plan = TrainPlan(feed, objective, settings, lambda network: {"accuracy": 0.0}, folder)
    fabric = make_fabric()
    fabric.launch()
    result = train(model, plan, fabric=fabric, progress=silent)
    return float(result.rows[1]["seconds"])


def timed_pipeline(feed: Feed, num_epochs: int) -> list[float]:
    """Return the seconds that the input pipeline alone takes for each epoch."""
    seconds = []
    for epoch in range(num_epochs + 1):
        started = time.perf_counter()
        for _ in feed.epoch(epoch):
            pass
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def report(
    options: argparse.Namespace, rows: dict[str, list[float]], pipeline: list[float], threads: int
) -> None:
    """Print one JSON object: medians, spreads, ratios, machine and versions."""
    num_batches = options.samples // options.batch_size

    def ms(seconds: list[float]) -> dict[str, float]:
        scaled = sorted(1000 * s / num_batches for s in seconds)
        return {"median": statistics.median(scaled), "min": scaled[0], "max": scaled[-1]}

    student, control = map(statistics.median, (rows["student"], rows["control"]))
    values = {
        "network": options.network,
        "n": options.epochs,
        "batch_size": options.batch_size,
        "threads": threads,
        "ms_a_step_without_teacher": ms(rows["control"]),
        "ms_a_step_with_stored_teacher": ms(rows["student"]),
        "ms_a_step_input_pipeline": ms(pipeline),
        "ratio_stored_over_none": student / control,
        "share_of_input_pipeline": statistics.median(pipeline) / student,
        "hardware": hardware_facts(),
        "versions": package_versions(),
    }
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
