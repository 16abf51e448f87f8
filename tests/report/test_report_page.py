"""The page in headless Chromium: no errors, no requests, no overflow, charts drawn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from understudy.report.render import write_report
from understudy.report.results import RunResults

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(experiment: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = RunResults.from_values(experiment)
    return write_report(results, tmp_path_factory.mktemp("report")).html


def opened(browser: Any, path: Path, *, width: int) -> Any:
    """Open the page, wait until its charts are drawn; ``page.complaints`` lists what went wrong."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("data:", path.as_uri()))
            else page.complaints.append(request.url)
        ),
    )
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-charts=drawn]", timeout=60_000)
    return page


@pytest.fixture(scope="module")
def pages(browser: Any, page_file: Path) -> dict[int, Any]:
    """The open page by width: opening it takes seconds, so the tests share it."""
    return {width: opened(browser, page_file, width=width) for width in (1280, 400)}


@pytest.mark.parametrize("width", [1280, 400])
def test_page_fits_and_draws_quietly(pages: dict[int, Any], width: int) -> None:
    page = pages[width]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    charts = page.query_selector_all("[data-chart]")
    assert len(charts) == 7
    for chart in charts:
        marks = chart.query_selector_all(".main-svg path.js-line, .main-svg .point path")
        assert len(marks) >= 2, chart.get_attribute("data-chart")
        box = chart.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    # Opening the details must not widen the page either.
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert page.complaints == []


def test_charts_follow_the_colour_scheme(pages: dict[int, Any]) -> None:
    page = pages[1280]
    read = "getComputedStyle(document.querySelector('[data-chart] .main-svg')).backgroundColor"
    assert page.evaluate(read) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    for _ in range(100):
        if page.evaluate(read) == "rgb(24, 29, 38)":
            break
        page.wait_for_timeout(50)
    assert page.evaluate(read) == "rgb(24, 29, 38)"
    assert page.complaints == []


def test_every_wide_box_is_reached_by_keyboard(pages: dict[int, Any]) -> None:
    page = pages[400]
    unreachable = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter("
        "(box) => box.tabIndex !== 0 || !box.getAttribute('aria-label')).length"
    )
    assert unreachable == 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("[...document.querySelectorAll('table')].every((t) => t.caption)")
    assert page.evaluate("[...document.images].every((i) => i.alt.length > 0)")


def test_hostile_names_are_shown_and_run_nothing(
    browser: Any, values: dict[str, Any], tmp_path: Path
) -> None:
    values["data"]["class_names"] = [f"{HOSTILE}{k}" for k in range(10)]
    values["data"]["class_names"][1] = "<b>B</b>"
    values["run_name"] = HOSTILE
    page = opened(browser, write_report(RunResults.from_values(values), tmp_path).html, width=400)
    assert page.evaluate("window.hacked === undefined")
    assert page.inner_text("h1") == HOSTILE
    labels = page.evaluate(
        "[...document.querySelectorAll('[data-chart=classes] .ytick text')]"
        ".map((t) => t.textContent)"
    )
    assert labels[1] == "<b>B</b>"
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    # The content security policy is the second fence: a script put in later does not run.
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 2';"
        " document.body.append(s); }"
    )
    assert page.evaluate("window.hacked === undefined")
    page.close()


def test_page_without_scripts_says_so(browser: Any, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert "needs JavaScript" in page.inner_text("[data-chart=accuracy]")
    context.close()
