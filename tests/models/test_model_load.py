"""Checkpoints as people have them: nested, prefixed, foreign, damaged and hostile."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from understudy.errors import CheckpointError
from understudy.models.load import class_order, load_weights, read_state_dict
from understudy.models.resnet import ResNet


def make_network() -> ResNet:
    return ResNet(num_classes=4, depth=8, widths=(2, 4, 4))


@pytest.fixture
def trained() -> dict[str, Tensor]:
    """Weights that no fresh network has."""
    return {
        name: torch.rand_like(value) if value.is_floating_point() else value
        for name, value in make_network().state_dict().items()
    }


def assert_loaded(network: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name]), name


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


LAYOUTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str, str]] = {
    "plain": (lambda w: w, "", ""),
    "akamaster": (
        lambda w: {"state_dict": prefixed(w, "module."), "best_prec1": 9.0},
        "state_dict",
        "module.",
    ),
    "compiled": (lambda w: {"model": prefixed(w, "_orig_mod.")}, "model", "_orig_mod."),
    "both": (
        lambda w: {"net": prefixed(w, "module._orig_mod."), "epoch": 3},
        "net",
        "module._orig_mod.",
    ),
    "lightning": (
        lambda w: {"state_dict": prefixed(w, "model."), "global_step": 1, "callbacks": {}},
        "state_dict",
        "model.",
    ),
    "nested twice": (lambda w: {"model": {"state_dict": w}}, "model.state_dict", ""),
    "averaged": (
        lambda w: {"ema": prefixed(w, "module.") | {"n_averaged": torch.tensor(3)}},
        "ema",
        "module.",
    ),
    "timm": (
        lambda w: {
            "model_state_dict": w,
            "args": argparse.Namespace(lr=0.1),
            "metric": np.float64(0.9),
        },
        "model_state_dict",
        "",
    ),
    "old torch": (
        lambda w: {k: v for k, v in w.items() if not k.endswith("num_batches_tracked")},
        "",
        "",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_understood(layout: str, tmp_path: Path, trained: dict[str, Tensor]) -> None:
    make, entry, prefix = LAYOUTS[layout]
    path = tmp_path / "weights.pth"
    torch.save(make(trained), path)
    network = make_network()
    report = load_weights(network, path)
    assert (report.entry, report.prefix) == (entry, prefix)
    assert_loaded(network, trained)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
def test_pytorch_files(
    suffix: str, zipped: bool, tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(trained, path, _use_new_zipfile_serialization=zipped)
    network = make_network()
    assert load_weights(network, path).num_tensors == len(trained)
    assert_loaded(network, trained)


def test_safetensors(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(prefixed(trained, "module."), path)
    network = make_network()
    assert load_weights(network, path).prefix == "module."
    assert_loaded(network, trained)


def test_half_precision_weights_are_converted(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.pt"
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in trained.items()}, path)
    network = make_network()
    load_weights(network, path)
    assert network.linear.weight.dtype == torch.float32
    torch.testing.assert_close(network.linear.weight, trained["linear.weight"], rtol=0, atol=1e-3)


def test_an_entry_can_be_chosen(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.pt"
    zeros = {name: torch.zeros_like(value) for name, value in trained.items()}
    torch.save({"model": zeros, "ema": {"shadow": trained}}, path)
    network = make_network()
    load_weights(network, path)
    assert_loaded(network, zeros)
    load_weights(network, path, entry="ema.shadow")
    assert_loaded(network, trained)
    with pytest.raises(CheckpointError, match=r"no entry 'emma'; expected one of ema, model"):
        load_weights(network, path, entry="emma")


def test_a_part_named_model_is_not_taken_for_a_prefix(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"model": nn.Linear(2, 2), "head": nn.Linear(2, 2)})

    source, target = make(), make()
    path = tmp_path / "weights.pt"
    torch.save(prefixed(source.state_dict(), "module."), path)
    assert load_weights(target, path).prefix == "module."
    assert_loaded(target, source.state_dict())


def test_every_mismatch_is_listed_at_once_and_nothing_is_loaded(
    tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    path = tmp_path / "weights.pt"
    trained["fc.weight"] = trained.pop("linear.weight")
    trained["conv1.weight"] = torch.zeros(5, 3, 3, 3)
    trained["extra"] = torch.zeros(7)
    torch.save(trained, path)
    network = make_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, path)
    summary, *lines = caught.value.problems
    assert "expected a checkpoint of the same architecture" in summary
    assert {line.split(" (")[0] for line in lines} == {
        "shape: conv1.weight is [5, 3, 3, 3] in the file, [2, 3, 3, 3] in the network",
        "missing: linear.weight [4, 4]",
        "unexpected: extra [7]",
        "unexpected: fc.weight [4, 4]",
    }
    assert "missing: linear.weight [4, 4] (closest of this shape: fc.weight)" in lines
    assert_loaded(network, before)


def test_a_long_list_is_cut_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(ResNet(num_classes=4, depth=14, widths=(2, 4, 4)).state_dict(), path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(make_network(), path)
    assert len(caught.value.problems) == 22
    assert "0 missing, 30 unexpected and 0 of another shape in all; 10 more" in str(caught.value)


def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    path = tmp_path / "weights.pt"
    trained["linear.bias"][1] = float("nan")
    torch.save(trained, path)
    with pytest.raises(CheckpointError, match=r"not finite: linear\.bias \[4\]"):
        load_weights(make_network(), path)


class Hostile:
    """Unpickling it makes a file: proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_hostile_pickle_is_refused_and_runs_nothing(
    form: str, tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "was_here"
    content = {"state_dict": trained, "payload": Hostile(mark)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"payload": Hostile(mark)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"refused and nothing in it was run: .*mkdir"):
        read_state_dict(path)
    assert not mark.exists()


def test_an_unknown_pickle_protocol_is_no_invitation(tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "was_here"
    path.write_bytes(pickle.dumps(Hostile(mark), protocol=4))
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert "weights_only" not in str(caught.value)
    assert not mark.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(make_network(), path)
    with pytest.raises(CheckpointError, match=r"refused .*ResNet.*network\.state_dict\(\)"):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files_are_errors(
    suffix: str, kept: float, tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(trained, path)
    else:
        save_file(trained, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match="cannot be read as a"):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_foreign_files_are_errors(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"<!doctype html><title>404 Not Found</title>" * 20)
    with pytest.raises(CheckpointError, match="cannot be read as a"):
        read_state_dict(path)


def test_unusable_paths_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint file"):
        read_state_dict(tmp_path / "none.pt")
    (tmp_path / "weights.h5").touch()
    with pytest.raises(CheckpointError, match=r"ends in '\.h5'; expected one of \.safetensors"):
        read_state_dict(tmp_path / "weights.h5")
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="holds no weights but a mapping of epoch, optimizer"):
        read_state_dict(tmp_path / "empty.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="holds no weights but Tensor"):
        read_state_dict(tmp_path / "tensor.pt")


def test_class_order() -> None:
    assert class_order(["cat", "dog", "ant"], ["ant", "cat", "dog"]) == (2, 0, 1)
    assert class_order(["a", "b"], ["a", "b"]) is None
    assert class_order(["Sea lion", "OX"], ["ox", "sea_lion"]) == (1, 0)


def test_different_classes_are_listed() -> None:
    with pytest.raises(CheckpointError) as caught:
        class_order(["cat", "dog", "dog"], ["cat", "ship", "frog"])
    assert "the teacher names classes twice: dog" in caught.value.problems[0]
    assert "only the teacher has: dog, dog; only the data has: ship, frog" in str(caught.value)
