"""What a record of exits says: as values for the report, and as a short table."""

from __future__ import annotations

from typing import Any

from understudy.artifacts import Record
from understudy.report.formats import large_count, plain
from understudy.report.summary import aligned


def exit_values(record: Record) -> dict[str, Any]:
    """Return the record of the stage as the report's results hold it."""
    payload, latency = record.payload, record.timing["latency"]
    policy, outcomes = payload["policy"], payload["outcomes"]
    rows = [
        {
            "layer": layer,
            "macs": payload["macs"][number],
            "num_params": payload["files"][number]["num_params"],
            "file_bytes": payload["files"][number]["size_bytes"],
            "median_ms": latency["exit_ms"][number],
            "threshold": ([*policy["thresholds"], None])[number],
            "temperature": policy["temperatures"][number],
            "validation_accuracy": payload["accuracies"]["validation"][number],
            "test_accuracy": payload["accuracies"]["test"][number],
            "share": outcomes["test"]["shares"][number],
            "leaver_accuracy": outcomes["test"]["leaver_accuracies"][number],
        }
        for number, layer in enumerate(payload["layers"])
    ]
    return {
        "target": payload["target"][0],
        "at_most": payload["target"][1],
        "exits": rows,
        "validation": point(outcomes["validation"]),
        "test": point(outcomes["test"]),
        "curve": [point(values) for values in payload["curve"]],
        "num_threads": latency["num_threads"],
        "num_timed_images": latency["num_images"],
        "choice_mean_ms": latency["choice_mean_ms"],
        "last_mean_ms": latency["last_mean_ms"],
        "file_bytes": payload["choice"]["facts"]["size_bytes"],
    }


def point(values: dict[str, Any]) -> dict[str, float]:
    """Return accuracy and mean multiply-adds of a policy."""
    return {"accuracy": values["accuracy"], "mean_macs": values["mean_cost"]}


def exits_table(record: Record) -> str:
    """Return one line an exit and one for the policy, for the terminal."""
    values = exit_values(record)
    lines = [("exit", "layer", "multiply-adds", "ms", "threshold", "test", "leave here", "right")]
    for number, row in enumerate(values["exits"]):
        threshold = row["threshold"]
        lines.append(
            (
                str(number),
                row["layer"],
                large_count(row["macs"]),
                f"{row['median_ms']:.3g}",
                "-" if threshold is None else "never" if threshold > 1 else f"{threshold:.3f}",
                percent(row["test_accuracy"]),
                percent(row["share"]),
                percent(row["leaver_accuracy"]),
            )
        )
    test, last = values["test"], values["exits"][-1]
    lines.append(
        (
            "all",
            "policy",
            large_count(test["mean_macs"]),
            f"{values['choice_mean_ms']:.3g}",
            "",
            percent(test["accuracy"]),
            percent(1.0),
            "",
        )
    )
    told = (
        f"{values['target']} of at most {values['at_most']:g}: "
        f"{percent(test['accuracy'])} on the test split at "
        f"{percent(test['mean_macs'] / last['macs'])} of the multiply-adds; "
        f"the last exit alone {percent(last['test_accuracy'])} in {values['last_mean_ms']:.3g} ms"
    )
    return plain("\n".join([*aligned(lines), "", told]))


def percent(share: float | None) -> str:
    """Return a share in percent, a dash where there is none."""
    return "-" if share is None else f"{100 * share:.2f} %"
