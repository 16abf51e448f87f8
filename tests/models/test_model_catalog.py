"""Names and arguments are checked without torch, all problems at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from understudy.models.build import NETWORKS
from understudy.models.catalog import CATALOG, check_model


def test_checking_imports_no_torch() -> None:
    code = (
        "import sys; from understudy.models.catalog import check_model; "
        "assert check_model('separable', {}) == []; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_built_in_name_has_a_constructor() -> None:
    assert {name.rstrip("0123456789") for name in CATALOG} == {*NETWORKS, "mlp"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *[(name, {}) for name in CATALOG],
        ("resnet", {"depth": 26, "widths": [4, 8, 8]}),
        ("paper_teacher", {"num_layers": 6, "dropout": 0}),
        ("separable", {"stages": [[8, 1], [16, 2]], "depth": 2, "width": 1.5, "kernel": 5}),
        ("inverted", {"stem": [8, 1], "blocks": [[8, 2, 2, 5]], "squeeze": 4, "head": 0}),
        ("inverted", {"activation": "hardswish"}),
        ("mlp", {"hidden": []}),
        ("my_package.models:make", {"anything": object()}),
        ("timm:resnet18", {}),
        ("transformers:./a/folder", {}),
    ],
)
def test_good_models_have_no_problems(name: str, arguments: dict[str, object]) -> None:
    assert check_model(name, arguments) == []


@pytest.mark.parametrize(
    ("name", "arguments", "texts"),
    [
        ("resnet_20", {}, ["unknown model 'resnet_20' (did you mean 'resnet20'?)"]),
        ("seperable", {}, ["did you mean 'separable'"]),
        ("zzz", {}, ["expected one of resnet,"]),
        ("my module:make", {}, ["malformed model"]),
        ("timm:", {}, ["malformed model"]),
        ("resnet", {"depth": 21}, ["depth=21; expected 6n + 2"]),
        ("resnet20", {"widths": [32, 16, 64]}, ["none smaller than the one before"]),
        (
            "paper_student",
            {"dropout": 1.0, "chanels": 3, "hidden": True},
            ["dropout=1.0", "(did you mean 'channels'?)", "hidden=True"],
        ),
        (
            "inverted",
            {"stem": [8], "blocks": [[8, 1, 1, 4]], "squeeze": -1, "activation": "swish"},
            ["stem=[8]", "the kernel odd", "squeeze=-1", "expected relu or hardswish"],
        ),
        (
            "separable",
            {"stages": [[8]], "kernel": 4, "width": 0, "residual": "yes", "depth": 0},
            ["stages=[[8]]", "kernel=4", "width=0", "residual='yes'", "depth=0"],
        ),
        ("separable", {"stages": []}, ["stages=[]"]),
        ("mlp", {"hidden": [8, -1]}, ["hidden=[8, -1]"]),
    ],
)
def test_all_problems_are_listed_at_once(
    name: str, arguments: dict[str, object], texts: list[str]
) -> None:
    problems = check_model(name, arguments)
    assert len(problems) == len(texts)
    for found, text in zip(problems, texts, strict=True):
        assert text in found
