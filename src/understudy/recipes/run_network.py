"""The networks of runs and recipes, as files that eager PyTorch runs: to be profiled.

Importing this does not import torch: a machine that only runs files may be without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from understudy.artifacts import RECORD_NAME
from understudy.errors import InputError, problem
from understudy.evaluate.runtime_files import RuntimeFile, recorded_artifact, runtime_file
from understudy.models.catalog import nearest
from understudy.recipes.files import RECIPE_NAME, read_recipe

if TYPE_CHECKING:
    from understudy.recipes.run import Run


def run_network(target: str, folder: Path) -> RuntimeFile | None:
    """Write a file that builds a run's or a recipe's network, and return it with its runtime.

    Args:
        target: a run folder, for its trained student; the folder of a network in it, such as
            ``RUN/teacher``; or a recipe's YAML file, for its student with fresh weights.
        folder: where the file is written.

    Returns:
        None where the target is something else.

    Raises:
        InputError: the recipe is wrong, its data is not there, or the network is not trained yet.
    """
    path = Path(target)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return fresh_student(path, folder)
    if (path / RECIPE_NAME).is_file():
        return trained_network(path, "student", folder)
    if not is_stage(path) or recorded_artifact(path):
        return None
    roles = trained_roles(path.parent)
    if path.name in roles:
        return trained_network(path.parent, path.name, folder)
    if path.exists():  # a folder of files that the run exports
        return None
    raise InputError(
        problem(
            f"{path.parent} has no network '{path.name}'{nearest(path.name, roles)}",
            expected=f"one of {', '.join(roles)}",
            mend="Correct it, or name the run alone for its student.",
        )
    )


def is_stage(path: Path) -> bool:
    """Return whether a path is, or can only be meant as, the folder of a run's stage."""
    if not (path.parent / RECIPE_NAME).is_file() or path.is_file():
        return False
    # A bare word that is not there is the name of a network, whatever lies in this folder.
    return (path / RECORD_NAME).is_file() if path.exists() else len(path.parts) > 1


def opened_run(recipe: Path, folder: Path) -> Run:
    """Return a run without a look at what only its stages need, such as the teacher's file."""
    from understudy.recipes.chain import chained
    from understudy.recipes.check import parse_checked
    from understudy.recipes.run import Run, home_folder

    values, origin = read_recipe(recipe)
    return chained(Run(parse_checked(values, origin=origin), folder, home_folder()))


def trained_roles(run_folder: Path) -> list[str]:
    """Return the networks that a run trains or loads."""
    run = opened_run(run_folder, run_folder)
    return ["student", *(["control"] if run.recipe.control else []), *run.teachers, *run.peers]


def fresh_student(recipe: Path, folder: Path) -> RuntimeFile:
    """Return the student of a recipe as it is built."""
    from understudy.recipes.networks import build_model

    run = opened_run(recipe, folder)
    build_model(run, "student")  # what is wrong with it is told best here
    return written(run, "student", folder, title=recipe.stem, weights=None)


def trained_network(run_folder: Path, role: str, folder: Path) -> RuntimeFile:
    """Return a network of a run with its trained weights; of an ONNX teacher its file."""
    from understudy.recipes.networks import WEIGHTS_NAME, is_onnx, model_section

    run = opened_run(run_folder, run_folder)
    record = run.parent(role, "teach" if role in run.teachers else "train")
    section = model_section(run, role)
    if is_onnx(section):
        return runtime_file(Path(section.name))
    title = f"{run_folder.resolve().name}-{role}"
    return written(run, role, folder, title=title, weights=run_folder / record.kind / WEIGHTS_NAME)


def written(run: Run, role: str, folder: Path, *, title: str, weights: Path | None) -> RuntimeFile:
    """Write the file of a network."""
    from safetensors.torch import load_file

    from understudy.evaluate.eager import write_eager
    from understudy.recipes.networks import conversions, model_section

    section = model_section(run, role)
    path = write_eager(
        folder,
        section.name,
        num_classes=len(run.source.class_names),
        image_shape=run.source.image_shape,
        arguments=section.arguments,
        conversions=conversions(run, role),
        weights=None if weights is None else load_file(weights),
        title=title,
    )
    return runtime_file(path)
