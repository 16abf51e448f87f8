"""Measures an artifact on another machine over ssh, with the same script as on this one.

One connection does it all: the system's ``ssh`` runs a shell there that unpacks what comes on its
standard input into a new folder, starts one fresh Python a setting, and removes the folder when it
ends, however it ends; so nothing is left there even if this process or the connection dies.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike

from understudy.errors import InputError, UnderstudyError, problem
from understudy.evaluate import artifact_process, counters
from understudy.evaluate.energy import Energy, energy_of_window, energy_request
from understudy.evaluate.fresh_process import check_request, failure_of, measure_request, reason_of
from understudy.evaluate.latency import NUM_BATCHES, Latency, Measurement, measurement_of
from understudy.evaluate.memory import Memory, memory_of
from understudy.evaluate.runtime_files import RuntimeFile, Source, runtime_file

# Exit codes of the shell on the device; ssh itself ends with 255.
_NO_FOLDER, _NO_PYTHON, _NO_UNPACK, _NO_RUN = 71, 72, 73, 74
_SHELL = """\
d=$(mktemp -d "${{TMPDIR:-/tmp}}/understudy-XXXXXXXX") || exit 71
trap 'cd /; rm -rf "$d"' EXIT
trap 'exit 70' HUP INT TERM PIPE
p={python}
case $p in /*) ;; */*) p="$PWD/$p" ;; esac
command -v "$p" >/dev/null 2>&1 || exit 72
tar -xf - -C "$d" || exit 73
cd "$d" || exit 71
TMPDIR=$d XDG_CACHE_HOME=$d/cache PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
export TMPDIR XDG_CACHE_HOME PYTHONSAFEPATH PYTHONDONTWRITEBYTECODE
{runs}
"""
_HOST = re.compile(
    r"(?P<user>[A-Za-z0-9_][\w.-]*@)?(?P<name>\[[0-9A-Fa-f:.%\w]+\]|[A-Za-z0-9_][\w.-]*)"
    r"(:(?P<port>\d{1,5}))?"
)


@dataclass(frozen=True)
class Ssh:
    """How to reach a device.

    Attributes:
        host: ``user@device``, ``device`` or either with ``:port``; an IPv6 address in brackets, or
            a name of the user's ssh configuration.
        identity_file: private key; None: what ssh finds itself.
        known_hosts: file with the device's key; None: the user's.
        connect_timeout: seconds.
        options: more of ssh's options, each ``Name=value``.
        python: Python on the device: a command, an absolute path, or one below the home folder.
    """

    host: str
    identity_file: Path | None = None
    known_hosts: Path | None = None
    connect_timeout: int = 10
    options: tuple[str, ...] = ()
    python: str = "python3"

    def command(self) -> list[str]:
        """Return the ``ssh`` command, but for what is to run there.

        Raises:
            InputError: the host is malformed, or there is no ssh on this machine.
        """
        found = _HOST.fullmatch(self.host)
        if found is None or not 0 < int(found["port"] or 22) < 65536:
            raise InputError(
                problem(
                    f"the host is '{self.host}'",
                    expected="user@device, or user@device:port",
                    mend="Correct it.",
                )
            )
        if shutil.which("ssh") is None:
            raise InputError(
                problem(
                    "there is no ssh on this machine",
                    expected="OpenSSH's client",
                    mend="Install it, for instance the package openssh-client.",
                )
            )
        # BatchMode: a question for a password would wait for ever.
        options = ["BatchMode=yes", f"ConnectTimeout={self.connect_timeout}", *self.options]
        if self.known_hosts is not None:
            options.append(f"UserKnownHostsFile={self.known_hosts}")
        command = ["ssh", *(part for option in options for part in ("-o", option))]
        if self.identity_file is not None:
            command += ["-i", str(self.identity_file), "-o", "IdentitiesOnly=yes"]
        if found["port"]:
            command += ["-p", found["port"]]
        return [*command, "--", (found["user"] or "") + found["name"].strip("[]")]


@dataclass(frozen=True)
class RemoteMeasurement:
    """What a device took for an artifact: times as ``measure_latency``, memory of the first batch.

    Attributes:
        facts: the device's own: board, processor, cores, Python, versions of the runtime.
    """

    host: str
    latency: Latency
    memory: Memory
    energy: Energy
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain lists and dicts."""
        return {
            "host": self.host,
            "latency": self.latency.to_json(),
            "memory": self.memory.to_json(),
            "energy": asdict(self.energy),
            "facts": self.facts,
        }


