"""Where the time of one batch goes: a row for each kind of operator in eager PyTorch.

The rows are those of Tables 1 to 4 of "Efficient Knowledge Distillation" (Lin and Shen, 2024):
time, calls and memory of each kind, of making tensors, and of loading the batch.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from understudy.errors import InputError, problem
from understudy.evaluate.text_table import human_bytes, text_table
from understudy.models.dropout import FastDropout, LeakyReLUDropout
from understudy.runtime import keep_freed_memory, processor_name

NUM_WARMUP = 3
NUM_RUNS = 10
_RUN, _LOAD, _MODULE = "understudy::run", "understudy::load", "understudy::module::"
_PYTHON = "between operators"
_CREATE = "create tensor"

# PyTorch's operators that are known by another name.
_OPERATOR_KINDS = {
    "convolution": "conv2d",
    "addmm": "linear",
    "mm": "matmul",
    "bmm": "matmul",
    "feature_dropout": "dropout",
    "native_dropout": "dropout",
    "bernoulli": "dropout",
}
# Operators that make and name tensors and compute nothing.
_NO_WORK = {
    *("empty", "empty like", "empty strided", "detach", "view", "reshape"),
    *("lift fresh", "to", "resolve conj", "resolve neg"),
}
# Modules whose work may be in no operator at all, but in kernels of this package.
_MODULE_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv2d, "conv2d"),
    (nn.Linear, "linear"),
    (nn.modules.batchnorm._BatchNorm, "batch norm"),
    (LeakyReLUDropout, "leaky relu and dropout"),
    (FastDropout, "dropout"),
    (nn.modules.dropout._DropoutNd, "dropout"),
    (nn.Identity, _PYTHON),  # it has no work
)


@dataclass(frozen=True)
class OperatorRow:
    """One kind of operator in one run of the batch; times are medians over the profiled runs.

    Attributes:
        time_ms: with everything that happens inside these operators.
        share: of the time of all operators, 0 to 1.
        memory_bytes: new memory still held when the operator ends, its output mostly.
    """

    kind: str
    time_ms: float
    share: float
    num_calls: int
    memory_bytes: int

    def cells(self) -> list[str]:
        """Return the row of a table of text."""
        share = f"{self.share:.1%}" if self.share else ""
        memory = human_bytes(self.memory_bytes)
        return [self.kind, f"{self.time_ms:.3f}", share, str(self.num_calls), memory]


@dataclass(frozen=True)
class OperatorTable:
    """Operators of one batch, the slowest first. No operator is in two of the ``rows``.

    Attributes:
        total_ms: median time of the batch without the profiler, which costs some itself. In
            training mode kernels may do in one pass what the rows show module by module, so that
            they add up to more.
        created: making of tensors, which happens inside the other rows; None where not known.
        loading: bytes to float pixels of the batch, which is before the network; None likewise.
        training: whether the network was in training mode, where dropout works.
    """

    name: str
    runtime: str
    rows: tuple[OperatorRow, ...]
    total_ms: float
    created: OperatorRow | None
    loading: OperatorRow | None
    batch_size: int
    num_threads: int
    num_runs: int
    training: bool
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain lists and dicts."""
        return asdict(self)

    def to_text(self) -> str:
        """Return a table of text."""
        mode = "training mode" if self.training else "evaluation mode"
        head = (
            f"{self.name} in {self.runtime}, one batch of {self.batch_size}, {mode}, "
            f"threads {self.num_threads}, median of {self.num_runs} runs"
        )
        rows = [["model inference", f"{self.total_ms:.3f}", "", "1", ""]]
        rows += [row.cells() for row in self.rows]
        if self.created is not None:
            rows.append([f"{_CREATE} (in the above)", *self.created.cells()[1:]])
        if self.loading is not None:
            rows.append(self.loading.cells())
        return head + "\n" + text_table(["operator", "ms", "share", "calls", "memory"], rows)


@dataclass
class OperatorSum:
    """What the operators of one kind took in one run."""

    time_ms: float = 0.0
    num_calls: int = 0
    memory_bytes: int = 0

    def add(self, microseconds: float, num_calls: int, memory_bytes: int) -> None:
        """Add some calls; what they freed does not count."""
        self.time_ms += microseconds / 1e3
        self.num_calls += num_calls
        self.memory_bytes += max(0, memory_bytes)


def torch_operators(
    model: nn.Module,
    images_NCHW: Tensor,
    *,
    name: str = "",
    training: bool = False,
    num_threads: int = 1,
    num_runs: int = NUM_RUNS,
) -> OperatorTable:
    """Profile a network on the CPU with one batch of uint8 images; the network is left alone.

    Args:
        model: takes float images in [0, 1], or normalises them itself.
        training: profile a forward pass in training mode, with gradients recorded, and with freed
            memory kept as trainings keep it.
        num_runs: profiled runs, after a few that are not.

    Raises:
        InputError: the images are not a batch of bytes, or a count is below 1.
    """
    check_batch(images_NCHW, num_threads=num_threads, num_runs=num_runs)
    if training:
        keep_freed_memory()
    network = copy.deepcopy(model).cpu().train(training)
    pixels_NCHW = float_pixels(images_NCHW)
    with _threads(num_threads), torch.set_grad_enabled(training):
        total_ms = median_ms(lambda: network(pixels_NCHW), num_runs)
        runs = [_profiled(network, images_NCHW) for _ in range(num_runs)]
    rows = median_rows(runs)
    created, loading = rows.pop(_CREATE, None), rows.pop("data loading", None)
    return OperatorTable(
        name=name or type(model).__name__,
        runtime="eager PyTorch",
        rows=with_shares(rows),
        total_ms=total_ms,
        created=created,
        loading=loading,
        batch_size=len(images_NCHW),
        num_threads=num_threads,
        num_runs=num_runs,
        training=training,
        facts={"torch": torch.__version__, "processor": processor_name()},
    )


