"""What the targets share: tracing, naming a layer, a clean screen."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from understudy.errors import InputError, ModelError, problem

BATCH_SIZE = 50


def trace(
    model: nn.Module, example_NCHW: Tensor, *, target: str, any_batch: bool = False
) -> ExportedProgram:
    """Return the program of a portable model.

    Args:
        example_NCHW: float images; two at least where the batch is to be free.
        any_batch: leave the batch size open; else it is the example's.

    Raises:
        ModelError: the model cannot be traced; the layer that was running is named.
    """
    running: list[str] = []
    hooks = []
    for name, module in model.named_modules():

        def enter(*_: Any, name: str = name) -> None:
            running.append(name)

        def leave(*_: Any) -> None:
            running.pop()

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    batch = ({0: torch.export.Dim("batch", min=1)},) if any_batch else None
    try:
        return torch.export.export(model, (example_NCHW,), dynamic_shapes=batch, strict=False)
    # Tracing runs the user's code: any exception can come out of it.
    except Exception as error:
        layer, reason = "", str(error)
        if running and running[-1]:
            layer = f"{running[-1]} ({type(model.get_submodule(running[-1])).__name__})"
        if "specialized it to be a constant" in reason:
            reason = "it works only for the batch size that it was traced with"
        raise cannot_export(target, reason=reason, layer=layer) from error
    finally:
        for hook in hooks:
            hook.remove()


def layer_of(program: ExportedProgram, operator: str) -> str:
    """Return the name of the layer that runs an operator first, "" where that is not known.

    Args:
        operator: with its namespace, such as "aten.erfinv.default" or "aten::erfinv".
    """
    wanted = re.split(r"::|\.", operator)[:2]
    # Some operators come into being only as others are decomposed.
    for candidate in (program, program.run_decompositions()):
        for node in candidate.graph.nodes:
            if re.split(r"::|\.", str(node.target))[:2] == wanted:
                return module_name(node)
    return ""


def module_name(node: torch.fx.Node) -> str:
    """Return the name of the module that a node of a traced program came from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def inside(layer: str, modules: Sequence[str]) -> bool:
    """Whether a layer is one of these modules or a part of one."""
    return any(layer == name or layer.startswith(f"{name}.") for name in modules)


def check_float_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Raise InputError for names that are no modules of the model."""
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            problem(
                f"{', '.join(unknown)} should stay in float32, but the model has no such layers",
                expected=f"names of its modules, such as {', '.join(list(known)[1:5])}",
                mend="Correct the names.",
            )
        )


def cannot_export(target: str, *, reason: str, layer: str = "", operator: str = "") -> ModelError:
    """Return the error of a model that a target has no operators for."""
    if operator:
        reason = f"there is no operator for {operator}"
    lines = reason.strip().splitlines()
    return ModelError(
        problem(
            f"{f'layer {layer}' if layer else 'the model'} cannot be exported to {target} "
            f"({lines[0] if lines else 'no reason given'})",
            expected=f"operators that {target} has, no branches on values",
            mend="Replace the layer by one made of standard operators.",
        )
    )


def calibration_batches(images_NCHW: Tensor, *, max_images: int, size: int) -> Iterator[Tensor]:
    """Yield float images in [0, 1], ``size`` at a time, taken evenly from all that there are."""
    step = max(1, len(images_NCHW) // max_images)
    for some in torch.split(images_NCHW[::step][:max_images].cpu(), size):
        yield some.float() / 255 if some.dtype == torch.uint8 else some.float()


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], str]]:
    """Keep what a converter prints off the screen; yield a function that returns it so far.

    The converters print notes to their own developers: from Python, from C++ past ``sys.stderr``,
    as warnings and as log records.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    printed = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with (
            tempfile.TemporaryFile() as file,
            _redirected_descriptors(file),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield lambda: printed.getvalue() + _content(file)
    finally:
        # A first ``logging.warning`` installs a handler, which would stay bound to ``printed``.
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)


@contextlib.contextmanager
def _redirected_descriptors(file: BinaryIO) -> Iterator[None]:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    saved = []
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed, as in a service
            saved.append((descriptor, os.dup(descriptor)))
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        for descriptor, copy in saved:
            os.dup2(copy, descriptor)
            os.close(copy)


def _content(file: BinaryIO) -> str:
    # By position: the descriptor's own one is where C++ goes on writing.
    return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")
