"""The release: compression, files for every target, the budget of each, and one package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from understudy.package.writing import write_package
from understudy.progress import log
from understudy.recipes.artifact_budget import artifact_budgets
from understudy.recipes.artifacts import artifact_of, make_artifacts
from understudy.recipes.compress import compress
from understudy.recipes.package_contents import package_contents
from understudy.recipes.report import Outcome, report
from understudy.recipes.run import Run


@dataclass(frozen=True)
class Release:
    """What a release came to.

    Attributes:
        outcome: the run's report, with compression and every artifact in it.
        package: the folder or zip that ships; None where the budget is missed.
        budget_missed: an artifact does not keep a limit, or with a strict budget was not measured.
    """

    outcome: Outcome
    package: Path | None
    budget_missed: bool


def release(run: Run, path: Path) -> Release:
    """Compress, export, prove, measure and pack the student of a run that was evaluated.

    The package is written where every artifact keeps the budget; otherwise the artifacts stay in
    the run folder and the report says what is over.

    Args:
        path: a folder, or a file ending in ``.zip``.
    """
    records = make_artifacts(run, compress(run))
    rows = artifact_budgets(run)
    outcome = report(run)
    missed = any(row.status == "failed" for found in rows.values() for row in found)
    if missed:
        log.warning("the budget is missed: nothing is packed; see %s", outcome.page)
        return Release(outcome, None, True)
    write_package(
        path,
        [artifact_of(run, record) for record in records],
        package_contents(run, records, rows),
        overwrite=True,
    )
    log.info("package: %s", path)
    return Release(outcome, path, False)
