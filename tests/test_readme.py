"""The README says what is true: its commands, recipe keys and links exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from understudy.cli import app
from understudy.recipes.files import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = set(typer.main.get_command(app).commands)


def code_blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def shell_lines(page):
    for block in code_blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_command_of_the_readme_exists():
    used = [words[1] for words in shell_lines(ROOT / "README.md") if words[0] == "understudy"]
    assert used
    assert set(used) <= COMMANDS


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    used = {words[1] for words in shell_lines(ROOT / "README.md") if words[0] == "make"}
    assert used == {"demo", "test"}
    for target in used:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_values_that_the_readme_sets_make_a_valid_recipe():
    for words in shell_lines(ROOT / "README.md"):
        changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        if changes:
            recipe = load_recipe("cifar10", changes)
            assert recipe.teacher.checkpoint is not None


def test_the_python_of_the_readme_compiles_and_uses_what_exists():
    (code,) = code_blocks(ROOT / "README.md", "python")
    compile(code, "README.md", "exec")
    import understudy

    for name in re.findall(r"understudy\.(\w+)", code):
        assert name in understudy.__all__
