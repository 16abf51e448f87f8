"""What the process asks of the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from understudy.runtime import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    activations = [torch.ones(2**21) for _ in range(8)]  # 64 MiB: 16,384 pages
    del activations

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) // 10)
"""


def faults_a_step(how: str) -> int:
    finished = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
    )
    return int(finished.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_memory_that_a_step_frees_is_not_cleared_again() -> None:
    assert faults_a_step("leave") > 1000
    assert faults_a_step("keep") < 100
