"""Whether a step of compression lost more than it may: pure functions of metrics and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from understudy.compress.settings import Gates


@dataclass(frozen=True)
class GateRow:
    """One gate. ``loss`` is what got worse, positive for worse; None where it is not known.

    Attributes:
        name: the key of the gate, or ``budget.LIMIT``.
        limit: the most that may be lost; of a budget row the limit itself.
    """

    name: str
    before: float | None
    after: float | None
    loss: float | None
    limit: float
    status: Literal["passed", "failed", "not_measured"]

    def to_json(self) -> dict[str, Any]:
        """Return the row as a plain dict."""
        return asdict(self)


def check_gates(gates: Gates, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[GateRow]:
    """Return one row for each gate that is set.

    Args:
        before, after: metrics on the validation split, as ``Metrics.to_json`` writes them.
    """
    measures = {
        "accuracy_drop": (before["accuracy"], after["accuracy"], 1),
        "worst_class_drop": (worst_class(before), worst_class(after), 1),
        "agreement_drop": (before["agreement_with_teacher"], after["agreement_with_teacher"], 1),
        "ece_rise": (before["ece"], after["ece"], -1),
    }
    rows = []
    for name, (old, new, sign) in measures.items():
        limit = getattr(gates, name)
        # Without a teacher that answers, nothing is there to agree with.
        if limit is None or (name == "agreement_drop" and old is None):
            continue
        loss = None if old is None or new is None else sign * (old - new)
        rows.append(GateRow(name, old, new, loss, limit, status_of(loss, limit)))
    return rows


def check_budget_kept(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[GateRow]:
    """Return one row for each limit of the budget that was kept before.

    Args:
        before, after: rows of ``check_budget`` as plain dicts.
    """
    kept = {row["name"]: row for row in before if row["status"] == "passed"}
    return [
        GateRow(
            name=f"budget.{row['name']}",
            before=kept[row["name"]]["measured"],
            after=row["measured"],
            loss=None
            if row["measured"] is None
            else row["measured"] - kept[row["name"]]["measured"],
            limit=row["limit"],
            status=row["status"],
        )
        for row in after
        if row["name"] in kept
    ]


def worst_class(metrics: Mapping[str, Any]) -> float | None:
    """Return the accuracy of the class with the lowest."""
    known = [value for value in metrics["per_class_accuracy"] if value is not None]
    return min(known) if known else None


def status_of(loss: float | None, limit: float) -> Literal["passed", "failed", "not_measured"]:
    """Return whether a loss keeps its limit; exactly at the limit it does."""
    if loss is None:
        return "not_measured"
    # Accuracies are shares of a count: 0.9 - 0.89 is not to fail a limit of 0.01.
    return "passed" if loss <= limit + 1e-9 else "failed"


def reason_of(rows: Sequence[GateRow]) -> str:
    """Return in words why a step is taken back; empty where every gate passed."""
    failed = [row for row in rows if row.status != "passed"]
    return "; ".join(
        f"{row.name} was not measured"
        if row.loss is None
        else f"{row.name}: {shown(row.before)} became {shown(row.after)}, "
        f"{'at most' if row.name.startswith('budget.') else 'a loss of at most'} {shown(row.limit)}"
        " is allowed"
        for row in failed
    )


def shown(value: float | None) -> str:
    """Return a number in the fewest digits that tell it from the limit."""
    return "none" if value is None else f"{value:.6g}"
