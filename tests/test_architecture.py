"""The structure that the design promises, read from the source itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import understudy

ROOT = Path(understudy.__file__).parent
# A module imports lower layers and its own package only.
LAYERS = {
    "errors": 0,
    "runtime": 0,
    "artifacts": 0,
    "progress": 0,
    "settings": 0,
    "data": 1,
    "models": 1,
    "teachers": 2,
    "losses": 2,
    "heads": 2,
    "train": 3,
    "compress": 4,
    "export": 4,
    "evaluate": 5,
    "package": 6,
    "report": 6,
    "search": 5,
    "lab": 9,
    "recipes": 8,
    "stages": 8,
    "cli_groups": 10,
    "cli_search": 11,
    "cli_lab": 11,
    "cli": 12,
    "__main__": 13,
}
MODULES = sorted(ROOT.rglob("*.py"))


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_strictly_downwards(path):
    own = part_of(path)
    if own == "__init__":
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "understudy" or len(parts) == 1 or parts[1] == own:
            continue
        # Records and errors are one layer, free of heavy imports; stages is recipes' front.
        same_floor = {own, parts[1]} <= {"errors", "runtime", "artifacts", "progress", "settings"}
        if same_floor or {own, parts[1]} == {"stages", "recipes"}:
            continue
        assert LAYERS[parts[1]] < LAYERS[own], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400, "over 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_the_command_and_recipe_validation_do_not_import_torch():
    code = (
        "import sys, understudy, understudy.cli, understudy.recipes.schema, "
        "understudy.recipes.files, understudy.data.view_spec, understudy.models.catalog; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_surface_is_what_it_was():
    assert understudy.__all__ == ["Recipe", "distill", "load_recipe"]
    from understudy import losses, stages

    assert losses.__all__ == [
        "ContrastMemory",
        "attention_map",
        "attention_transfer",
        "class_prior",
        "class_prior_table",
        "correlation_congruence",
        "crd",
        "cross_entropy",
        "dist",
        "dkd",
        "embedding_alignment",
        "hint",
        "kl",
        "mse_logits",
        "nst",
        "pkt",
        "review",
        "rkd",
        "salient_attention",
        "similarity_preserving",
        "standardized_kl",
        "top_k_kl",
        "vid",
        "vid_variance",
    ]
    assert stages.__all__ == [
        "add_head",
        "compress",
        "design",
        "distill",
        "evaluate",
        "exits",
        "export",
        "label",
        "rank_teachers",
        "release",
        "remove_head",
        "report",
        "search",
        "teach",
        "train",
    ]


def test_the_command_line_is_what_it_was():
    import typer

    from understudy.cli import app

    def surface(command, name=""):
        if hasattr(command, "commands"):
            for inner_name, inner in command.commands.items():
                yield from surface(inner, f"{name} {inner_name}".strip())
        else:
            options = [option for p in command.params for option in p.opts if option[0] == "-"]
            yield name, sorted(set(options) - {"--help"})

    common = ["--out", "--set"]
    assert dict(surface(typer.main.get_command(app))) == {
        "distill": common,
        "resume": [],
        "teach": common,
        "label": common,
        "train": common,
        "evaluate": common,
        "export": common,
        "report": common,
        "doctor": [],
        "compress": ["--out", "--recipe", "--set"],
        "release": ["--device", "--out", "--package", "--set", "--skip-failed", "--target"],
        "predict": ["--artifact", "--json", "--top"],
        "profile": [
            "--against",
            "--batch",
            "--classes",
            "--device",
            "--host",
            "--json",
            "--python",
            "--runtime",
            "--shape",
            "--ssh-option",
            "--threads",
        ],
        "exits": common,
        "design": [
            "--budget",
            "--candidates",
            "--device",
            "--epochs",
            "--factor",
            "--family",
            "--fill",
            "--out",
            "--set",
        ],
        "search": [
            "--objective",
            "--out",
            "--pruner",
            "--sampler",
            "--set",
            "--space",
            "--storage",
            "--trials",
            "--workers",
        ],
        "heads add": ["--label-column", "--set", "--task"],
        "heads list": [],
        "heads remove": ["--task"],
        "lab paper": [
            "--accelerator",
            "--data",
            "--dropout",
            "--epochs",
            "--grid-epochs",
            "--layers",
            "--only",
            "--out",
            "--rates",
            "--seed",
            "--teacher",
            "--threads",
            "--vit",
        ],
        "recipes list": [],
        "recipes show": [],
        "recipes copy": [],
        "teachers rank": ["--json", "--out", "--set"],
        "store list": ["--store"],
        "store verify": ["--repair", "--store"],
        "store gc": ["--dry-run", "--incomplete", "--older-than-days", "--store"],
    }
