"""Understudy: teacher-student distillation under a budget, proven on the file that ships.

``understudy.distill`` is the main job; ``understudy.stages`` holds each of its stages alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from understudy.recipes.files import load_recipe
    from understudy.recipes.schema import Recipe
    from understudy.stages import distill

_HOMES = {
    "Recipe": "understudy.recipes.schema",
    "distill": "understudy.stages",
    "load_recipe": "understudy.recipes.files",
}

__all__ = ["Recipe", "distill", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Import a public name where it is used first: ``import understudy`` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'understudy' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
