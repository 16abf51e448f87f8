"""The heads of a run as a short table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from understudy.artifacts import RECORD_NAME, Record
from understudy.report.summary import aligned

HEADER = ("task", "network", "params", "classes", "validation", "test", "top 5", "agrees", "n test")
NETWORKS = {
    "head": "head with the teacher",
    "control": "head without the teacher",
    "probe": "teacher's probe",
}


def heads_table(folder: Path) -> str:
    """Return one line for each head, control and probe of a run, and for what needs no head."""
    records = [
        Record.load(path.parent) for path in sorted((folder / "heads").glob(f"*/{RECORD_NAME}"))
    ]
    if not records:
        return (
            f"{folder} has no heads beside the student's own; add one with `understudy heads add`"
        )
    parts = [task_lines(record.payload) for record in records]
    lines = aligned([HEADER, *(row for rows, _ in parts for row in rows)])
    return "\n".join([*lines, *(note for _, sentences in parts for note in sentences)])


def task_lines(payload: dict[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the rows of one task, and the sentences under the table."""
    simple = payload["baselines"]
    rows: list[tuple[str, ...]] = []
    for name in NETWORKS:
        if name in payload["scores"]:
            scores = payload["scores"][name]
            test = scores["test"]
            rows.append(
                (
                    payload["task"],
                    "head" if len(payload["scores"]) == 1 else NETWORKS[name],
                    f"{payload['num_params'][name]:,}",
                    str(len(payload["class_names"])),
                    percent(scores["validation"]["accuracy"]),
                    percent(test["accuracy"]),
                    percent(test["top5_accuracy"]),
                    percent(test["consistency"]),
                    f"{test['num_samples']:,}",
                )
            )
    names = {
        "from_classes": "answered from the class alone",
        "majority": "most frequent",
        "chance": "chance",
    }
    for key, shown in names.items():
        values = (percent(simple["validation"][key]), percent(simple["test"][key]))
        rows.append((payload["task"], shown, "", "", *values, "", "", ""))
    return rows, notes(payload)


def notes(payload: dict[str, Any]) -> list[str]:
    """Return what the numbers of a task leave out."""
    test = payload["scores"]["head"]["test"]
    lines = []
    if test["num_unseen"]:
        lines.append(
            f"{payload['task']}: {test['num_unseen']} test samples have a class that no training "
            f"sample has and are left out; with them as mistakes it is "
            f"{percent(test['accuracy_with_unseen'])}"
        )
    if test["num_unlabelled"]:
        lines.append(f"{payload['task']}: {test['num_unlabelled']} test samples have no label")
    return lines


def percent(share: float | None) -> str:
    """Return a share in percent, a dash where there is none."""
    return "-" if share is None else f"{100 * share:.2f} %"
