"""ncnn, for phones and small ARM boards: float32, through pnnx.

Not int8: ncnn quantises with its command-line tools (ncnn2table, ncnn2int8), which its Python
package does not bring, and a network of quantise and dequantise nodes is nothing that pnnx reads.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from understudy.artifacts import write_bytes
from understudy.errors import InputError, ModelError, UnderstudyError, problem
from understudy.export.divergence import unsupported_operator
from understudy.export.onnx_file import portable_copy
from understudy.export.target import Artifact, ExportSource, Precision, require_package

PRECISIONS: tuple[Precision, ...] = ("float32",)
RUNS_HERE = True
# The runtime opens the first and finds the second by its name.
FILE_NAMES = ("student.param", "student.bin")
CONVERTER_SECONDS = 600.0


def export(source: ExportSource, folder: Path, *, precision: Precision) -> Artifact:
    """Write ``student.param`` (text: the layers) and ``student.bin`` (the weights).

    Raises:
        InputError: int8 is asked for.
        MissingExtraError, ModelError: see ``Target``.
    """
    if precision not in PRECISIONS:
        raise InputError(
            problem(
                f"ncnn is asked for {precision}",
                expected="float32, since ncnn's Python package brings none of its tools for int8",
                mend="Choose float32, or another target for int8.",
            )
        )
    require_package("ncnn", target="ncnn")
    converter = require_package("pnnx", target="ncnn").EXEC_PATH
    portable = portable_copy(source.model)
    with tempfile.TemporaryDirectory(prefix="understudy-") as name:
        temporary = Path(name)
        lacking = _convert(portable, source.image_shape, temporary, converter)
        if lacking:
            raise _unsupported(portable, source, lacking, converter)
        # The weights first: a .param has its weights beside it at any moment.
        for file_name in reversed(FILE_NAMES):
            write_bytes(folder / file_name, (temporary / file_name).read_bytes())
    num_layers = len(_layer_types(folder / FILE_NAMES[0]))
    return Artifact(
        "ncnn", precision, folder, FILE_NAMES, batch="one", facts={"num_layers": num_layers}
    )


def _convert(
    model: nn.Module, image_shape: tuple[int, int, int], folder: Path, converter: str
) -> list[str]:
    """Write the files into ``folder``; return the operators that ncnn lacks."""
    _trace(model, torch.full((1, *image_shape), 0.5)).save(folder / "traced.pt")
    shape = ",".join(str(size) for size in (1, *image_shape))
    done = subprocess.run(
        [
            converter,
            "traced.pt",
            f"inputshape=[{shape}]f32",
            "fp16=0",
            f"ncnnparam={FILE_NAMES[0]}",
            f"ncnnbin={FILE_NAMES[1]}",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=CONVERTER_SECONDS,
        check=False,
    )
    said = done.stdout + done.stderr
    if done.returncode != 0 or not (folder / FILE_NAMES[0]).is_file():
        return _why_it_ended(done.returncode, said)
    # What pnnx cannot express stays under its PyTorch name, which ncnn does not know; and where an
    # argument is not supported, it says so and goes on.
    types = [kind for kind in _layer_types(folder / FILE_NAMES[0]) if not kind.isidentifier()]
    types = [kind for kind in types if kind != "pnnx.Expression"] or types
    partly = [line for line in said.splitlines() if re.search(r"not supported|unsupported", line)]
    return list(dict.fromkeys([*types, *partly]))


def _trace(model: nn.Module, example_NCHW: Tensor) -> Any:
    trace: Any = torch.jit.trace
    with warnings.catch_warnings():
        # TorchScript's deprecation, and what it thinks of constants: pnnx reads nothing else.
        warnings.simplefilter("ignore")
        with _Spelling():
            traced = trace(model, example_NCHW, check_trace=False)
            if "aten::_convolution" not in str(traced.inlined_graph):
                traced = trace(_FromImages(model), example_NCHW, check_trace=False)
    return traced


class _FromImages(nn.Module):
    """Shows which axis is the batch, which ncnn does not have: pnnx goes by operators on images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_NCHW: Tensor) -> Tensor:
        # Windows of one pixel: the images as they are.
        logits_NK: Tensor = self.model(F.max_pool2d(images_NCHW, 1))
        return logits_NK


def _why_it_ended(status: int, said: str) -> list[str]:
    unknown = re.findall(r"Unknown builtin op: ([\w:.]+\w)", said)
    # It begins its passes when it has read the network: what stops it there is an operator.
    if unknown or "pass_level0" in said:
        return unknown or [said.strip().splitlines()[-1]]
    raise UnderstudyError(
        problem(
            f"pnnx ended with status {status} ({said.strip()[-300:] or 'it said nothing'})",
            expected="an ncnn network",
            mend="Install another version of pnnx, or export to another target.",
        )
    )


def _layer_types(param: Path) -> list[str]:
    # After a magic number and the counts: one layer a line, its type first.
    return [line.split()[0] for line in param.read_text().splitlines()[2:] if line.strip()]


def _unsupported(
    model: nn.Module, source: ExportSource, lacking: list[str], converter: str
) -> ModelError:
    def converts(part: nn.Module) -> bool:
        with tempfile.TemporaryDirectory(prefix="understudy-") as name:
            return not _convert(part, source.image_shape, Path(name), converter)

    return unsupported_operator(
        model,
        source.image_shape,
        converts,
        target="ncnn",
        reason=f"ncnn has no operator for {', '.join(lacking)}",
    )


class _Spelling(TorchFunctionMode):
    """While active, operators that ncnn lacks are computed by others that give the same numbers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.addcmul and len(args) == 3 and not kwargs:
            return args[0] + args[1] * args[2]
        if func is Tensor.__getitem__:
            picked = _strided(args[0], args[1])
            picked = _reordered(args[0], args[1]) if picked is None else picked
            if picked is not None:
                return picked
        return func(*args, **kwargs)


def _strided(values: Tensor, index: Any) -> Tensor | None:
    """Return values[:, :, ::a, ::b] as a pooling over windows of one pixel, or None."""
    if values.dim() != 4 or not isinstance(index, tuple) or len(index) != 4:
        return None
    if not all(
        isinstance(part, slice) and part.start in (None, 0) and part.stop is None for part in index
    ):
        return None
    steps = [part.step or 1 for part in index]
    if steps[:2] != [1, 1] or steps[2:] == [1, 1]:
        return None
    return F.max_pool2d(values, 1, stride=steps[2:])


def _reordered(values_NK: Tensor, index: Any) -> Tensor | None:
    """Return values_NK[:, order] as a product with a matrix of zeros and ones, or None."""
    if values_NK.dim() != 2 or not isinstance(index, tuple) or len(index) != 2:
        return None
    rows, order = index
    if rows != slice(None) or not isinstance(order, Tensor) or order.dtype != torch.int64:
        return None
    return F.linear(values_NK, F.one_hot(order, values_NK.shape[1]).to(values_NK.dtype))
