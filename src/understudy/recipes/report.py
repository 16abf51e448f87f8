"""Stage 7, the report: budget, coded checks, one HTML page, JSON and Markdown from the records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.artifacts import Record
from understudy.errors import InputError, problem
from understudy.evaluate.budget import BUDGET_UNITS, BudgetFacts, check_budget
from understudy.recipes.artifact_budget import artifact_budgets, shipped_budget
from understudy.recipes.chain import chain_stages, earlier_seconds, lineage
from understudy.recipes.compression_report import compressed_budget, compression_values
from understudy.recipes.exit_report import exit_values
from understudy.recipes.members import is_ensemble, teacher_name
from understudy.recipes.networks import model_section
from understudy.recipes.peers import roles_beside, trains_teacher
from understudy.recipes.run import REPORT_NAME, Run
from understudy.recipes.sensitivity_report import sensitivity_values
from understudy.report.render import write_report
from understudy.report.results import RunResults

COST_FIELDS = ("num_params", "macs", "weight_bytes", "peak_activation_bytes")
# Stage, in order of work: the command that makes it.
COMMANDS = {
    "split": "teach",
    "teacher": "teach",
    "labels": "label",
    "student-untuned": "train",
    "student": "train",
    "control-untuned": "train",
    "control": "train",
    "evaluation": "evaluate",
    "export": "export",
    "exits": "exits",
}


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        results: every figure, typed.
        page: the HTML report.
        budget_missed: a limit of the budget is not kept (exit code 3).
    """

    results: RunResults
    page: Path
    budget_missed: bool


def report(run: Run) -> Outcome:
    """Write ``report/report.html``, ``report.json`` and ``report.md`` from the run's records."""
    results = gather_results(run)
    files = write_report(results, run.folder / REPORT_NAME)
    missed = any(row.status == "failed" for row in results.budget)
    return Outcome(results, files.html, missed)


def gather_results(run: Run) -> RunResults:
    """Return everything the report says, from the records of the stages before."""
    records = {kind: run.parent(kind, command_of(run, kind)) for kind in stages_of(run)}
    check_lineage(run, records)
    roles = [role for role in ("teacher", "student", "control") if role in records]
    evaluation, exported = records["evaluation"].payload, records["export"]
    hours: dict[str, float] = {
        role: records[role].timing["train_seconds"] / 3600
        for role in roles
        if "train_seconds" in records[role].timing
    }
    hours["student"] += earlier_seconds(run) / 3600
    curves = {r: records[r].timing["rows"] for r in roles if "rows" in records[r].timing}
    if is_ensemble(run):  # whose teachers are trained one after the other, each with a curve
        curves.pop("teacher", None)
        seconds = [records[role].timing.get("train_seconds", 0.0) for role in run.teachers]
        hours |= {"teacher": sum(seconds) / 3600} if any(seconds) else {}
    latency, memory = exported.timing["latency"], exported.timing["memory"]
    split, student = records["split"].payload, records["student"]
    values = {
        "run_name": run.recipe.name,
        "created": records["evaluation"].created,
        "seed": run.recipe.seed,
        "recipe": run.asked.model_dump(mode="json"),
        "recipe_hash": run.recipe_hash,
        "versions": student.versions,
        "hardware": student.hardware,
        "data": data_values(run, split),
        "models": {role: model_facts(run, role, evaluation, exported) for role in roles},
        "metrics": evaluation["metrics"],
        "curves": curves,
        "parity": exported.payload["parity"],
        "measurements": latency["measurements"],
        "peak_memory_bytes": memory["peak_memory_bytes"],
        "baseline_memory_bytes": memory["baseline_memory_bytes"],
        "budget": budget_rows(run, records, hours),
        "mistakes": evaluation["mistakes"],
        "stages": chain_stages(run)
        + [
            {
                "name": kind,
                "seconds": record.timing.get("stage_seconds", 0.0),
                "reused": kind in run.reused,
            }
            for kind, record in records.items()
        ],
        "training_hours": hours,
        "student_vs_control": evaluation["paired"],
        "teacher_confidence": student.payload["teacher_confidence"],
        "lineage": lineage(run),
        "members": evaluation["members"],
        "exits": exit_values(records["exits"]) if "exits" in records else None,
        "compression": compression_values(run, artifact_budgets(run)),
        "sensitivity": sensitivity_values(run),
        "beside": [row for row in student.payload.get("beside", []) if row["name"] not in roles],
    }
    return RunResults.from_values(values)


