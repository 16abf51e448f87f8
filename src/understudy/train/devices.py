"""Where training runs: one Fabric for CPU, GPU and several processes."""

from __future__ import annotations

from typing import Literal

import torch
from lightning_fabric import Fabric

from understudy.errors import InputError, problem
from understudy.runtime import num_usable_cores


def make_fabric(
    *,
    accelerator: Literal["cpu", "cuda", "auto"] = "cpu",
    num_processes: int = 1,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Fabric:
    """Return a Fabric that is not launched yet.

    Several processes train as data-parallel replicas (gloo on CPU, NCCL on GPUs), started by spawn.

    Raises:
        InputError: if a GPU is asked for that is not there.
    """
    num_gpus = torch.cuda.device_count()
    if accelerator == "auto":
        accelerator = "cuda" if num_gpus else "cpu"
    if accelerator == "cuda" and num_gpus < num_processes:
        raise InputError(
            problem(
                f"device.accelerator is cuda with {num_processes} processes, and torch "
                f"{torch.__version__} sees {num_gpus} GPUs",
                expected="a GPU for each process",
                mend="Set device.accelerator=cpu, or install a CUDA build of torch (README).",
            )
        )
    if accelerator == "cuda":
        # Resume promises equal bits; the fastest kernels of cuDNN do not.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return Fabric(
        accelerator=accelerator,
        devices=num_processes,
        strategy="ddp_spawn" if num_processes > 1 else "auto",
        precision="bf16-mixed" if precision == "bfloat16" else "32-true",
    )


def use_threads(num_threads: int | None, *, num_processes: int = 1) -> int:
    """Give this process its share of the cores; return the number of threads."""
    threads = num_threads or max(1, num_usable_cores() // num_processes)
    torch.set_num_threads(threads)
    return threads
