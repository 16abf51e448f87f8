"""A recipe that runs in seconds, and what two runs of it must have in common bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from understudy.artifacts import Record, file_hash

TINY_RECIPE = """\
name: tiny
seed: 3
data: {source: digits, validation_fraction: 0.15, test_fraction: 0.3}
views:
  num_views: 3
  transforms:
    - pad_crop: {padding: 1}
    - affine: {rotation: 10}
teacher:
  model: {name: mlp, arguments: {hidden: [32], dropout: 0.1}}
  training:
    num_epochs: 3
    batch_size: 64
    optimizer: {name: adamw, learning_rate: 0.01}
    checkpoint_every_steps: 5
student:
  model: {name: mlp, arguments: {hidden: [16], dropout: 0.1}}
training:
  num_epochs: 4
  batch_size: 64
  optimizer: {name: adamw, learning_rate: 0.01}
  checkpoint_every_steps: 5
  ema_decay: 0.9
measurement: {min_seconds: 0.05, batch_sizes: [1], num_threads: [1]}
device: {num_threads: 1}
"""
STAGES = ("split", "teacher", "labels", "student", "control", "evaluation", "export")
TIMED_COLUMNS = ("seconds", "samples_per_second")


@dataclass(frozen=True)
class TinyRun:
    """A run folder and the home that its store and decoded pictures are in."""

    folder: Path
    home: Path

    def record(self, kind: str) -> Record:
        return Record.load(self.folder / kind)

    def finished_stages(self) -> list[str]:
        return [kind for kind in STAGES if (self.folder / kind / "record.json").exists()]

    def rows(self, role: str) -> list[dict]:
        lines = (self.folder / role / "metrics.jsonl").read_text().splitlines()
        return [
            {name: value for name, value in json.loads(line).items() if name not in TIMED_COLUMNS}
            for line in lines
        ]

    def store_files(self) -> dict[str, str]:
        """Return every file of the teacher-output store to the hash of its content."""
        root = self.home / "outputs"
        paths = [path for path in root.rglob("*") if path.is_file() and path.name[0] != "."]
        return {str(path.relative_to(root)): file_hash(path) for path in paths}

    def results(self, *, stages: tuple[str, ...] = STAGES) -> dict:
        """Return everything that a run's seed and recipe decide.

        A record's hash covers its results, its parents and the bytes of its files.
        """
        roles = [role for role in ("teacher", "student", "control") if role in stages]
        return {
            "hashes": {kind: self.record(kind).hash for kind in stages},
            "payloads": {kind: self.record(kind).payload for kind in stages},
            "weights": {
                role: file_hash(self.folder / role / "model.safetensors") for role in roles
            },
            "rows": {role: self.rows(role) for role in roles},
            "onnx": file_hash(self.folder / "export" / "student.onnx")
            if "export" in stages
            else None,
            "store": self.store_files(),
        }

    def assert_nothing_is_half_written(self) -> None:
        """Every record there is describes files that are whole."""
        for kind in self.finished_stages():
            assert self.record(kind).damaged_files(self.folder / kind) == []
