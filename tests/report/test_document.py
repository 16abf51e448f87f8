"""Documents of chapters: what is written is shown, escaped, in both forms."""

from understudy.report.charts import Chart
from understudy.report.document import (
    Chapter,
    Document,
    Grid,
    document_html,
    document_markdown,
    write_document,
)


def document(*parts, **changes):
    values = {
        "eyebrow": "test",
        "title": "A & B <i>",
        "headline": "It <b>works</b>.",
        "facts": ("seed 0", "<digits>"),
        "chapters": (Chapter("What, and <why>", parts),),
    } | changes
    return Document(**values)


GRID = Grid("How it was <found>.", ("Name", "Words", "Figure"), (("x|y", "a b", "1"),), texts=(1,))
CHART = Chart("c", "Curve", "Over epochs.", {"data": [], "layout": {"t": "</script>"}})


def test_text_cannot_become_markup():
    page = document_html(document("A <u>paragraph</u>.", ("one <li>", "two"), GRID, CHART))
    for raw in ("<i>", "<b>works", "<u>", "<digits>", "<found>", "<why>", "one <li>"):
        assert raw not in page
    assert "A &amp; B &lt;i&gt;" in page
    assert '"t":"\\u003c/script\\u003e"' in page


def test_figures_are_flush_right_and_words_are_not():
    page = document_html(document(GRID))
    assert '<td class="number">1</td>' in page
    assert "<td>a b</td>" in page
    assert '<th scope="row">x|y</th>' in page


def test_a_page_without_charts_has_no_scripts():
    plain, drawn = document_html(document("text")), document_html(document(CHART))
    assert "<script" not in plain
    assert "script-src &#39;none&#39;" in plain or "script-src 'none'" in plain
    assert 'data-chart="c"' in drawn
    assert len(plain) < 100_000 < len(drawn)


def test_markdown_has_the_same(tmp_path):
    text = document_markdown(document("A paragraph.", ("one", "two"), GRID, CHART))
    assert "| x\\|y | a b | 1 |" in text
    assert "| --- | --- | ---: |" in text
    assert "- one\n- two" in text
    assert "*Curve* (chart in the HTML page)" in text
    page = write_document(document("A paragraph."), tmp_path, "found")
    assert page == tmp_path / "found.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.html", "found.md"]


def test_chapters_have_anchors_that_links_can_name():
    page = document_html(document("text"))
    assert 'href="#what--and--why"' in page
    assert 'id="what--and--why"' in page