def measure_remote(
    source: Source,
    images: ArrayLike,
    *,
    ssh: Ssh,
    batch_sizes: Sequence[int] = (1, 100),
    num_threads: Sequence[int] = (1,),
    min_seconds: float = 1.0,
    timeout_seconds: float = 600.0,
) -> RemoteMeasurement:
    """Copy an artifact to a device, measure it there, and bring the figures back.

    Every setting is a process of its own there. Memory is measured at the first setting, with one
    batch, and energy likewise, where the device has counters.

    Args:
        images: uint8 [n, C, H, W]; as many as the largest batches need are copied.
        timeout_seconds: for all of it. The processes there end by themselves at that time.

    Raises:
        InputError: the file or the images do not fit, the host is malformed, cannot be reached or
            does not let this user in, or lacks Python or a package.
        UnderstudyError: the runtime fails there, the disk there is full, or time is up.
    """
    images_NCHW = np.asarray(images)
    file = runtime_file(source)
    settings = [
        (size, count) for count in sorted(set(num_threads)) for size in sorted(set(batch_sizes))
    ]
    for size, count in settings:
        check_request(file, images_NCHW, batch_size=size, num_threads=count)
    alarm = {"images": "images.npy", "alarm_seconds": max(1, int(timeout_seconds))}
    requests = [alarm | _request(settings[0], num_batches=1, min_seconds=0.0)]
    requests[0]["energy"] = {
        **energy_request(3.0, 1.0, Path(counters.POWERCAP)),
        "script": Path(counters.__file__).name,
    }
    requests += [
        alarm | _request(setting, num_batches=NUM_BATCHES, min_seconds=min_seconds)
        for setting in settings
    ]
    num_images = NUM_BATCHES * max(batch_sizes)
    answers = _run(ssh, file, images_NCHW[:num_images], requests, timeout_seconds)
    rows = tuple(_rows(settings, answers[1:]))
    facts = {"runtime": file.runtime, **answers[0]["machine"], **answers[0]["versions"]}
    facts |= answers[0]["facts"]
    size, count = settings[0]
    return RemoteMeasurement(
        host=ssh.host,
        latency=Latency(rows, facts | {"percentile": "nearest rank"}),
        memory=memory_of(answers[0], batch_size=size, num_threads=count),
        energy=energy_of_window(answers[0]["energy"], images_a_run=size),
        facts=facts,
    )


def _rows(
    settings: Sequence[tuple[int, int]], answers: Sequence[dict[str, Any]]
) -> list[Measurement]:
    return [
        measurement_of(told, batch_size=size, num_threads=count)
        for (size, count), told in zip(settings, answers, strict=True)
    ]


def _request(setting: tuple[int, int], *, num_batches: int, min_seconds: float) -> dict[str, Any]:
    batch_size, num_threads = setting
    return measure_request(
        batch_size=batch_size,
        num_threads=num_threads,
        num_batches=num_batches,
        min_seconds=min_seconds,
    )


