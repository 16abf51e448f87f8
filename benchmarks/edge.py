"""The table of files that ship: what each costs and answers in the runtime that runs it.

Reads the records of finished releases and prints one Markdown row an artifact; with ``--write`` it
replaces the table between the markers of a page.

    understudy release mlperf_tiny --set data.source=FOLDER --set teacher.checkpoint=FILE \\
        --out runs/resnet8
    python benchmarks/edge.py runs/resnet8 runs/student12k [--write docs/edge.md]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from understudy.artifacts import Record, write_text
from understudy.recipes.compression_report import chips, counted, plain_facts, single_picture
from understudy.report.formats import large_count, plain, size

TABLE_START = "<!-- table: written by benchmarks/edge.py -->"
TABLE_END = "<!-- end of table -->"
COLUMNS = (
    "student",
    "files",
    "accuracy",
    "same answer",
    "bytes",
    "ms a picture",
    "RAM",
    "of the target",
)


def rows_of(folder: Path) -> list[tuple[str, ...]]:
    """Return one row for every artifact of a run, the uncompressed student first."""
    evaluation = Record.load(folder / "evaluation").payload
    student = evaluation["metrics"]["student"]["test"]
    cost = evaluation["costs"]["student"]
    about = f"{cost['num_params']:,} parameters, {plain(large_count(cost['macs']))} multiply-adds"
    rows = [
        (
            f"`{folder.name}`",
            "PyTorch, as trained",
            percent(student["accuracy"]),
            "",
            "",
            "",
            "",
            about,
        )
    ]
    records = [Record.load(path.parent) for path in sorted(folder.glob("artifact-*/record.json"))]
    return rows + [artifact_row(folder.name, record) for record in records]


def artifact_row(name: str, record: Record) -> tuple[str, ...]:
    """Return the row of one artifact."""
    payload, timing = record.payload, record.timing
    metrics, parity, single = payload["metrics"], payload["parity"], single_picture(timing)
    peak = timing.get("memory", {}).get("peak_memory_bytes")
    return (
        f"`{name}`",
        f"`{payload['target']}/{payload['precision']}`",
        "not run" if metrics is None else percent(metrics["accuracy"]),
        "" if parity is None else percent(parity["top1_agreement"]),
        f"{payload['size_bytes']:,}",
        f"{single['p50_ms']:.3g} (p95 {single['p95_ms']:.3g})" if single else "",
        "" if peak is None else plain(size(peak)),
        "; ".join(facts_of(payload["facts"], timing)),
    )


def facts_of(facts: dict[str, Any], timing: dict[str, Any]) -> list[str]:
    """Return what a target says of its files that other columns do not hold."""
    wanted = ("arena_bytes", "weight_bytes", "static_buffer_bytes", "model_bytes")
    found = [f"{key.replace('_', ' ')} {value:,}" for key, value in facts.items() if key in wanted]
    for name, value in (chips(timing) | counted(timing)).items():
        if name.split()[-1] in ("flash_bytes", "ram_bytes", "peak_stack_bytes"):
            found.append(f"{name.replace('_', ' ')} {value:,}")
        if name.split()[-1] == "instructions_per_image":
            found.append(f"{name.split()[0]} {value / 1e6:.2f} M instructions")
        if name.split()[-1] == "top1_agreement":
            found.append(f"{name.split()[0]} same answer {percent(value)}")
    return [str(text) for text in found] if plain_facts(facts) or found else []


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished releases")
    parser.add_argument("--write", type=Path, help="page to write the table into")
    options = parser.parse_args()
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for folder in options.runs:
        lines += [f"| {' | '.join(row)} |" for row in rows_of(folder)]
    print("\n".join(lines))
    if options.write is not None:
        before, rest = options.write.read_text().split(TABLE_START)
        _, after = rest.split(TABLE_END)
        table = "\n".join(["", *lines, ""])
        write_text(options.write, f"{before}{TABLE_START}{table}{TABLE_END}{after}")


if __name__ == "__main__":
    main()