def float_pixels(images_NCHW: Tensor) -> Tensor:
    """Return bytes as float pixels in [0, 1], in one new tensor."""
    return images_NCHW.to(torch.float32).div_(255)


def _profiled(network: nn.Module, images_NCHW: Tensor) -> dict[str, OperatorSum]:
    with (
        _annotated(network),
        _without_notices(),
        profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiled,
    ):
        with record_function(_LOAD):
            pixels_NCHW = float_pixels(images_NCHW)
        with record_function(_RUN):
            network(pixels_NCHW)
    sums: dict[str, OperatorSum] = {}
    for event in profiled.events():
        if event.name == _LOAD:
            sum_ = sums.setdefault("data loading", OperatorSum())
            sum_.add(event.cpu_time_total, 1, event.cpu_memory_usage)
        elif event.name == _RUN:
            _add_parts(event, _PYTHON, sums)
            for made in _inside(event):
                if made.name.startswith("aten::empty"):
                    sum_ = sums.setdefault(_CREATE, OperatorSum())
                    sum_.add(made.self_cpu_time_total, 1, made.self_cpu_memory_usage)
    return sums


def _add_parts(annotation: Any, kind: str, sums: dict[str, OperatorSum]) -> None:
    """Give the time inside a run or a module to its operators, and the rest to its own kind."""
    for child in annotation.cpu_children:
        if child.name.startswith(_MODULE):
            _add_parts(child, child.name.removeprefix(_MODULE), sums)
            continue
        # What is not PyTorch's own is a function of the module that called it.
        is_known = child.name.startswith("aten::")
        child_kind = _operator_kind(child.name) if is_known or kind == _PYTHON else kind
        sums.setdefault(child_kind, OperatorSum()).add(
            child.cpu_time_total, 1, child.cpu_memory_usage
        )
    # A module in which no operator computes does its work elsewhere: in NumPy, in C.
    inside = {_operator_kind(child.name) for child in annotation.cpu_children}
    is_own_work = kind != _PYTHON and inside <= _NO_WORK
    own = sums.setdefault(kind if is_own_work else _PYTHON, OperatorSum())
    own.add(annotation.self_cpu_time_total, int(is_own_work), annotation.self_cpu_memory_usage)


def _operator_kind(name: str) -> str:
    base = name.removeprefix("aten::").strip("_")
    return _OPERATOR_KINDS.get(base, base).replace("_", " ")


def _inside(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        yield child
        yield from _inside(child)


@contextlib.contextmanager
def _annotated(network: nn.Module) -> Iterator[None]:
    """Name every module in the profile: not all that they do is an operator of PyTorch."""
    open_records: list[Any] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        record = record_function(_MODULE + _module_kind(module))
        record.__enter__()  # type: ignore[no-untyped-call]
        open_records.append(record)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        open_records.pop().__exit__(None, None, None)

    handles = []
    for module in network.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Keep the profiler's notices of its start and stop off the terminal, and nothing else."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            said.seek(0)
            for line in said.read().decode(errors="replace").splitlines(keepends=True):
                if not line.startswith("USDT:"):
                    sys.stderr.write(line)


def _module_kind(module: nn.Module) -> str:
    for kind_of, kind in _MODULE_KINDS:
        if isinstance(module, kind_of):
            return kind
    return _PYTHON if any(True for _ in module.children()) else type(module).__name__


def median_rows(runs: Sequence[dict[str, OperatorSum]]) -> dict[str, OperatorRow]:
    """Return a row for each kind of any run, shares not yet known."""
    rows = {}
    for kind in {kind: None for sums in runs for kind in sums}:
        found = [sums.get(kind, OperatorSum()) for sums in runs]
        rows[kind] = OperatorRow(
            kind=kind,
            time_ms=statistics.median(sum_.time_ms for sum_ in found),
            share=0.0,
            num_calls=round(statistics.median(sum_.num_calls for sum_ in found)),
            memory_bytes=round(statistics.median(sum_.memory_bytes for sum_ in found)),
        )
    return rows


def with_shares(rows: dict[str, OperatorRow]) -> tuple[OperatorRow, ...]:
    """Return the rows with their shares, the slowest first."""
    total_ms = sum(row.time_ms for row in rows.values()) or 1.0
    shared = [
        OperatorRow(**{**asdict(row), "share": row.time_ms / total_ms}) for row in rows.values()
    ]
    return tuple(sorted(shared, key=lambda row: -row.time_ms))


def median_ms(run: Callable[[], object], num_runs: int) -> float:
    """Return the median time of a call, after a few that are not timed."""
    times_ms = []
    for turn in range(NUM_WARMUP + num_runs):
        start = time.perf_counter()
        run()
        if turn >= NUM_WARMUP:
            times_ms.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times_ms)


@contextlib.contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def check_batch(images_NCHW: Tensor, *, num_threads: int, num_runs: int) -> None:
    """Raise an InputError that lists everything wrong with what is asked."""
    problems = [
        problem(f"{name} is {value}", expected="at least 1", mend="Give a count of at least 1.")
        for name, value in (("num_threads", num_threads), ("num_runs", num_runs))
        if value < 1
    ]
    if images_NCHW.dtype != torch.uint8 or images_NCHW.dim() != 4 or images_NCHW.numel() == 0:
        problems.append(
            problem(
                f"the images are {images_NCHW.dtype} of {tuple(images_NCHW.shape)}",
                expected="uint8 [n, C, H, W], n at least 1",
                mend="Give one batch.",
            )
        )
    if problems:
        raise InputError(*problems)
