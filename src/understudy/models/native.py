"""The kernels of ``kernels*.c``, compiled for this machine at first use.

They are an acceleration and nothing else: without a C compiler, or with ``UNDERSTUDY_NATIVE=0``,
the callers compute the same with PyTorch and numpy.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.artifacts import atomic_path
from understudy.runtime import processor_name

_SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("kernels.c", "kernels_depthwise.c", "kernels_norm.c", "kernels_quantize.c")
)
_HEADER = Path(__file__).with_name("kernels.h")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-shared", "-fPIC")
_LIBRARIES = ("-lm",)
_LANES = 16  # the most that LANES of kernels.h is
_LOG = logging.getLogger(__name__)

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
_DOUBLE, _FLOAT = ctypes.c_double, ctypes.c_float


class MaskArguments(ctypes.Structure):
    """``mask`` of ``kernels.c``: which elements a dropout keeps, and the factors of those."""

    _fields_ = (
        ("key0", ctypes.c_uint32),
        ("key1", ctypes.c_uint32),
        ("threshold", ctypes.c_int32),
        ("high", ctypes.c_float),
        ("low", ctypes.c_float),
    )


_MASK: Any = ctypes.POINTER(MaskArguments)
_CONVOLVE = [_POINTER] * 4 + [_INT] * 6 + [_MASK]
_GRADIENT = [_POINTER] * 4 + [_INT] * 6
_DEPTHWISE = [_POINTER] * 3 + [_LONG] + [_INT] * 2 + [_LONG] + [_INT] * 3
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "convolve": (_INT, _CONVOLVE),
    "convolve_added": (_INT, [_POINTER] * 5 + [_INT] * 7),
    "convolve_few": (_INT, _CONVOLVE),
    "weight_gradient": (_INT, _GRADIENT),
    "weight_gradient_few": (_INT, _GRADIENT),
    "leaky_dropout": (None, [_POINTER] * 3 + [_LONG, _INT, _MASK]),
    "norm_forward": (_INT, [_POINTER] * 9 + [_LONG] * 2 + [_DOUBLE] * 2 + [_INT] * 2),
    "norm_backward": (_INT, [_POINTER] * 7 + [_LONG] * 2 + [_INT] * 2),
    "depthwise": (_INT, _DEPTHWISE),
    "depthwise_back": (_INT, _DEPTHWISE),
    "depthwise_weights": (_INT, _DEPTHWISE),
    "place_sums": (None, [_POINTER] * 3 + [_LONG] * 3 + [_INT]),
    "place_scale": (None, [_POINTER] * 4 + [_LONG] * 3 + [_INT]),
    "fake_quantize": (None, [_POINTER] * 2 + [_LONG] + [_FLOAT] * 4 + [_INT]),
    "fake_quantize_back": (None, [_POINTER] * 3 + [_LONG] + [_FLOAT] * 4 + [_INT]),
    "leaky_dropout_pooled": (None, [_POINTER] * 3 + [_LONG] * 3 + [_INT, _MASK]),
}


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where there are none (the reason is logged once)."""
    if os.environ.get("UNDERSTUDY_NATIVE", "1") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        # What a compiler said that ran out of time is bytes, and says nothing of that.
        said = getattr(error, "stderr", None)
        _LOG.info(
            "native kernels are not used: %s", said if isinstance(said, str) and said else error
        )
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


@functools.cache
def convolution_kernels() -> ctypes.CDLL | None:
    """Return the kernels where their convolutions are the faster ones, else None.

    They keep eight vectors of AVX2 or sixteen of AVX-512 in registers.
    """
    return kernels() if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else None


@functools.cache
def channel_kernels() -> ctypes.CDLL | None:
    """Return the kernels where those of norms and depthwise convolutions are the faster ones.

    They work on a vector of channels, of as many floats as an AVX2 or AVX-512 register holds.
    """
    return kernels() if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else None


def suits_kernels(features: Tensor, *modules: nn.Module, min_channels: int = _LANES) -> bool:
    """Return whether kernels may stand in for these modules on these features.

    That is in training, for float32 channels-last pictures of enough channels on a CPU, while
    nothing hooks the modules, traces the graph or casts the types.
    """
    # Tracers bring tensors of their own.
    if type(features) is not Tensor or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if any(not module.training or _is_hooked(module) for module in modules):
        return False
    return (
        features.device.type == "cpu"
        and features.dtype == torch.float32
        and features.dim() == 4
        and features.shape[1] >= min_channels
        and features.numel() > 0
        and features.is_contiguous(memory_format=torch.channels_last)
    )


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def address(tensor: Tensor | None) -> int | None:
    """Return a tensor's address for a kernel; a null pointer for None."""
    return None if tensor is None else tensor.data_ptr()


def _compiled() -> Path:
    """Return the shared library, compiled unless this source was on this processor before."""
    command = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(command[0]) is None:
        raise OSError(f"there is no C compiler '{command[0]}'")
    key = hashlib.sha256()
    for source in (_HEADER, *_SOURCES):
        key.update(source.read_bytes() + b"\0")
    for part in (*command, *_FLAGS, processor_name(), torch.__version__):
        key.update(part.encode() + b"\0")
    name = f"kernels-{key.hexdigest()[:16]}.so"
    for folder in _cache_folders():
        path = folder / name
        if path.is_file():
            return path
        try:
            with atomic_path(path) as temporary:
                subprocess.run(
                    [*command, *_FLAGS, *map(str, _SOURCES), "-o", str(temporary), *_LIBRARIES],
                    check=True,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=120,
                )
        except OSError:
            continue  # not writable
        return path
    raise OSError("no folder to keep the compiled kernels in can be written to")


def _cache_folders() -> list[Path]:
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    # The fallback is this user's own: a library that others could replace must not be loaded.
    private = Path(tempfile.gettempdir()) / f"understudy-{os.getuid()}"
    folders = [Path(home) / "understudy"]
    try:
        private.mkdir(mode=0o700, exist_ok=True)
        status = private.lstat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o077 and not private.is_symlink():
            folders.append(private)
    except OSError:
        pass
    return folders
