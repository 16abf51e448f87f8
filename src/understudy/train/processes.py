"""Several training processes: started together, stopped together, and answered for as one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from lightning_fabric import Fabric
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from understudy.errors import TrainingError, UnderstudyError, problem
from understudy.progress import log
from understudy.runtime import stop_requests


def launch_processes(fabric: Fabric, work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(fabric, *arguments)`` in every process of ``fabric`` and wait for all of them.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after every process has saved and ended.
        TrainingError: a process failed; what it said is in the log.
    """
    with stop_requests(pass_on=signal_children) as stop_requested:
        try:
            finished = fabric.launch(_finished, work, *arguments)  # type: ignore[arg-type]
        except (ProcessRaisedException, ProcessExitedException) as error:
            if stop_requested():
                raise KeyboardInterrupt from None
            raise TrainingError(
                problem(
                    f"one of the training processes failed ({str(error).strip().splitlines()[-1]})",
                    expected="all of them to finish",
                    mend="Mend what the log says, or set device.num_processes=1; then run again.",
                )
            ) from error
    if not finished:
        raise KeyboardInterrupt


def signal_children(number: int) -> None:
    """Send a signal on to the processes that this one has started."""
    for child in multiprocessing.active_children():
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)


def _finished(fabric: Fabric, work: Callable[..., None], *arguments: Any) -> bool:
    """Do the work in a child; False if it was interrupted, which ``spawn`` would not tell."""
    try:
        work(fabric, *arguments)
    except KeyboardInterrupt:
        return False
    except (UnderstudyError, OSError) as error:
        # Of several processes that fail after one another only one reaches the parent.
        log.error("process %d: %s", fabric.global_rank, error)
        raise
    return True
