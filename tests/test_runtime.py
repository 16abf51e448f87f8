"""What the process asks of the system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys
import torch
from understudy.runtime import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

layers = [torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()]
layers += [torch.nn.Conv2d(16, 24, 3, 2), torch.nn.BatchNorm2d(24), torch.nn.ReLU()]
network = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)
images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)

def step():
    network.zero_grad()
    network(images).sum().backward()

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(15):
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) // 10)
"""


# What glibc begins with. Once named, they stay: otherwise they rise with what is freed, and now and
# then so far that nothing is given back even without our setting.
THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def faults_a_step(how: str) -> int:
    finished = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **THRESHOLDS},
    )
    return int(finished.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_memory_that_a_step_frees_is_not_cleared_again() -> None:
    left = faults_a_step("leave")
    assert left > 1000
    assert faults_a_step("keep") < left / 10


HUGE_PAGES = """
import sys
import torch
from understudy.runtime import keep_freed_memory

keep_freed_memory()
values = torch.zeros(2**24)
for line in open("/proc/self/smaps_rollup"):
    if line.startswith("AnonHugePages:"):
        print(line.split()[1])
"""


def huge_pages_are_on_request() -> bool:
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    return "[madvise]" in setting and platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(
    not huge_pages_are_on_request(), reason="no huge pages on request (Linux with glibc)"
)
def test_large_tensors_lie_in_huge_pages() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", HUGE_PAGES], capture_output=True, text=True, check=True
    )
    assert int(finished.stdout) >= 32 * 1024, "kB, half of the tensor's at least"
