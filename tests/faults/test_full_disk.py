"""A disk that runs full: a clear error, nothing half written, and the same command goes on."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest

from tiny_run import TinyRun


def mount(folder, size_kb, *, again=False):
    options = f"size={size_kb}k" + (",remount" if again else "")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a small file system the size it is called with, in kB."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system can be mounted by root on Linux only")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount(folder, 64)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")

    def resize(size_kb):
        assert mount(folder, size_kb, again=True).returncode == 0
        return folder

    yield resize
    with contextlib.suppress(OSError):
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.slow
@pytest.mark.parametrize("only_home", [False, True])
def test_a_full_disk_is_a_clear_error_and_room_mends_it(
    warm, tiny_recipe, unbroken, small_disk, tmp_path, only_home
):
    disk = small_disk(64)
    run = TinyRun(tmp_path / "run" if only_home else disk / "run", disk / "home")
    failed_in = set()
    sizes_kb = [20, 40, 60, 80, 100, 120] if only_home else [16, 150, 300, 450, 600, 750]
    for size_kb in [*sizes_kb, 64_000]:
        small_disk(size_kb)
        finished = warm.run("distill", tiny_recipe, "--out", run.folder, home=run.home)
        run.assert_nothing_is_half_written()
        if finished.code == 0:
            break
        assert finished.code == 1, finished.err
        assert "Traceback" not in finished.err
        errors = [line for line in finished.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, finished.err
        assert "no space left" in errors[0].lower()
        failed_in.add(len(run.finished_stages()))
    assert finished.code == 0, finished.err
    assert failed_in, "the disk was never full"
    assert run.results() == unbroken.results()
    if not only_home:
        assert len(failed_in) > 2, "it was full in several stages"
