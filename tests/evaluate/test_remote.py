"""Against a real OpenSSH server on this machine, with keys and settings of its own."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from measure_model import write_linear

from understudy.errors import InputError, UnderstudyError
from understudy.evaluate.profile import profile_command
from understudy.evaluate.remote import Ssh, measure_remote
from understudy.evaluate.runtime_files import RuntimeFile

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="OpenSSH's server is not installed"
)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def make_key(path):
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=60
    )
    return path


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """This machine over ssh; what is started there has a temporary folder of its own."""
    folder = tmp_path_factory.mktemp("ssh")
    host_key, user_key = make_key(folder / "host"), make_key(folder / "user")
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    (folder / "remote").mkdir()
    port = free_port()
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nPidFile {folder}/pid\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPermitRootLogin prohibit-password\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"SetEnv TMPDIR={folder}/remote\n"
    )
    if os.geteuid() == 0:  # where the server parts with its rights
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if server.poll() is not None:
                pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        public = (folder / "host.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(public)}\n")
        yield Ssh(
            host=f"{getpass.getuser()}@127.0.0.1:{port}",
            identity_file=user_key,
            known_hosts=folder / "known_hosts",
            options=("GlobalKnownHostsFile=/dev/null",),
            python=sys.executable,
        )
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def remote_folder(device):
    """The device's temporary folder, which is empty again after each test."""
    folder = device.identity_file.parent / "remote"
    yield folder
    end = time.monotonic() + 15
    while list(folder.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_linear(tmp_path_factory.mktemp("remote") / "model.onnx")


def measure(path, device, **settings):
    settings = {"batch_sizes": (1,), "min_seconds": 0.0, **settings}
    return measure_remote(path, IMAGES, ssh=device, **settings)


def runtime_of(tmp_path, monkeypatch, text):
    """A file with a runtime of these lines."""
    script = tmp_path / "runtime.py"
    script.write_text("PACKAGES = ('numpy', 'tiny-runtime')\n" + text)
    monkeypatch.setattr(RuntimeFile, "script", script)
    model = tmp_path / "model.bin"
    model.write_bytes(b"model")
    return RuntimeFile(model, "onnx", (model,))


def test_figures_come_back_and_nothing_stays(device, remote_folder, model_path):
    found = measure(model_path, device, batch_sizes=(5, 1))
    assert [(row.batch_size, row.num_threads) for row in found.latency.measurements] == [
        (1, 1),
        (5, 1),
    ]
    assert all(0 < row.p50_ms <= row.p99_ms for row in found.latency.measurements)
    assert found.memory.peak_memory_bytes > found.memory.baseline_memory_bytes > 10e6
    assert found.energy.method in ("counter", "not measured")
    assert {"processor", "num_cores", "python", "onnxruntime"} <= set(found.facts)
    assert found.to_json()["host"] == device.host


def test_the_command_measures_there(device, remote_folder, model_path):
    options = [
        f"IdentityFile={device.identity_file}",
        f"UserKnownHostsFile={device.known_hosts}",
        *device.options,
    ]
    text = profile_command(
        str(model_path),
        host=device.host,
        device="raspberry-pi-4",
        batches=[1],
        ssh_options=options,
        python=device.python,
    )
    assert f"model.onnx in onnx on {device.host}" in text
    assert "times, memory and energy are of this machine" not in text


def test_a_host_that_is_not_there(device, model_path):
    nobody = replace(device, host=f"user@127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match=r"cannot be reached \(.*Connection refused"):
        measure(model_path, nobody)
    nowhere = replace(device, host="user@nowhere.invalid", connect_timeout=2)
    with pytest.raises(InputError, match=r"cannot be reached \(.*nowhere\.invalid"):
        measure(model_path, nowhere)


def test_a_key_that_is_not_let_in(device, model_path, tmp_path):
    stranger = replace(device, identity_file=make_key(tmp_path / "other"))
    with pytest.raises(InputError, match=r"does not let this user in \(.*Permission denied"):
        measure(model_path, stranger)


def test_a_host_whose_key_is_not_known(device, model_path, tmp_path):
    (tmp_path / "known").write_text("")
    unknown = replace(
        device, known_hosts=tmp_path / "known", options=("StrictHostKeyChecking=yes",)
    )
    with pytest.raises(InputError, match="is not the known one"):
        measure(model_path, unknown)


def test_no_python_there(device, remote_folder, model_path):
    with pytest.raises(InputError, match="there is no 'python9' on"):
        measure(model_path, replace(device, python="python9"))


def test_a_package_that_is_missing_there(device, remote_folder, tmp_path, monkeypatch):
    file = runtime_of(
        tmp_path, monkeypatch, "def open_model(path, *, num_threads):\n    import tiny_runtime\n"
    )
    with pytest.raises(InputError, match="no package 'tiny_runtime'") as raised:
        measure(file, device)
    assert f"{sys.executable} -m pip install numpy tiny-runtime" in str(raised.value)


def test_a_runtime_that_fails_there(device, remote_folder, tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(UnderstudyError, match=r"measuring .*broken\.onnx on .* failed \(.*Proto"):
        measure(path, device)


def test_bytes_that_are_no_text_do_not_hide_why_it_failed_there(
    device, remote_folder, tmp_path, monkeypatch
):
    lines = (
        "import os\n"
        "def open_model(path, *, num_threads):\n"
        "    os.write(2, b'caf\\xe9')\n"
        "    raise ValueError('not today')\n"
    )
    with pytest.raises(UnderstudyError, match=r"failed \(ValueError: not today\)"):
        measure(runtime_of(tmp_path, monkeypatch, lines), device)


def test_what_a_runtime_caches_there_goes_with_the_folder(
    device, remote_folder, tmp_path, monkeypatch
):
    lines = (
        "import os, pathlib\n"
        "def open_model(path, *, num_threads):\n"
        "    cache = pathlib.Path(os.environ['XDG_CACHE_HOME'])\n"
        "    raise ValueError(str(cache.relative_to(os.environ['TMPDIR'])))\n"
    )
    with pytest.raises(UnderstudyError, match=r"failed \(ValueError: cache\)"):
        measure(runtime_of(tmp_path, monkeypatch, lines), device)


def test_a_full_disk_there(device, remote_folder, tmp_path, monkeypatch):
    lines = (
        "import errno, os\n"
        "def open_model(path, *, num_threads):\n"
        "    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
    )
    with pytest.raises(UnderstudyError, match=r"the disk of .* is full"):
        measure(runtime_of(tmp_path, monkeypatch, lines), device)


def test_a_run_without_end_is_stopped_here_and_there(device, remote_folder, tmp_path, monkeypatch):
    lines = "def open_model(path, *, num_threads):\n    while True:\n        pass\n"
    with pytest.raises(UnderstudyError, match="was not done after 2 s"):
        measure(runtime_of(tmp_path, monkeypatch, lines), device, timeout_seconds=2)


@pytest.mark.parametrize("host", ["", "-oProxyCommand=x", "a b", "u@h:0", "u@h:99999", "u@h:x"])
def test_a_malformed_host(host, model_path):
    with pytest.raises(InputError, match="expected user@device"):
        measure_remote(model_path, IMAGES, ssh=Ssh(host))


def test_hosts_of_all_forms():
    assert Ssh("device").command()[-2:] == ["--", "device"]
    assert Ssh("me@device:2222").command()[-4:] == ["-p", "2222", "--", "me@device"]
    assert Ssh("me@[fe80::1%eth0]:22").command()[-1] == "me@fe80::1%eth0"
