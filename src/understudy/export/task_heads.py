"""A trunk and its heads in files of their own, and the runtime that puts them together.

Format of the files (ONNX; metadata keys besides those of ``onnx_file``):
    trunk: input ``images`` float32 [batch, C, H, W] in [0, 1]; output ``embedding`` float32
        [batch, D]; ``understudy.trunk``: SHA-256 of the network's weights
    head: input ``embedding`` float32 [batch, D]; output ``logits`` float32 [batch, K] in the order
        of ``understudy.class_names``; ``understudy.task``: its name; ``understudy.trunk``: the
        trunk that it was trained on
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import InputError, ModelError, problem
from understudy.export.onnx_file import (
    METADATA_PREFIX,
    OnnxFacts,
    portable_copy,
    read_onnx_facts,
    write_onnx,
)
from understudy.export.onnx_run import open_session, run_images
from understudy.export.parity import BATCH_SIZE, DEFAULT_TOLERANCE, NUM_SINGLE_IMAGES, Parity
from understudy.export.target_names import DEFAULT_OPSET
from understudy.heads.tasks import Trunk, trial_images

EMBEDDING_NAME = "embedding"


def export_trunk(
    trunk: Trunk,
    path: Path,
    *,
    image_shape: tuple[int, int, int],
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> OnnxFacts:
    """Write images to embedding, preprocessing included; the same trunk gives the same bytes.

    Raises:
        ModelError, InputError: as ``export_onnx``.
    """
    images = {"name": "images", "dtype": "float32", "layout": "NCHW", "range": [0, 1]}
    entries = {
        "input": json.dumps({**images, "image_shape": list(image_shape)}),
        "output": json.dumps({"name": EMBEDDING_NAME, "dtype": "float32", "layout": "ND"}),
        "trunk": trunk.identity(),
        "version": version("understudy"),
    }
    write_onnx(
        portable_copy(trunk),
        path,
        example=trial_images(image_shape),
        opset=opset,
        entries=entries | dict(metadata or {}),
        output_name=EMBEDDING_NAME,
    )
    return read_onnx_facts(path)


def export_head(
    head: nn.Module,
    path: Path,
    *,
    trunk: Trunk,
    task: str,
    class_names: Iterable[str],
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> OnnxFacts:
    """Write a head: the embedding of this trunk to the logits of one task.

    Raises:
        ModelError: the head does not take the trunk's embedding, or gives another number of logits
            than there are class names; and as ``export_onnx``.
    """
    names, portable = list(class_names), portable_copy(head)
    example_ND = torch.linspace(0, 1, 2 * trunk.width).view(2, trunk.width)
    _check_head(portable, example_ND, num_classes=len(names))
    entries = {
        "class_names": json.dumps(names),
        "input": json.dumps({"name": EMBEDDING_NAME, "dtype": "float32", "layout": "ND"}),
        "output": json.dumps({"name": "logits", "dtype": "float32", "layout": "NK"}),
        "task": task,
        "trunk": trunk.identity(),
        "version": version("understudy"),
    }
    write_onnx(
        portable,
        path,
        example=example_ND,
        opset=opset,
        entries=entries | dict(metadata or {}),
        input_name=EMBEDDING_NAME,
    )
    return read_onnx_facts(path)


def _check_head(head: nn.Module, example_ND: Tensor, *, num_classes: int) -> None:
    expected = (len(example_ND), num_classes)
    try:
        with torch.inference_mode():
            found: Any = tuple(head(example_ND).shape)
    except RuntimeError as error:
        found = f"an error ({error})"
    if found != expected:
        raise ModelError(
            problem(
                f"for embeddings of shape {tuple(example_ND.shape)} the head returns {found}",
                expected=f"logits of shape {expected}, one for each class name",
                mend="Export it with the trunk and the class names that it was trained with.",
            )
        )


class TrunkRuntime:
    """A trunk in ONNX Runtime with the heads of several tasks, which come and go while it runs.

    One pass of the trunk answers all tasks. Adding and removing never disturbs a call of
    ``answers`` that is under way in another thread: it ends with the heads it began with.

    Args:
        path: a file of ``export_trunk``.
        num_threads: None: all cores.

    Raises:
        InputError: the file cannot be read, or is no trunk.
    """

    def __init__(self, path: Path, *, num_threads: int | None = None) -> None:
        self.facts = read_onnx_facts(path)
        if self.facts.output_name != EMBEDDING_NAME or len(self.facts.output_shape) != 2:
            raise InputError(
                problem(
                    f"{path} gives '{self.facts.output_name}' of shape {self.facts.output_shape}",
                    expected=f"a trunk, which gives '{EMBEDDING_NAME}' [batch, D]",
                    mend="Export one with `understudy heads add`.",
                )
            )
        self._num_threads = num_threads
        self._trunk = open_session(path, num_threads=num_threads)
        self._heads: dict[str, tuple[Any, OnnxFacts]] = {}

    @property
    def width(self) -> int | None:
        """D of the embedding; None where the file leaves it open."""
        return self.facts.output_shape[1]

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """The class names of every task there is, in the order of its logits."""
        return {name: facts.class_names or () for name, (_, facts) in self._heads.items()}

    def add_head(self, name: str, path: Path) -> TrunkRuntime:
        """Add the head of a task, or put it in the place of the one with this name.

        Raises:
            InputError: the file cannot be read, takes embeddings of another width, or was trained
                on another trunk. The heads there are stay.
        """
        facts = read_onnx_facts(path)
        problems = self._misfits(path, facts)
        if problems:
            raise InputError(*problems)
        session = open_session(path, num_threads=self._num_threads)
        self._heads = {**self._heads, name: (session, facts)}
        return self

    def remove_head(self, name: str) -> TrunkRuntime:
        """Remove a task.

        Raises:
            InputError: there is none of this name.
        """
        self._check_tasks([name])
        self._heads = {task: head for task, head in self._heads.items() if task != name}
        return self

    def answers(
        self, images_NCHW: Tensor, *, tasks: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Return float32 logits_NK of every task, or of those asked for; the trunk runs once.

        Args:
            images_NCHW: uint8, or float in [0, 1].

        Raises:
            InputError: a task that there is no head for.
        """
        heads = self._heads
        names = list(heads) if tasks is None else list(tasks)
        self._check_tasks(names, heads)
        embedding_ND = run_images(self._trunk, images_NCHW)
        return {name: run_images(heads[name][0], embedding_ND) for name in names}

    def _check_tasks(self, names: Iterable[str], heads: Mapping[str, Any] | None = None) -> None:
        known = self._heads if heads is None else heads
        problems = [
            problem(
                f"there is no head for the task '{name}'",
                expected=f"one of {', '.join(known) or '(there is none yet)'}",
                mend="Add it first, with add_head.",
            )
            for name in names
            if name not in known
        ]
        if problems:
            raise InputError(*problems)

    def _misfits(self, path: Path, facts: OnnxFacts) -> list[str]:
        shape = facts.input_shape
        given = shape[-1] if len(shape) == 2 else None
        if given is None or (self.width is not None and given != self.width):
            return [
                problem(
                    f"{path} takes '{facts.input_name}' of shape {list(shape)}",
                    expected=f"a head for embeddings of {self.width} numbers, [batch, "
                    f"{self.width}], as this trunk gives them",
                    mend="Give a head that was trained on this trunk.",
                )
            ]
        key = METADATA_PREFIX + "trunk"
        own, its = self.facts.metadata.get(key), facts.metadata.get(key)
        if own is None or its is None or own == its:
            return []
        return [
            problem(
                f"{path} was trained on another trunk ({its[:12]})",
                expected=f"the trunk {own[:12]}: equal widths do not make equal embeddings",
                mend="Give a head that was trained on this trunk, or train it again with "
                "`understudy heads add`.",
            )
        ]


