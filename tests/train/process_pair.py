"""Runs a function in two processes that belong to one training, without starting Python anew."""

import multiprocessing

import torch
import torch.distributed


def in_two_processes(function, folder):
    """Return what ``function(rank)``, a mapping of tensors, gives in each of two processes."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=be_process, args=(function, rank, folder)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def be_process(function, rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    torch.save(function(rank), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
