"""What is watched every epoch, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from understudy.artifacts import write_text

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Writes one row an epoch to ``metrics.jsonl`` and to TensorBoard event files.

    The rows live in the checkpoint; the file is rewritten from them on resume and on a rollback, so
    that rows written after the checkpoint are not counted twice.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        self._folder, self._path = folder, folder / METRICS_NAME
        self._begin(rows)

    def _begin(self, rows: list[dict[str, Any]]) -> None:
        # TensorBoard takes a second to import, which only training pays.
        from torch.utils.tensorboard import SummaryWriter

        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._events = SummaryWriter(str(self._folder / "tensorboard"), purge_step=len(rows))

    def go_back(self, rows: list[dict[str, Any]]) -> None:
        """Forget every row but these, the first ones."""
        self.close()
        self._begin(rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append one epoch's row."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in flat_items(row):
            self._events.add_scalar(name, value, row["epoch"])

    def close(self) -> None:
        """Flush and close the TensorBoard file."""
        self._events.close()


def flat_items(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the numbers of a nested row with names such as ``losses/kl``."""
    items: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, dict):
            items += flat_items(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            items.append((prefix + name, float(value)))
    return items