def _run(
    ssh: Ssh,
    file: RuntimeFile,
    images_NCHW: np.ndarray,
    requests: Sequence[dict[str, Any]],
    timeout_seconds: float,
) -> list[dict[str, Any]]:
    """Send the files, run the requests in turn, and return their answers."""
    # The runtime's script under another name: `onnx.py` would stand in for the package.
    places = {"runtime": "runtime_script.py", "artifact": f"artifact/{file.path.name}"}
    runs = "\n".join(
        f'"$p" {Path(artifact_process.__file__).name} {shlex.quote(json.dumps(request | places))}'
        f" </dev/null || exit {_NO_RUN}"
        for request in requests
    )
    script = _SHELL.format(python=shlex.quote(ssh.python), runs=runs)
    # Whatever the user's shell is there, a POSIX shell reads the script.
    command = [*ssh.command(), f"exec sh -c {shlex.quote(script)}"]
    with tempfile.TemporaryFile() as packed:
        _pack(packed, file, images_NCHW)
        packed.seek(0)
        try:
            done = subprocess.run(
                command,
                stdin=packed,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UnderstudyError(
                problem(
                    f"measuring {file.path} on {ssh.host} was not done after {timeout_seconds:g} s",
                    expected="all settings in that time",
                    mend="Measure fewer or smaller batches, or allow more time.",
                )
            ) from None
    if done.returncode != 0:
        raise _failure(ssh, file, done)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _pack(packed: IO[bytes], file: RuntimeFile, images_NCHW: np.ndarray) -> None:
    images = io.BytesIO()
    np.save(images, images_NCHW)
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for module in (artifact_process, counters):
            archive.add(str(module.__file__), Path(str(module.__file__)).name, filter=_plain_owner)
        archive.add(file.script, "runtime_script.py", filter=_plain_owner)
        for path in file.files:
            archive.add(path, f"artifact/{path.name}", filter=_plain_owner)
        entry = tarfile.TarInfo("images.npy")
        entry.size = len(images.getvalue())
        images.seek(0)
        archive.addfile(entry, images)


def _plain_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    # A root there would otherwise give the files to whoever has this user's number.
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o700 if entry.isdir() else 0o600
    return entry


def _failure(
    ssh: Ssh, file: RuntimeFile, done: subprocess.CompletedProcess[str]
) -> UnderstudyError:
    said = " ".join(done.stderr.split())[-600:] or "it said nothing"
    if done.returncode == 255:
        return _connection_failure(ssh, said)
    if "No space left on device" in done.stderr + done.stdout or "ENOSPC" in done.stderr:
        return UnderstudyError(
            problem(
                f"the disk of {ssh.host} is full ({said})",
                expected=f"room for {file.size_bytes} bytes and the images",
                mend="Make room there, or set TMPDIR there to a folder that has it.",
            )
        )
    if done.returncode == _NO_PYTHON:
        return InputError(
            problem(
                f"there is no '{ssh.python}' on {ssh.host}",
                expected="Python 3.9 or newer",
                mend="Install it there, or say which Python to use.",
            )
        )
    missing = failure_of(done.stdout).get("missing")
    if missing:
        return InputError(
            problem(
                f"{ssh.host} has no package '{missing}' for {ssh.python}",
                expected=f"what {file.runtime} needs: {', '.join(file.packages)}",
                mend=f"Run there: {ssh.python} -m pip install {' '.join(file.packages)}",
            )
        )
    if done.returncode in (_NO_FOLDER, _NO_UNPACK, 127):
        return UnderstudyError(
            problem(
                f"{ssh.host} cannot take the files ({said})",
                expected="mktemp, tar and a folder that can be written to",
                mend="Mend that there.",
            )
        )
    reason = reason_of(done.stdout, done.stderr)
    return UnderstudyError(
        problem(
            f"measuring {file.path} on {ssh.host} failed ({reason})",
            expected=f"{file.runtime} there to load the file and run the images",
            mend="Look at its version there; measure the file on this machine to compare.",
        )
    )


def _connection_failure(ssh: Ssh, said: str) -> UnderstudyError:
    if "Permission denied" in said or "Too many authentication failures" in said:
        return InputError(
            problem(
                f"{ssh.host} does not let this user in ({said})",
                expected="a key that it accepts, without a password",
                mend="Copy your key there with ssh-copy-id, or name the right identity file.",
            )
        )
    if "Host key verification failed" in said or "REMOTE HOST IDENTIFICATION" in said:
        return InputError(
            problem(
                f"the key of {ssh.host} is not the known one ({said})",
                expected="a device whose key is in known_hosts",
                mend=f"Connect once by hand (ssh {ssh.host}) and check its key.",
            )
        )
    return InputError(
        problem(
            f"{ssh.host} cannot be reached ({said})",
            expected="a device that answers on its ssh port",
            mend="Check its name, port and network, and that its ssh server runs.",
        )
    )