def check_head_parity(
    model: nn.Module,
    runtime: TrunkRuntime,
    task: str,
    images_NCHW: Tensor,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
) -> Parity:
    """Compare a model with the trunk's and the head's file together, on real uint8 images.

    Args:
        model: what the two files stand for: ``Sequential(trunk, head)``, or a whole model for its
            own classifier.
        tolerance: relative to the largest |logit| (at least 1) of the model on these images.
    """
    portable = portable_copy(model)
    with torch.inference_mode():
        model_NK = torch.cat([portable(i).float() for i in torch.split(images_NCHW, BATCH_SIZE)])

    def run(images_NCHW: Tensor, size: int) -> Tensor:
        parts = torch.split(images_NCHW, size)
        return torch.cat([runtime.answers(part, tasks=[task])[task] for part in parts])

    file_NK = run(images_NCHW, BATCH_SIZE)
    single_NK = run(images_NCHW[:NUM_SINGLE_IMAGES], 1)
    difference_NK = (file_NK.double() - model_NK.double()).abs()
    # NaN is no agreement: written so that it fails.
    largest = difference_NK.max().item()
    between = (single_NK - file_NK[: len(single_NK)]).abs().max().item()
    allowed = tolerance * max(1.0, model_NK.abs().max().item())
    return Parity(
        max_abs_difference=largest,
        mean_abs_difference=difference_NK.mean().item(),
        top1_agreement=(file_NK.argmax(1) == model_NK.argmax(1)).double().mean().item(),
        num_images=len(images_NCHW),
        tolerance=allowed,
        passed=largest <= allowed and between <= allowed,
        batch_max_abs_difference=between,
    )
