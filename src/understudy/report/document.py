"""A document of sections, tables and charts, as one self-contained HTML page and as Markdown.

Searches and reproductions tell different stories in the same form: this is the form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from understudy.artifacts import write_text
from understudy.report.charts import Chart
from understudy.report.formats import moment
from understudy.report.render import environment, packed_plotly, script_hash, template_text
from understudy.runtime import hardware_facts


@dataclass(frozen=True)
class Grid:
    """A table: the first column names the row; all others are flush right unless ``texts``.

    Attributes:
        caption: what the figures are and how they were found.
        texts: numbers of the columns that hold words.
    """

    caption: str
    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[int, ...] = ()


Part = str | tuple[str, ...] | Grid | Chart


@dataclass(frozen=True)
class Chapter:
    """A part of a document: its title and, in order, paragraphs, lists, tables and charts."""

    title: str
    parts: tuple[Part, ...]

    @property
    def anchor(self) -> str:
        """The title as an identifier."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    """A whole document.

    Attributes:
        eyebrow: what kind of document it is.
        headline: the answer, in a sentence.
        facts: date, seed, data, machine: shown below the title.
        kind: good, bad or open: how the headline is coloured.
    """

    eyebrow: str
    title: str
    headline: str
    facts: tuple[str, ...]
    chapters: tuple[Chapter, ...]
    kind: str = "good"


def run_facts(seed: int, source: str) -> tuple[str, ...]:
    """Return now, seed, data and machine, to stand below a document's title."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    machine = str(hardware_facts().get("processor", "an unrecorded machine"))
    return moment(now), f"seed {seed}", source, machine


def write_document(document: Document, folder: Path, name: str) -> Path:
    """Write NAME.html and NAME.md, each atomically; return the page's path."""
    page = folder / f"{name}.html"
    write_text(page, document_html(document))
    write_text(folder / f"{name}.md", document_markdown(document))
    return page


def document_html(document: Document) -> str:
    """Return the page as text."""
    charts = [part for part in all_parts(document) if isinstance(part, Chart)]
    script, packed = template_text("report.js"), packed_plotly() if charts else None
    hashes = f"{script_hash(script)} {packed.hash}" if packed else "'none'"
    context = {
        "document": document,
        "kind_of": kind_of,
        "style": template_text("style.css"),
        "script": script,
        "plotly_base64": packed.base64 if packed else "",
        "script_hashes": hashes,
    }
    return environment(autoescape=True).get_template("document.html.j2").render(context)


def document_markdown(document: Document) -> str:
    """Return the document as Markdown; charts are named by what they show."""
    lines = [f"# {document.title}", "", document.headline, "", ", ".join(document.facts) + "."]
    for chapter in document.chapters:
        lines += ["", f"## {chapter.title}"]
        for part in chapter.parts:
            lines += ["", *markdown_lines(part)]
    return "\n".join(lines) + "\n"


def markdown_lines(part: Part) -> list[str]:
    """Return one part as lines of Markdown."""
    if isinstance(part, str):
        return [part]
    if isinstance(part, tuple):
        return [f"- {item}" for item in part]
    if isinstance(part, Chart):
        return [f"*{part.title}* (chart in the HTML page). {part.description}"]
    rules = ["---", *("---" if k in part.texts else "---:" for k in range(1, len(part.titles)))]
    rows = [part.titles, tuple(rules), *part.rows]
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*body, "", part.caption]


def all_parts(document: Document) -> Sequence[Part]:
    """Return the parts of all chapters."""
    return [part for chapter in document.chapters for part in chapter.parts]


def kind_of(part: Part) -> str:
    """Return which kind of part this is, for the template."""
    if isinstance(part, str):
        return "paragraph"
    if isinstance(part, tuple):
        return "list"
    return "grid" if isinstance(part, Grid) else "chart"
