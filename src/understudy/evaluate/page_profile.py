"""What a page that was exported for the target ``web`` costs, as a real browser runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from understudy.errors import InputError, problem
from understudy.evaluate.artifact_profile import limit_lines
from understudy.evaluate.budget import BudgetFacts, BudgetRow, check_budget
from understudy.evaluate.devices import Device, device_limits, facts_for
from understudy.evaluate.runtime_files import file_bytes, recorded_artifact
from understudy.evaluate.text_table import human_bytes, text_table
from understudy.runtime import num_usable_cores, processor_name

if TYPE_CHECKING:
    from understudy.export.target import Artifact

RUNTIME = "web"
PAGE_NAME = "index.html"
NUM_IMAGES = 50
SEED = 0


@dataclass(frozen=True)
class PageProfile:
    """Size and times of a page: one picture at a time on one thread, as ``BrowserRun`` tells.

    Attributes:
        name: of the folder.
        measurement: "p50_ms", "p95_ms", "p99_ms", "load_ms", "num_runs" and the setting.
        facts: browser and processor.
    """

    name: str
    size_bytes: int
    measurement: dict[str, Any]
    facts: dict[str, Any]
    device: str | None = None
    budget: tuple[BudgetRow, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return everything with the keys of an ``ArtifactProfile``; None where not measured."""
        return {
            "name": self.name,
            "runtime": RUNTIME,
            "where": "this machine",
            "size_bytes": self.size_bytes,
            "latency": {"measurements": [self.measurement], "facts": self.facts},
            "memory": None,
            "energy": None,
            "device": self.device,
            "budget": [row.to_json() for row in self.budget],
            "notes": list(self.notes),
            "arena_bytes": None,
            "instructions": None,
        }

    def to_text(self) -> str:
        """Return tables of text."""
        row = self.measurement
        cells = [1, 1, *(f"{row[name]:.4g}" for name in ("p50_ms", "p95_ms"))]
        cells += [row["num_runs"], f"{row['load_ms']:.4g}"]
        lines = [
            f"{self.name} in {self.facts['browser']} on this machine",
            f"{self.facts['processor']}, {self.facts['num_cores']} cores",
            f"size     {human_bytes(self.size_bytes)} ({self.size_bytes} bytes), with the runtime",
            text_table(["batch", "threads", "p50 ms", "p95 ms", "runs", "load ms"], [cells]),
        ]
        return "\n".join([*lines, *limit_lines(self.device, self.budget, self.notes)])


def is_page(path: Path, runtime: str | None) -> bool:
    """Return whether a path is to be run in a browser: it is asked for, or its record says so."""
    if runtime is not None:
        return runtime == RUNTIME
    recorded = recorded_artifact(path)
    return recorded is not None and recorded["target"] == RUNTIME


def profile_page(
    path: Path,
    *,
    device: Device | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> PageProfile:
    """Run a page in headless Chromium and judge a device's limits.

    Args:
        path: the page's folder, or the page in it.
        options: of the command, by name, which a page has none of but a batch and a thread of 1;
            None is one that was not given.

    Raises:
        InputError: something else was asked for, this is no page, or no browser is installed.
        MissingExtraError: playwright is not installed.
        UnderstudyError: the page fails in the browser.
    """
    ones = ("--batch", "--threads")
    asked = [
        name
        for name, value in options.items()
        if value and not (name in ones and {str(count) for count in value} == {"1"})
    ]
    if asked:
        raise InputError(
            problem(
                f"{', '.join(asked)} with a page, which a browser on this machine runs",
                expected="one picture at a time on one thread, and nothing to compare with",
                mend="Leave that out, or profile the ONNX file in the folder: --runtime onnx.",
            )
        )
    from understudy.evaluate.browser import page_description, run_in_browser

    artifact = _artifact(path if path.is_dir() else path.parent)
    _, shape = page_description(artifact.folder)
    random = np.random.default_rng(SEED)
    found = run_in_browser(artifact, random.integers(0, 256, (NUM_IMAGES, *shape), dtype=np.uint8))
    measurement = {
        "batch_size": 1,
        "num_threads": 1,
        "p50_ms": found.latency_p50_ms,
        "p95_ms": found.latency_p95_ms,
        "p99_ms": found.latency_p99_ms,
        "load_ms": found.load_ms,
        "num_runs": found.num_runs,
    }
    size_bytes = sum(file_bytes(artifact.folder / name) for name in artifact.files)
    facts = {"browser": found.browser, "processor": processor_name()}
    budget, notes = _judged(device, size_bytes, measurement)
    return PageProfile(
        name=artifact.folder.resolve().name,
        size_bytes=size_bytes,
        measurement=measurement,
        facts=facts | {"num_cores": num_usable_cores()},
        device=None if device is None else device.title,
        budget=budget,
        notes=notes,
    )


def _judged(
    device: Device | None, size_bytes: int, measurement: dict[str, Any]
) -> tuple[tuple[BudgetRow, ...], tuple[str, ...]]:
    if device is None:
        return (), ()
    facts = BudgetFacts(
        model_size_bytes=size_bytes,
        measurements=[measurement],
        counted={"model_size_bytes": "page, network and runtime"},
    )
    facts = facts_for(device, facts, is_on_device=False)
    notes = []
    if not device.is_this_machine:
        notes.append(f"times are of this machine, not of: {device.title}")
    if device.runtime != RUNTIME:
        notes.append(f"this device's runtime is {device.runtime}, not {RUNTIME}")
    return tuple(check_budget(device_limits(device), facts=facts)), tuple(notes)


def _artifact(folder: Path) -> Artifact:
    """Return the page's files: those of its record, or all in the folder."""
    from understudy.export.target import Artifact

    recorded = recorded_artifact(folder)
    if recorded is not None:
        return Artifact(RUNTIME, recorded["precision"], folder, tuple(recorded["files"]))
    others = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != PAGE_NAME)
    return Artifact(RUNTIME, "float32", folder, (PAGE_NAME, *others))
