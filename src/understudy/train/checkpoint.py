"""Checkpoints that hold everything a run depends on, so that a killed run continues bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.artifacts import atomic_path
from understudy.errors import CheckpointError, problem


def random_state() -> dict[str, Any]:
    """Return the state of every random generator of this process, loadable without pickle code."""
    state_of_numpy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = state_of_numpy
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every random generator of this process back to ``state``."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(path: Path, values: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a kill or a full disk leaves the one before intact."""
    with atomic_path(path) as temporary:
        torch.save(values, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ``save_checkpoint``; no code in it is ever run.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged archive
        raise CheckpointError(
            problem(
                f"the training checkpoint {path} cannot be read ({type(error).__name__})",
                expected="an undamaged checkpoint of this package",
                mend="Delete it to train this stage from its start.",
            )
        ) from None
    return values


def clone_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return a copy of a state dict on the CPU that later updates do not change."""
    return {name: value.detach().cpu().clone() for name, value in state.items()}
