"""Read checkpoints as people have them, without ever running code from them.

Safetensors, and PyTorch files through its restricted unpickler alone (``weights_only=True``). What
does not fit the network is listed by name and shape with the closest candidates, all at once, and
the network is left untouched then.
"""

from __future__ import annotations

import argparse
import collections
import difflib
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from understudy.errors import CheckpointError, problem

PICKLE_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)

# In order of preference where a file holds several; plain weights come before averaged ones.
ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")

# Counters that no inference needs: absent from old files, or added by weight averaging.
_OPTIONAL_SUFFIX = "num_batches_tracked"
_IGNORED_NAMES = ("n_averaged",)

_MAX_LISTED = 20

# Plain containers that real checkpoints keep beside the weights (command-line arguments, a best
# accuracy as a numpy number). Rebuilding them runs no code of the file's choosing.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # its module was renamed in numpy 2
_SAFE_CLASSES: list[Any] = [
    argparse.Namespace,
    collections.defaultdict,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
]


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from where.

    Attributes:
        path: the file.
        entry: the nested entry the weights were found in, "" for the top level.
        prefix: what was stripped from the names, "" for nothing.
        num_tensors: tensors copied into the network.
        ignored: names in the file that no network needs.
    """

    path: Path
    entry: str
    prefix: str
    num_tensors: int
    ignored: tuple[str, ...]


def read_state_dict(path: Path, *, entry: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by the names it uses.

    Args:
        path: a file ending in one of ``SUFFIXES``.
        entry: the nested entry to take ("ema", "model.state_dict"); None finds it.

    Raises:
        CheckpointError: missing, of an unknown kind, damaged, unsafe or without weights.
    """
    return _find_weights(_read(path), path, entry)[0]


def load_weights(network: nn.Module, path: Path, *, entry: str | None = None) -> LoadReport:
    """Copy a checkpoint's weights into a network; all of them or, on any mismatch, none.

    Args:
        network: the bare network (not its ``NormalizedModel``).
        path: see ``read_state_dict``.
        entry: see ``read_state_dict``.

    Raises:
        CheckpointError: as ``read_state_dict``, and for missing, unexpected or misshapen tensors.
    """
    tensors, found_entry = _find_weights(_read(path), path, entry)
    wanted = network.state_dict()
    prefix, given = _strip_prefixes(tensors, wanted)
    ignored = [name for name in given if name in _IGNORED_NAMES and name not in wanted]
    for name in ignored:
        del given[name]
    problems = _mismatches(given, wanted) or _non_finite(given)
    if problems:
        summary = problem(
            f"{path} does not fit {type(network).__name__}: "
            f"{len(given.keys() & wanted.keys())} of {len(wanted)} names found",
            expected="a checkpoint of the same architecture",
            mend="Choose the network (name, depth, widths, classes) the checkpoint was made with.",
        )
        raise CheckpointError(summary, *problems)
    network.load_state_dict(given, strict=False)
    return LoadReport(path, found_entry, prefix, len(given), tuple(ignored))


def class_order(teacher_names: Sequence[str], data_names: Sequence[str]) -> tuple[int, ...] | None:
    """Return ``output_order`` for ``NormalizedModel``: the teacher's output for each data class.

    Names are compared without regard to case, and with spaces, ``_`` and ``-`` alike. None means
    that the orders agree already.

    Raises:
        CheckpointError: the two do not name the same classes.
    """
    teacher = [_fold(name) for name in teacher_names]
    data = [_fold(name) for name in data_names]
    problems = []
    for owner, names in (("teacher", teacher), ("data", data)):
        repeated = [name for name, count in collections.Counter(names).items() if count > 1]
        if repeated:
            problems.append(
                problem(
                    f"the {owner} names classes twice: {', '.join(repeated)}",
                    expected="each class once",
                    mend="Correct the class names.",
                )
            )
    only_teacher = [name for name in teacher_names if _fold(name) not in data]
    only_data = [name for name in data_names if _fold(name) not in teacher]
    if only_teacher or only_data:
        problems.append(
            problem(
                f"the teacher has {len(teacher)} classes and the data {len(data)}; only the "
                f"teacher has: {', '.join(only_teacher) or 'none'}; only the data has: "
                f"{', '.join(only_data) or 'none'}",
                expected="the same classes, in any order",
                mend="Rename the classes that mean the same, or choose another teacher.",
            )
        )
    if problems:
        raise CheckpointError(*problems)
    order = tuple(teacher.index(name) for name in data)
    return None if order == tuple(range(len(order))) else order


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _read(path: Path) -> Any:
    """Return the content of a file of any supported kind, not yet searched for weights."""
    if not path.is_file():
        raise CheckpointError(
            problem(
                f"there is no checkpoint file {path}",
                expected=f"a file ending in {', '.join(SUFFIXES)}",
                mend="Correct the path.",
            )
        )
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(
            problem(
                f"{path} ends in '{path.suffix}'",
                expected=f"one of {', '.join(SUFFIXES)}",
                mend="Save the weights with safetensors, or torch.save(network.state_dict(), ...).",
            )
        )
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, "safetensors file", error) from error
    return _read_pickle(path)


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_SAFE_CLASSES):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe is None:
            raise _damaged(path, "PyTorch file", error) from error
        raise CheckpointError(
            problem(
                f"{path} was refused and nothing in it was run: it asks for {unsafe[1]}, so "
                "reading it would run code",
                expected="tensors in plain containers",
                mend="Where you trust its author, load it there and save only the weights: "
                "torch.save(network.state_dict(), ...), or safetensors.",
            )
        ) from None
    except Exception as error:  # torch raises many kinds on damaged files
        if "TorchScript" in str(error):
            raise CheckpointError(
                problem(
                    f"{path} is a TorchScript program",
                    expected="a state dict",
                    mend="Save its weights: torch.save(torch.jit.load(...).state_dict(), ...).",
                )
            ) from None
        raise _damaged(path, "PyTorch file", error) from error


