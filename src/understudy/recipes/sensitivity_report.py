"""What the record of quantisation says of single layers, as values for the run's report."""

from __future__ import annotations

from typing import Any

from understudy.export.tracing import inside
from understudy.recipes.compression_report import current_steps
from understudy.recipes.run import Run


def sensitivity_values(run: Run) -> list[dict[str, Any]]:
    """Return what each layer loses alone in int8; empty where no step measured it."""
    return [
        {**row, "in_float": inside(row["name"], record.payload["float_layers"])}
        for record in current_steps(run) or []
        for row in record.payload["details"].get("sensitivity", [])
    ]
