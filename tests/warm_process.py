"""Runs the real command line in forked children of a process that has imported everything.

Importing takes seconds and the tiny runs of the tests take one. A forked child is a process like
any other: it is killed, interrupted and waited for by its number.

Started as a script this file is that process: it reads requests and writes answers, one JSON line
each. ``WarmProcess`` is the other end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finished:
    """How a command ended. A negative code is the signal that killed it."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    """A command at work."""

    warm: WarmProcess
    pid: int
    folder: Path

    def poll(self) -> int | None:
        return self.warm.ask({"poll": self.pid})

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def out(self) -> str:
        return (self.folder / "out").read_text()

    def err(self) -> str:
        return (self.folder / "err").read_text()

    def wait(self, timeout_s: float = 240.0) -> Finished:
        """Wait for the end; a command that takes too long is killed and fails the test."""
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"not done after {timeout_s} s\n{self.out()}\n{self.err()}")
            time.sleep(0.005)
        return Finished(code, self.out(), self.err())


class WarmProcess:
    """The test's end of the process that forks commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_started = 0
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self.read() == "ready"

    def read(self):
        line = self.process.stdout.readline()
        assert line, "the warm process ended"
        return json.loads(line)

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def start(self, *arguments, home: Path, cwd: Path | None = None) -> Command:
        """Start ``understudy ARGUMENTS`` with its own UNDERSTUDY_HOME."""
        self.num_started += 1
        folder = self.folder / str(self.num_started)
        folder.mkdir(parents=True)
        (folder / "out").touch()
        (folder / "err").touch()
        request = {
            "arguments": [str(argument) for argument in arguments],
            "environment": {"UNDERSTUDY_HOME": str(home)},
            "cwd": str(cwd or folder),
            "output": str(folder),
        }
        return Command(self, self.ask(request), folder)

    def run(self, *arguments, home: Path, cwd: Path | None = None) -> Finished:
        """Run ``understudy ARGUMENTS`` to its end."""
        return self.start(*arguments, home=home, cwd=cwd).wait()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve() -> None:
    """Answer requests until standard input ends."""
    # A shell leaves SIGINT ignored in what it runs in the background, and children inherit that:
    # no command of these tests could be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import_everything()
    assert threading.active_count() == 1, "a fork would lose the other threads"
    print(json.dumps("ready"), flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                run_command(request)
        print(json.dumps(answer), flush=True)


def import_everything() -> None:
    import onnxscript  # noqa: F401
    import plotly.graph_objects  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import tqdm
    from torch.onnx._internal.exporter import _core  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import understudy.recipes.doctor
    import understudy.recipes.store
    import understudy.report.summary
    import understudy.stages  # noqa: F401
    from understudy.export.onnx_file import export_onnx
    from understudy.models.build import NormalizedModel, build_network

    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # its thread would not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        # Much is imported by the first export only.
        network = build_network("mlp", num_classes=3, image_shape=(1, 4, 4), arguments={})
        model = NormalizedModel(network, mean=[0.5], std=[0.5]).eval()
        export_onnx(
            model,
            Path(folder, "warm.onnx"),
            image_shape=(1, 4, 4),
            class_names=("a", "b", "c"),
            opset=18,
            metadata={},
        )


def run_command(request) -> None:
    """Be the command, in a forked child; never returns."""
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for number, name in ((1, "out"), (2, "err")):
            path = Path(request["output"], name)
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), number)
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        sys.argv = ["understudy", *request["arguments"]]
        from understudy.cli import main

        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
