"""The same recipe on a GPU: only ``device.accelerator`` changes."""

import pytest
import torch

import understudy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_recipe_runs_unchanged_on_a_gpu(tiny_recipe, tmp_path, monkeypatch, precision):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    accuracies = {}
    for accelerator in ("cpu", "cuda"):
        changes = [f"device.accelerator={accelerator}", f"training.precision={precision}"]
        outcome = understudy.distill(tiny_recipe, changes=changes, out=tmp_path / accelerator)
        accuracies[accelerator] = outcome.results.test("student").accuracy
    assert accuracies["cuda"] == pytest.approx(accuracies["cpu"], abs=0.1)
