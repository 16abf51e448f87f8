"""The release: compression, files for every target, the budget of each, and one package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from understudy.errors import InputError, MissingExtraError
from understudy.evaluate.browser import find_browser
from understudy.export.target_names import TARGET_MODULES, TARGETS
from understudy.package.manifest import check_class_names
from understudy.package.placing import check_package_path
from understudy.package.writing import write_package
from understudy.progress import log
from understudy.recipes.artifact_budget import artifact_budgets
from understudy.recipes.artifacts import artifact_of, failed_artifacts, make_artifacts
from understudy.recipes.check import problems_of
from understudy.recipes.compress import check_compression, compress
from understudy.recipes.package_contents import package_contents
from understudy.recipes.report import Outcome, report
from understudy.recipes.run import Run


@dataclass(frozen=True)
class Release:
    """What a release came to.

    Attributes:
        outcome: the run's report, with compression and every artifact in it.
        package: the folder or zip that ships; None where the budget is missed or a target failed.
        budget_missed: an artifact does not keep a limit, or with a strict budget was not measured.
        failed: the targets of which nothing could be made, as "tflite/int8", and why.
    """

    outcome: Outcome
    package: Path | None
    budget_missed: bool
    failed: Mapping[str, str] = field(default_factory=dict)


def check_release(run: Run, path: Path) -> None:
    """Raise one InputError with everything that is sure to fail later: to be known at once."""
    names = dict.fromkeys(text.partition("/")[0] for text in run.recipe.release.targets)
    problems = problems_of(lambda: check_package_path(path, overwrite=True))
    problems += problems_of(lambda: check_compression(run))
    problems += problems_of(lambda: check_class_names(run.source.class_names))
    for name in names:
        for module, package in TARGET_MODULES.get(name, {}).items():
            if find_spec(module) is None:
                problems += MissingExtraError(package, TARGETS[name]).problems
    if "web" in names:
        from understudy.export.targets.web import check_runtime

        problems += problems_of(find_browser) + problems_of(check_runtime)
    if problems:
        raise InputError(*dict.fromkeys(problems))


def release(run: Run, path: Path, *, skip_failed: bool = False) -> Release:
    """Compress, export, prove, measure and pack the student of a run that was evaluated.

    The package is written where every target was made and every artifact keeps the budget;
    otherwise the artifacts stay in the run folder and the report says what failed or is over.

    Args:
        path: a folder, or a file ending in ``.zip``.
        skip_failed: pack what was made without the targets that failed, unless all did.
    """
    compressed = compress(run)
    records = make_artifacts(run, compressed)
    rows = artifact_budgets(run)
    outcome = report(run)
    found = failed_artifacts(run, compressed)
    failed = {f"{name}/{precision}": reason for (name, precision), reason in found.items()}
    missed = any(row.status == "failed" for found in rows.values() for row in found)
    if missed:
        log.warning("the budget is missed: nothing is packed; see %s", outcome.page)
    if missed or not records or (failed and not skip_failed):
        return Release(outcome, None, missed, failed)
    if failed:
        log.warning("packed without what was not made: %s", ", ".join(failed))
    write_package(
        path,
        [artifact_of(run, record) for record in records],
        package_contents(run, records, rows, failed),
        overwrite=True,
    )
    log.info("package: %s", path)
    return Release(outcome, path, False, failed)
