"""A page that does not answer as the network does: the error says where to look."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from understudy.errors import ParityError
from understudy.export.parity import model_logits
from understudy.export.target import find_target
from understudy.recipes import web_artifact
from understudy.recipes.compressed import Network, export_source
from understudy.recipes.job import open_run


@pytest.fixture
def page(unbroken, tmp_path, monkeypatch):
    """The run, its source and the network file of a page; ``answer`` is what a browser says."""
    monkeypatch.setenv("UNDERSTUDY_HOME", str(unbroken.home))
    run = open_run(unbroken.folder)
    source = export_source(run, Network())
    exported = find_target("onnx").export(source, tmp_path, precision="float32")
    artifact = dataclasses.replace(exported, target="web", files=("index.html", *exported.files))
    logits_NK = model_logits(source.model, run.source.images(run.splits.test))

    def answer(logits_NK):
        names = (f"latency_p{share}_ms" for share in (50, 95, 99))
        times = dict.fromkeys((*names, "load_ms"), 1.0)
        found = SimpleNamespace(logits_NK=logits_NK.numpy(), num_runs=1, browser="none", **times)
        monkeypatch.setattr(web_artifact, "run_in_browser", lambda *_: found)

    return SimpleNamespace(
        run=run, source=source, artifact=artifact, logits_NK=logits_NK, answer=answer
    )


def test_a_page_that_agrees_is_taken(page):
    page.answer(page.logits_NK)
    logits_NK, parity, timing = web_artifact.in_browser(page.run, page.source, page.artifact)
    assert torch.equal(logits_NK, page.logits_NK)
    assert parity.passed
    assert timing["browser"]["num_runs"] == 1
    assert timing["browser"]["p99_ms"] == 1.0


def test_a_page_must_agree_on_pictures_of_the_whole_split(page):
    export = page.run.recipe.export.model_copy(update={"num_parity_images": 20})
    page.run.recipe = page.run.recipe.model_copy(update={"export": export})
    wrong_NK = page.logits_NK.clone()
    wrong_NK[len(wrong_NK) // 2 :] += 0.5
    page.answer(wrong_NK)
    with pytest.raises(ParityError, match=r"differs from the trained model by up to 0\.5"):
        web_artifact.in_browser(page.run, page.source, page.artifact)


def test_a_sound_file_points_at_the_browser(page):
    page.answer(page.logits_NK + 0.5)
    with pytest.raises(ParityError) as caught:
        web_artifact.in_browser(page.run, page.source, page.artifact)
    text = str(caught.value)
    assert "(web, float32) differs from the trained model by up to 0.5" in text
    assert "student.onnx itself passes in ONNX Runtime here" in text
    assert "expected the fault in the browser or in onnxruntime-web" in text


def test_a_file_that_differs_too_is_named_with_what_is_known_of_its_layers(page):
    other = export_source(page.run, Network())
    with torch.no_grad():
        for value in other.model.parameters():
            value.mul_(1.5)
    find_target("onnx").export(other, page.artifact.folder, precision="float32")
    page.answer(page.logits_NK + 0.5)
    with pytest.raises(ParityError) as caught:
        web_artifact.in_browser(page.run, page.source, page.artifact)
    text = str(caught.value)
    assert "the page's student.onnx itself is at fault: onnx/float32 differs" in text
    assert "layer" in text
    assert "passes" not in text