def stages_of(run: Run) -> list[str]:
    """Return the stages that the run's recipe asks for."""
    is_tuned = run.recipe.finetuning is not None
    there = {
        "teacher": bool(run.teachers),
        "labels": run.stores_outputs,
        "student-untuned": is_tuned,
        "control-untuned": is_tuned and run.recipe.control,
        "control": run.recipe.control,
        "exits": run.recipe.exits is not None,
    }
    kinds = [kind for kind in COMMANDS if there.get(kind, True)]
    # An ensemble's further teachers are stages beside the first.
    further, place = list(run.teachers)[1:], kinds.index("split") + 2
    return [*kinds[:place], *further, *kinds[place:]]


def command_of(run: Run, kind: str) -> str:
    """Return the command that makes a stage's record."""
    if kind == "teacher" and trains_teacher(run):
        return "train"
    return "teach" if kind in run.teachers else COMMANDS[kind]


def check_lineage(run: Run, records: Mapping[str, Record]) -> None:
    """Refuse records of which one was made from an earlier state of another."""
    stale = [
        (kind, parent)
        for kind, record in records.items()
        for parent, known_hash in record.parents.items()
        if parent in records and records[parent].hash != known_hash
    ]
    if stale:
        raise InputError(
            *(
                problem(
                    f"{run.folder}: the {kind} was made from an earlier {parent}",
                    expected="records that belong together",
                    mend=f"Run `understudy {command_of(run, kind)} {run.folder}`, "
                    "or `understudy distill` for all stages.",
                )
                for kind, parent in stale
            )
        )


def data_values(run: Run, split: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of the data, and where it lies: that is in no record."""
    return {**split, "source": run.recipe.data.source, "num_skipped": num_skipped(split)}


def num_skipped(split: dict[str, Any]) -> int:
    """Return how many rows were left out because something is wrong with them."""
    return len({(issue["split"], issue["row"]) for issue in split["issues"] if issue["row"] >= 0})


def model_facts(
    run: Run, role: str, evaluation: dict[str, Any], exported: Record
) -> dict[str, Any]:
    """Return name and costs of one network; only the student has an exported file."""
    name = teacher_name(run) if role == "teacher" else model_section(run, role).name
    cost = evaluation["costs"][role] or {}
    facts = {name: cost.get(name) for name in COST_FIELDS}
    file_bytes = exported.payload["facts"]["size_bytes"] if role == "student" else None
    return {"name": name, **facts, "file_bytes": file_bytes}


def budget_rows(
    run: Run, records: dict[str, Record], hours: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return one row for each limit of the budget, after a release also for its device's."""
    exported, cost = records["export"], records["evaluation"].payload["costs"]["student"]
    facts = BudgetFacts(
        num_params=cost["num_params"],
        macs=cost["macs"],
        model_size_bytes=exported.payload["facts"]["size_bytes"],
        measurements=exported.timing["latency"]["measurements"],
        peak_memory_bytes=exported.timing["memory"]["peak_memory_bytes"],
        train_hours=hours["student"],
    )
    found = {row.name: row.to_json() for row in check_budget(run.recipe.budget, facts=facts)}
    # After a release the limits are those of what ships.
    found |= compressed_budget(run) | shipped_budget(run)
    rows = [found[name] for name in BUDGET_UNITS if name in found]
    for row in rows:
        if row["name"] == "train_hours" and run.derived_from is not None:
            row["detail"] += ", all steps of the chain together"
        if row["name"] == "train_hours" and roles_beside(run):
            row["detail"] += ", with what was trained beside it"
    return rows