def _damaged(path: Path, kind: str, error: Exception) -> CheckpointError:
    # torch's first sentence advises to read the file unsafely; its last part is the reason.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    reason = text.splitlines()[0] if text else ""
    return CheckpointError(
        problem(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a {kind}: "
            f"{type(error).__name__} {reason}".rstrip(),
            expected="a complete checkpoint",
            mend="It is truncated, damaged or of another kind: copy or download it again.",
        )
    )


def _find_weights(content: Any, path: Path, entry: str | None) -> tuple[dict[str, Tensor], str]:
    """Return the tensors and the entry they were found in."""
    if entry is not None:
        for key in entry.split("."):
            if not isinstance(content, Mapping) or key not in content:
                keys = sorted(map(str, content)) if isinstance(content, Mapping) else []
                raise CheckpointError(
                    problem(
                        f"{path} has no entry '{key}'",
                        expected=f"one of {', '.join(keys[:_MAX_LISTED]) or '(it has none)'}",
                        mend="Correct the entry, or leave it out to have it found.",
                    )
                )
            content = content[key]
        return _tensors_of(content, path), entry
    trail: list[str] = []
    while isinstance(content, Mapping):
        nested = [key for key in ENTRIES if isinstance(content.get(key), Mapping)]
        if not nested:
            break
        trail.append(nested[0])
        content = content[nested[0]]
    return _tensors_of(content, path), ".".join(trail)


def _tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors
    found = type(content).__name__
    if isinstance(content, Mapping):
        found = f"a mapping of {', '.join(map(str, list(content)[:_MAX_LISTED])) or 'nothing'}"
    raise CheckpointError(
        problem(
            f"{path} holds no weights but {found}",
            expected=f"named tensors, at the top or under one of {', '.join(ENTRIES)}",
            mend="Save network.state_dict(), or name the entry that holds it.",
        )
    )


def _strip_prefixes(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """Return the stripped prefix and the renamed tensors that share most names with ``wanted``.

    A prefix is only taken off where that helps: a network may really have a part named "model".
    """
    best_prefix, best = "", dict(tensors)
    best_score = sum(name in wanted for name in best)
    prefix, current = "", best
    while True:
        first = next((p for p in PREFIXES if any(name.startswith(p) for name in current)), None)
        if first is None:
            break
        all_have_it = all(name.startswith(first) for name in current)
        stripped = {name.removeprefix(first): value for name, value in current.items()}
        if len(stripped) < len(current):
            break  # two tensors would get one name
        prefix, current = prefix + first, stripped
        score = sum(name in wanted for name in current)
        # Where nothing fits at all, a prefix of every name is noise in the list of candidates.
        if score > best_score or (score == best_score and all_have_it):
            best_prefix, best, best_score = prefix, current, score
    return best_prefix, dict(best)


def _mismatches(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Return one line for each tensor that is missing, unexpected or of another shape."""
    missing = [name for name in wanted if name not in given and not name.endswith(_OPTIONAL_SUFFIX)]
    unexpected = [
        name for name in given if name not in wanted and not name.endswith(_OPTIONAL_SUFFIX)
    ]
    misshapen = [
        name for name in wanted if name in given and given[name].shape != wanted[name].shape
    ]
    lines = [
        f"shape: {name} is {_shape(given[name])} in the file, {_shape(wanted[name])} in the network"
        for name in misshapen[:_MAX_LISTED]
    ]
    for kind, names, own, other in (
        ("missing", missing, wanted, {name: given[name] for name in unexpected}),
        ("unexpected", unexpected, given, {name: wanted[name] for name in missing}),
    ):
        lines += [
            f"{kind}: {name} {_shape(own[name])}{_candidates(name, own[name], other)}"
            for name in names[:_MAX_LISTED]
        ]
    hidden = sum(max(0, len(names) - _MAX_LISTED) for names in (missing, unexpected, misshapen))
    if hidden:
        lines.append(
            f"... {len(missing)} missing, {len(unexpected)} unexpected and {len(misshapen)} of "
            f"another shape in all; {hidden} more are not listed"
        )
    return lines


def _candidates(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> str:
    """Return the closest names among tensors of the same shape, as a phrase."""
    same_shape = [other for other in others if others[other].shape == tensor.shape]
    close = difflib.get_close_matches(name, same_shape, n=2, cutoff=0.4)
    return f" (closest of this shape: {', '.join(close)})" if close else ""


def _non_finite(given: Mapping[str, Tensor]) -> list[str]:
    return [
        f"not finite: {name} {_shape(tensor)} holds NaN or infinity"
        for name, tensor in given.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"
