"""The report: one self-contained HTML page, with the same results as JSON and Markdown.

The page opens from disk. It makes no request: scripts, styles and pictures are inside, and its
content security policy forbids everything else, scripts with other hashes included.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from understudy.artifacts import write_json, write_text
from understudy.report import formats, tables
from understudy.report.charts import MAX_TABLE_CLASSES, all_charts
from understudy.report.checks import Verdict, run_checks
from understudy.report.compression_views import compression_context
from understudy.report.exit_curve import EXIT_COLUMNS, exit_charts, exit_rows, exit_sentence
from understudy.report.results import RESULTS_SCHEMA_VERSION, ROLES, RunResults
from understudy.report.sensitivity import sensitivity_context
from understudy.report.views import confusion_cells, epoch_table, hardware_facts, tiles

SECTIONS = (
    ("budget", "Budget"),
    ("checks", "Checks"),
    ("comparison", "Comparison"),
    ("learning", "Learning"),
    ("classes", "Classes"),
    ("calibration", "Calibration"),
    ("mistakes", "Mistakes"),
    ("export", "Exported file"),
    ("data", "Data"),
    ("provenance", "Provenance"),
)
SIGNS = {
    "passed": "✓",
    "failed": "✕",
    "issue": "✕",
    "tip": "!",
    "not_measured": "?",
    "skipped": "?",
    "not_applicable": "\u2013",
}
SMALL_IMAGE_PIXELS = 96


@dataclass(frozen=True)
class ReportFiles:
    """Where the report was written."""

    html: Path
    json: Path
    markdown: Path


def write_report(results: RunResults, folder: Path) -> ReportFiles:
    """Write report.html, report.json and report.md into ``folder``, each atomically."""
    verdicts = run_checks(results)
    files = ReportFiles(folder / "report.html", folder / "report.json", folder / "report.md")
    write_json(files.json, report_values(results, verdicts))
    write_text(files.markdown, render_markdown(results, verdicts))
    write_text(files.html, render_html(results, verdicts))
    return files


def report_values(results: RunResults, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return what report.json holds: the verdicts, then the results they were made from."""
    return {
        "schema_version": RESULTS_SCHEMA_VERSION,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "results": results.to_values(),
    }


def render_html(results: RunResults, verdicts: Sequence[Verdict]) -> str:
    """Return the page as text."""
    script = template_text("report.js")
    packed = packed_plotly()
    context = shared_context(results, verdicts) | {
        "style": template_text("style.css"),
        "script": script,
        "plotly_base64": packed.base64,
        "script_hashes": f"{script_hash(script)} {packed.hash}",
        "charts": all_charts(results) | exit_charts(results),
        "sections": sections_of(results),
        "signs": SIGNS,
        "roles": ROLES,
    }
    return environment(autoescape=True).get_template("page.html.j2").render(context)


def sections_of(results: RunResults) -> list[tuple[str, str]]:
    """Return the page's sections: those of every run, early exits, compression and release."""
    sections = list(SECTIONS)
    if results.exits is not None:
        place = sections.index(("export", "Exported file")) + 1
        sections.insert(place, ("exits", "Early exits"))
    if results.compression is not None:
        sections.insert(sections.index(("data", "Data")), ("compression", "Release"))
    return sections


def render_markdown(results: RunResults, verdicts: Sequence[Verdict]) -> str:
    """Return the report as Markdown."""
    text = environment(autoescape=False).get_template("report.md.j2")
    return text.render(shared_context(results, verdicts)).rstrip() + "\n"


def shared_context(results: RunResults, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return what both templates show."""
    student = results.test("student")
    quiet = [verdict for verdict in verdicts if verdict.status not in ("issue", "tip")]
    num_wrong = round((1 - student.accuracy) * student.num_samples) if student else 0
    _, height, width = results.data.image_shape
    return {
        "results": results,
        "created": formats.moment(results.created),
        "verdicts": verdicts,
        "raised": sorted(
            (v for v in verdicts if v.status in ("issue", "tip")), key=lambda v: v.status
        ),
        "quiet": quiet,
        "quiet_summary": quiet_summary(quiet),
        "head": tables.headline(results, verdicts),
        "tiles": tiles(results),
        "budget": tables.budget_rows(results),
        "comparison": tables.comparison_rows(results),
        "num_test": student.num_samples if student else None,
        "epochs": epoch_table(results),
        "names": results.data.class_names,
        "pairs": tables.confused_pairs(results),
        "confusion": confusion_cells(results, at_most=MAX_TABLE_CLASSES),
        "num_mistakes": num_wrong,
        "student_is_perfect": student is not None and num_wrong == 0,
        "small_images": max(height, width) <= SMALL_IMAGE_PIXELS,
        "hardware": hardware_facts(results),
        "hardware_sentence": ", ".join(value for _, value in hardware_facts(results)[:2])
        or "an unrecorded machine",
        "recipe_yaml": yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True),
        "words": tables.STATUS_WORDS,
        "exit_columns": EXIT_COLUMNS,
        "exit_rows": exit_rows(results),
        "exit_sentence": exit_sentence(results),
        **compression_context(results),
        **sensitivity_context(results.sensitivity),
    }


def quiet_summary(verdicts: Sequence[Verdict]) -> str:
    """Return how many checks passed, were skipped or do not apply."""
    counts: dict[str, int] = {}
    for verdict in verdicts:
        word = tables.STATUS_WORDS[verdict.status]
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{number} {word}" for word, number in counts.items())


def environment(*, autoescape: bool) -> Environment:
    """Return the template environment: an unknown name is an error, not an empty string."""
    made = Environment(
        loader=PackageLoader("understudy.report", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "percent": formats.percent,
        "decimal": formats.decimal,
        "count": formats.count,
        "significant": formats.significant,
        "size": formats.size,
        "duration": formats.duration,
        "milliseconds": formats.milliseconds,
        "script_json": script_json,
        "md": markdown_text,
        "code": lambda text: text.replace("`", "'"),
        "cell": lambda cell: markdown_text(f"{cell.text} {cell.judgement}".strip()),
    }
    return made


def script_json(value: Any) -> Markup:
    """Return JSON that may stand inside a script element whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def markdown_text(text: str) -> str:
    """Return text that Markdown shows as it is, on one line, inside a table cell too."""
    one_line = re.sub(r"[\r\n]+", " ", text)
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", one_line)


def template_text(name: str) -> str:
    """Return a file that the templates include as it is."""
    return resources.files("understudy.report").joinpath("templates", name).read_text("utf-8")


def script_hash(text: str) -> str:
    """Return the content security policy's source expression of one script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@dataclass(frozen=True)
class PackedScript:
    """A script compressed with gzip, in Base64, and the hash of its plain text."""

    base64: str
    hash: str


@cache
def packed_plotly() -> PackedScript:
    """Return Plotly's browser library, as shipped with the Python package."""
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    packed = gzip.compress(text.encode(), mtime=0)
    return PackedScript(base64.b64encode(packed).decode(), script_hash(text))
