"""`understudy doctor` against the project's own list of extras."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from understudy.recipes import doctor

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def declared():
    """Extra to the names of what it asks for, as the project declares it."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    return {
        extra: [re.match(r"[\w.-]+", text)[0] for text in texts]
        for extra, texts in project["optional-dependencies"].items()
    }


def test_every_extra_is_listed_with_its_packages(declared):
    known = doctor.extras()
    assert set(known) == set(declared)
    for extra, names in declared.items():
        assert set(names) - {"understudy"} <= set(known[extra])
    assert set(known["tflm"]) == {"tflite-micro", *known["tflite"]}
    inside = ("c", "compress", "coreml", "executorch", "ncnn", "openvino", "tflm", "web")
    assert set(known["edge"]) == {name for extra in inside for name in known[extra]}


def test_what_is_installed_has_its_version_and_what_is_not_a_command(monkeypatch):
    def version(name):
        if name in ("ncnn", "pnnx"):
            raise metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(doctor.metadata, "version", version)
    lines = doctor.describe().partition("Extras\n")[2].splitlines()
    (ncnn,) = [line for line in lines if line.split()[:1] == ["ncnn"]]
    assert ncnn.split(maxsplit=1)[1] == 'ncnn, pnnx missing: pip install "understudy[ncnn]"'
    (compress,) = [line for line in lines if line.split()[:1] == ["compress"]]
    assert compress.split(maxsplit=1)[1] == "torch-pruning 1.2, torchao 1.2"
    (edge,) = [line for line in lines if line.split()[:1] == ["edge"]]
    assert "openvino 1.2" in edge
    assert edge.endswith('ncnn, pnnx missing: pip install "understudy[edge]"')


def test_a_tool_is_named_with_its_place_or_its_package(monkeypatch):
    places = {"google-chrome": "/opt/chrome"}
    monkeypatch.setattr(doctor.shutil, "which", places.get)
    lines = doctor.describe().partition("Tools\n")[2].splitlines()
    assert any(line.endswith(" /opt/chrome") for line in lines)
    missing = "arm-none-eabi-gcc missing: apt install gcc-arm-none-eabi"
    assert any(line.endswith(f" {missing}") for line in lines)
