"""A whole tiny run, and the process that runs commands without paying for imports each time."""

import shutil

import pytest

from tiny_run import TINY_RECIPE, TinyRun
from warm_process import WarmProcess


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """The real command line, in forked children of a process that has imported everything."""
    process = WarmProcess(tmp_path_factory.mktemp("commands"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory):
    """The path of a recipe that runs in a few seconds from data to report."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def unbroken(warm, tiny_recipe, tmp_path_factory):
    """The finished run of the tiny recipe. Tests only read it; see ``copied``."""
    folder = tmp_path_factory.mktemp("unbroken")
    run = TinyRun(folder / "run", folder / "home")
    finished = warm.run("distill", tiny_recipe, "--out", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    return run


@pytest.fixture
def copied(unbroken, tmp_path):
    """A copy of the finished run and its store, to be damaged."""
    run = TinyRun(tmp_path / "run", tmp_path / "home")
    shutil.copytree(unbroken.folder, run.folder)
    shutil.copytree(unbroken.home, run.home)
    return run


@pytest.fixture
def fresh(tmp_path):
    """A run that has not been started, with an empty home."""
    return TinyRun(tmp_path / "run", tmp_path / "home")
