"""The written report: self-contained, escaped, complete, atomic."""

from __future__ import annotations

import html.parser
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from understudy.report import render
from understudy.report.charts import all_charts
from understudy.report.checks import run_checks
from understudy.report.render import render_html, render_markdown, script_json, write_report
from understudy.report.results import RunResults

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
NOT_A_NUMBER = re.compile(r"\b(NaN|nan|Infinity|inf|None|undefined)\b")


class Page(html.parser.HTMLParser):
    """The page's visible text, elements, and JSON islands."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.islands: dict[str, Any] = {}
        self._inside: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.text.append(data)
        elif self._inside.get("type") == "application/json":
            self.islands[str(self._inside["id"])] = json.loads(data)


def page_of(results: RunResults) -> Page:
    return Page(render_html(results, run_checks(results)))


@pytest.fixture
def hostile(values: dict[str, Any]) -> RunResults:
    """Results in which everything that a user names is an attack."""
    names = [f"{HOSTILE}{k}" for k in range(10)]
    names[1] = "<b>bold</b>"
    values["data"] |= {"class_names": names, "source": HOSTILE, "fingerprint": HOSTILE}
    values["data"]["issues"] = [{"kind": HOSTILE, "row": 1, "split": HOSTILE, "message": HOSTILE}]
    values["run_name"] = values["recipe_hash"] = values["created"] = HOSTILE
    values["recipe"] = {"data": {"path": HOSTILE}}
    values["hardware"] = {"processor": HOSTILE, HOSTILE: HOSTILE}
    values["versions"] = {"understudy": HOSTILE, HOSTILE: "1"}
    for model in values["models"].values():
        model["name"] = HOSTILE
    values["budget"][0] |= {"name": HOSTILE, "detail": HOSTILE, "unit": HOSTILE}
    values["stages"][0]["name"] = HOSTILE
    for row in values["curves"]["student"]:
        row["losses"][HOSTILE] = 0.1
    return RunResults.from_values(values)


def test_files_are_written_and_hold_the_same_results(results: RunResults, tmp_path: Path) -> None:
    files = write_report(results, tmp_path / "report")
    assert sorted(p.name for p in files.html.parent.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    report = json.loads(files.json.read_text())
    assert RunResults.from_values(report["results"]) == results
    assert report["verdicts"] == [asdict(verdict) for verdict in run_checks(results)]
    assert files.html.stat().st_size < 2_500_000


def test_a_failed_write_leaves_the_old_report(
    results: RunResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(results, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(OSError):
        write_report(results, tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_page_refers_to_nothing_outside(results: RunResults) -> None:
    for _, attributes in page_of(results).tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), value
        assert not [name for name in attributes if name.startswith("on")]


def test_hostile_names_stay_text(hostile: RunResults) -> None:
    text = render_html(hostile, run_checks(hostile))
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    plain = page_of(RunResults.from_values(hostile.to_values() | {"run_name": "x"}))
    assert tags.count("script") == [tag for tag, _ in plain.tags].count("script")
    assert "<script>window.hacked" not in text
    assert "<img src=x" not in text
    assert "<b>bold</b>" not in text
    assert HOSTILE in "".join(page.text)
    labels = page.islands["chart-classes"]["layout"]
    names = (labels["xaxis"].get("ticktext") or labels["yaxis"]["ticktext"])[1]
    assert names == "&lt;b&gt;bold&lt;/b&gt;"
    assert len(page.islands) == len(all_charts(hostile))


def test_script_json_cannot_close_its_element() -> None:
    text = script_json({"name": "</script><!--&\u2028"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"name": "</script><!--&\u2028"}


def test_hostile_names_stay_text_in_markdown(hostile: RunResults) -> None:
    text = render_markdown(hostile, run_checks(hostile))
    assert not re.search(r"(?<!\\)<(?!/?script>window)", text.replace(HOSTILE, ""))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) >= 4 for row in rows)


def test_every_role_and_section_is_there(results: RunResults) -> None:
    page = page_of(results)
    identifiers = {attributes.get("id") for _, attributes in page.tags}
    for anchor, _ in render.SECTIONS:
        assert anchor in identifiers
    charts = {"accuracy", "nll", "loss", "terms", "learning-rate", "classes", "calibration"}
    assert set(all_charts(results)) == charts
    text = " ".join("".join(page.text).split())
    for words in ("mlp-64", "Multiply-adds", "Agreement with the teacher", "Fingerprint", "US001"):
        assert words in text


def test_nothing_measured_is_said_plainly(bare_values: dict[str, Any]) -> None:
    results = RunResults.from_values(bare_values)
    text = " ".join("".join(page_of(results).text).split())
    for words in (
        "The recipe states no budget",
        "No control was trained",
        "No training was logged",
        "The student was not evaluated on the test split.",
        "Not measured: no exported file was compared",
        "No pictures of mistakes were kept.",
    ):
        assert words in text
    assert not NOT_A_NUMBER.search(text)
    assert "Parity: not measured." in render_markdown(results, run_checks(results))


def test_perfect_student_has_no_mistakes(values: dict[str, Any]) -> None:
    test = values["metrics"]["student"]["test"]
    counts = values["data"]["class_counts"]["test"]
    test |= {"accuracy": 1.0, "per_class_accuracy": [1.0] * 10, "num_samples": sum(counts)}
    test["confusion"] = [[n if j == k else 0 for j in range(10)] for k, n in enumerate(counts)]
    values["mistakes"] = []
    text = "".join(page_of(RunResults.from_values(values)).text)
    assert "None: the student answers every test image right." in text
    assert "confuses no two classes" in text


def test_no_nan_reaches_a_reader(values: dict[str, Any]) -> None:
    for row in values["curves"]["control"]:
        row["train_loss"] = float("nan")
    values["metrics"]["student"]["test"]["per_class_accuracy"][0] = float("nan")
    results = RunResults.from_values(values)
    page = page_of(results)
    assert not NOT_A_NUMBER.search(" ".join(page.text))
    assert not NOT_A_NUMBER.search(render_markdown(results, run_checks(results)))


@pytest.mark.parametrize("num_classes", [10, 60])
def test_charts_are_valid_plotly_figures(values: dict[str, Any], num_classes: int) -> None:
    grow(values, num_classes)
    charts = all_charts(RunResults.from_values(values))
    assert ("confusion" in charts) == (num_classes > 20)
    for chart in charts.values():
        text = re.sub(r'"@[a-z-]+"', '"#123456"', json.dumps(chart.figure))
        figure = go.Figure(json.loads(text))
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text
        assert chart.description.endswith(".")


def grow(values: dict[str, Any], num_classes: int) -> None:
    """Give the results more classes, all of them empty in the confusion matrix."""
    extra = num_classes - 10
    values["data"]["class_names"] += [f"extra class {k}" for k in range(extra)]
    for counts in values["data"]["class_counts"].values():
        counts += [0] * extra
    for splits in values["metrics"].values():
        for metrics in splits.values():
            metrics["per_class_accuracy"] += [None] * extra
            metrics["confusion"] = [row + [0] * extra for row in metrics["confusion"]]
            metrics["confusion"] += [[0] * num_classes for _ in range(extra)]


def luminance(colour: str) -> float:
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_enough_contrast(theme: str) -> None:
    css = render.template_text("style.css")
    light, _, rest = css.partition("@media (prefers-color-scheme: dark)")
    block = light if theme == "light" else rest.partition("\n}\n")[0]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
    for name in ("ink", "muted", "accent", "good", "bad", "open", "calm"):
        assert contrast(colours[name], colours["surface"]) >= 4.5, name
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    for name in ("good", "bad", "open", "calm"):
        assert contrast(colours[name], colours[f"{name}-soft"]) >= 4.5, name
        assert contrast(colours["ink"], colours[f"{name}-soft"]) >= 7, name
    for name in ("teacher", "student", "control"):
        assert contrast(colours[name], colours["surface"]) >= 3, name
