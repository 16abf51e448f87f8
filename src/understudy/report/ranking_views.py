"""The ranking of teachers as files, and in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from understudy.artifacts import write_text
from understudy.report.formats import (
    NOT_MEASURED,
    count,
    fixed,
    large_count,
    moment,
    percent,
    plain,
    points,
    significant,
    size,
)
from understudy.report.ranking import CandidateRow, Gap, Ranking
from understudy.report.render import environment, template_text
from understudy.report.summary import aligned

TITLES = (
    "",
    "Network",
    "Teacher",
    "Student",
    "Against control",
    "Images/s",
    "Memory",
    "Parameters",
    "Multiply-adds",
    "Confidence",
)


@dataclass(frozen=True)
class RankingFiles:
    """Where a ranking was written."""

    json: Path
    markdown: Path
    html: Path


def ranking_files(folder: Path) -> RankingFiles:
    """Return the files of a ranking in this folder."""
    return RankingFiles(*(folder / f"ranking.{kind}" for kind in ("json", "md", "html")))


def write_ranking(ranking: Ranking, folder: Path) -> RankingFiles:
    """Write ranking.json, ranking.md and ranking.html, each atomically."""
    files = ranking_files(folder)
    context = {
        "ranking": ranking,
        "titles": TITLES[1:],
        "rows": [(row, cells(row)) for row in ranking.candidates],
        "created": moment(ranking.created),
        "gap_text": gap_text,
        "judgement": judgement,
        "processor": ranking.hardware.get("processor", "an unrecorded machine"),
        "style": template_text("style.css"),
    }
    page = environment(autoescape=True).get_template("ranking.html.j2").render(context)
    text = environment(autoescape=False).get_template("ranking.md.j2").render(context)
    write_text(files.html, page)
    write_text(files.markdown, text.rstrip() + "\n")
    write_text(files.json, ranking.to_json())
    return files


def cells(row: CandidateRow) -> list[str]:
    """Return a candidate's figures as text, in the order of ``TITLES`` after its name."""
    spread = "" if row.student_spread is None else f" ± {fixed(100 * row.student_spread, 2)}"
    return [
        row.model,
        percent(row.teacher_accuracy),
        percent(row.student_accuracy) + spread,
        f"{gap_text(row.against_control)} {judgement(row.against_control)}",
        count(row.throughput.images_per_second),
        NOT_MEASURED if row.memory_growth_bytes is None else size(row.memory_growth_bytes),
        times(large_count(row.num_params), row.params_ratio),
        times(large_count(row.macs), row.macs_ratio),
        fixed(row.confidence, 3),
    ]


def times(text: str, ratio: float | None) -> str:
    """Return a cost, and how many times the student's it is."""
    return text if ratio is None else f"{text} ({significant(ratio, 2)}×)"


def gap_text(gap: Gap) -> str:
    """Return a difference in points, and what chance explains of it."""
    return f"{points(gap.value)} ± {fixed(100 * gap.margin, 2)}"


def judgement(gap: Gap) -> str:
    """Return how a difference is to be read."""
    return "within noise" if gap.is_noise else "better" if gap.value > 0 else "worse"


def ranking_table(ranking: Ranking) -> RenderableType:
    """Return headline, table and reasons for a Rich console."""
    table = Table(title="Teachers, best first", title_justify="left", caption=note(ranking))
    table.caption_justify = "left"
    for title in TITLES:
        table.add_column(title, justify="left" if title in TITLES[:2] else "right")
    for row in ranking.candidates:
        table.add_row(f"{row.place}. {row.name}", *cells(row))
    parts: list[RenderableType] = [Text(ranking.headline, style="bold"), Text(), table]
    for row in ranking.candidates:
        parts += [Text(), Text(f"{row.place}. {row.name}", style="bold")]
        parts += [Text(f"   {sentence}") for sentence in row.reasons]
    parts += [Text(), *(Text(caveat, style="dim") for caveat in ranking.caveats)]
    return Group(*parts)


def ranking_text(ranking: Ranking) -> str:
    """Return the same as plain lines, for logs and files."""
    rows = [[f"{row.place}. {row.name}", *cells(row)] for row in ranking.candidates]
    lines = [ranking.headline, "", *aligned([list(TITLES), *rows]), note(ranking)]
    for row in ranking.candidates:
        lines += ["", f"{row.place}. {row.name}", *(f"   {text}" for text in row.reasons)]
    return plain("\n".join([*lines, "", *ranking.caveats])) + "\n"


def note(ranking: Ranking) -> str:
    """Return how the table is to be read."""
    return (
        f"Student: mean ± standard deviation of {len(ranking.probe.seeds)} probes. Against "
        "control: ± what chance alone explains (95 %). ×: times the student "
        f"({ranking.probe.student}). Memory: what the process grew by."
    )
