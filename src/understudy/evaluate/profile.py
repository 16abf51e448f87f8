"""What ``understudy profile`` prints: one artifact, or a network's operators, or two compared."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from understudy.errors import InputError, MissingExtraError, problem
from understudy.evaluate.artifact_profile import ArtifactProfile, profile_artifact
from understudy.evaluate.compare import Comparison, compare_artifacts
from understudy.evaluate.devices import Device, load_device
from understudy.evaluate.fresh_process import describe_fresh
from understudy.evaluate.page_profile import PageProfile, is_page, profile_page
from understudy.evaluate.profile_network import (
    DEFAULT_CLASSES,
    DEFAULT_SHAPE,
    ImageShape,
    exported_network,
    is_network_name,
    named_network,
)
from understudy.evaluate.remote import Ssh
from understudy.evaluate.runtime_files import RuntimeFile, runtime_file
from understudy.export.target_names import TARGETS
from understudy.models.catalog import CATALOG, PREFIXES, nearest
from understudy.progress import shown_progress
from understudy.runtime import num_usable_cores

if TYPE_CHECKING:
    from understudy.evaluate.operators import OperatorTable

# A name and a folder to a file that is written there; None where it names nothing of the kind.
FindNetwork = Callable[[str, Path], RuntimeFile | None]
SEED = 0


@dataclass(frozen=True)
class ProfileAnswer:
    """What was found out; ``--json`` prints it as it is, otherwise the texts stand in a row."""

    profile: ArtifactProfile | PageProfile
    operators: OperatorTable | None
    comparison: Comparison | None

    def to_json(self) -> dict[str, Any]:
        """Return the parts as plain dicts; None where there is none."""
        return {
            "profile": self.profile.to_json(),
            "operators": None if self.operators is None else self.operators.to_json(),
            "comparison": None if self.comparison is None else self.comparison.to_json(),
        }

    def to_text(self) -> str:
        """Return the parts as text, an empty line between them."""
        parts = (self.profile, self.operators, self.comparison)
        return "\n\n".join(part.to_text() for part in parts if part is not None)


@dataclass(frozen=True)
class Asked:
    """What a network is built with, where it does not say so itself; None: the defaults."""

    shape: ImageShape | None
    classes: int | None
    find_network: FindNetwork
    host: str | None


def profile_command(
    target: str,
    *,
    against: str | None = None,
    device: str | None = None,
    host: str | None = None,
    batches: Sequence[int] | None = None,
    threads: Sequence[int | str] | None = None,
    as_json: bool = False,
    shape: str | None = None,
    classes: int | None = None,
    ssh_options: Sequence[str] = (),
    python: str = "python3",
    runtime: str | None = None,
    find_network: FindNetwork = lambda name, folder: None,
) -> str:
    """Return what the command prints.

    The pixels are random ones of a fixed seed: speed does not depend on them.

    Args:
        target: an exported file, a folder that holds one, a network's name as ``build_network``
            takes it, which is run as eager PyTorch, or what ``find_network`` knows.
        against: another one, or for a network an export target to export it for; it is the
            reference of the ratios.
        device: a device profile, by name or file, whose limits are judged.
        host: ``user@device[:port]`` to measure ``target`` on; nothing is compared there.
        batches: None: 1 and 100, of a file for microcontrollers 1.
        threads: numbers or "all"; None: those of the device's profile, 1 without one.
        shape: "C,H,W" of the pictures; None: as the file says, or 3,32,32 for a named network.
        classes: of a named network; None: 10.
        ssh_options: of ssh, each ``Name=value``, such as ``IdentityFile=PATH``.
        python: Python on the host.
        runtime: an export target that runs ``target``; None: the one that a release's record
            names, or by the file's suffix. A page ("web") is run in a browser.
        find_network: writes a file for networks that only a caller knows, those of runs.

    Raises:
        InputError: what was given is wrong.
        MissingExtraError, UnderstudyError: as ``profile_artifact`` and ``compare_artifacts``.
    """
    profile_of = None if device is None else load_device(device)
    if _is_page(target, runtime):
        options: dict[str, Any] = {"--against": against, "--host": host, "--shape": shape}
        options |= {"--batch": batches, "--threads": threads}
        page = profile_page(Path(target), device=profile_of, options=options)
        return _shown(ProfileAnswer(page, None, None), as_json=as_json)
    ssh = None if host is None else Ssh(host, options=tuple(ssh_options), python=python)
    counts = _thread_counts(threads or (profile_of.threads if profile_of else 1,), host=host)
    _check(batches or (1,), classes, names=(target, against or ""), against=against, ssh=ssh)
    asked = Asked(None if shape is None else parse_shape(shape), classes, find_network, host)
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        file = _resolve(target, asked, Path(folder) / "target", runtime)
        image_shape = asked.shape or _image_shape(file)
        asked = replace(asked, shape=image_shape)
        place = Path(folder) / "against"
        other = None if against is None else _other(against, file, asked, place)
        settings = {"batch_sizes": tuple(batches or _usual_batches(file)), "num_threads": counts}
        answer = _measured(target, file, other, image_shape, settings, device=profile_of, ssh=ssh)
    return _shown(answer, as_json=as_json)


def _usual_batches(file: RuntimeFile) -> tuple[int, ...]:
    # The interpreter for microcontrollers is slow here and takes one picture at a time.
    return (1,) if file.runtime == "tflm" else (1, 100)


def _measured(
    target: str,
    file: RuntimeFile,
    other: RuntimeFile | None,
    image_shape: ImageShape,
    settings: dict[str, Any],
    *,
    device: Device | None,
    ssh: Ssh | None,
) -> ProfileAnswer:
    random = np.random.default_rng(SEED)
    shape = (max(settings["batch_sizes"]), *image_shape)
    images_NCHW = random.integers(0, 256, shape, dtype=np.uint8)
    with shown_progress(f"measuring {target}") as progress:
        profile = profile_artifact(
            file, images_NCHW, **settings, device=device, ssh=ssh, progress=progress
        )
    operators = comparison = None
    if ssh is None:
        operators = _operators(target, file, images_NCHW, settings["num_threads"][0])
    if other is not None:
        with shown_progress(f"comparing with {other.label}") as progress:
            comparison = compare_artifacts(
                [other, file], images_NCHW, **settings, progress=progress
            )
    return ProfileAnswer(profile, operators, comparison)


def _shown(answer: ProfileAnswer, *, as_json: bool) -> str:
    return json.dumps(answer.to_json(), indent=2) if as_json else answer.to_text()


def _is_page(target: str, runtime: str | None) -> bool:
    """Return whether a browser is to run it; refuse a runtime that there is none of."""
    if runtime is not None and runtime not in TARGETS:
        raise InputError(
            problem(
                f"there is no runtime '{runtime}'{nearest(runtime, list(TARGETS))}",
                expected=f"one of {', '.join(TARGETS)}",
                mend="Correct --runtime.",
            )
        )
    return Path(target).exists() and is_page(Path(target), runtime)


def parse_shape(text: str) -> ImageShape:
    """Return (C, H, W) of "C,H,W".

    Raises:
        InputError: it is something else.
    """
    parts = text.replace("x", ",").split(",")
    if len(parts) == 3 and all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        channels, height, width = (int(part) for part in parts)
        return channels, height, width
    raise InputError(
        problem(
            f"the shape of the pictures is '{text}'",
            expected="channels, height and width, such as 3,32,32",
            mend="Correct it.",
        )
    )


def _thread_counts(threads: Sequence[int | str], *, host: str | None) -> tuple[int, ...]:
    if "all" in threads and host is not None:
        raise InputError(
            problem(
                "--threads all together with --host",
                expected="a number: the other machine has its own",
                mend="Give the number.",
            )
        )
    counts = [
        num_usable_cores() if text == "all" else int(text) if str(text).isdecimal() else 0
        for text in threads
    ]
    if min(counts) < 1:
        raise InputError(
            problem(
                f"--threads is {', '.join(map(str, threads))}",
                expected="whole numbers of at least 1, or all",
                mend="Correct it.",
            )
        )
    return tuple(sorted(set(counts)))


def _check(
    batch: Sequence[int],
    classes: int | None,
    *,
    names: Sequence[str],
    against: str | None,
    ssh: Ssh | None,
) -> None:
    problems = []
    if min(batch) < 1:
        problems.append(
            problem(
                f"--batch is {', '.join(map(str, batch))}",
                expected="whole numbers of at least 1",
                mend="Correct it.",
            )
        )
    if classes is not None and (classes < 1 or not any(map(is_network_name, names))):
        given = f"--classes is {classes}"
        given += " without the name of a network" if classes >= 1 else ""
        problems.append(
            problem(
                given,
                expected="a whole number of at least 1, for a network that is given by name",
                mend="Correct or drop it: files and runs have their classes.",
            )
        )
    if against is not None and ssh is not None:
        problems.append(
            problem(
                "--against together with --host",
                expected="one of them: files are compared on this machine",
                mend="Drop one, or run the command on that machine.",
            )
        )
    if ssh is not None:
        ssh.command()
    if problems:
        raise InputError(*problems)


def _resolve(target: str, asked: Asked, folder: Path, runtime: str | None = None) -> RuntimeFile:
    """Return the file to run: the user's, or one that describes a network, written to folder."""
    file = asked.find_network(target, folder)
    if file is None and is_network_name(target):
        file = named_network(
            target,
            folder,
            image_shape=asked.shape or DEFAULT_SHAPE,
            num_classes=asked.classes or DEFAULT_CLASSES,
        )
    if file is not None:
        _check_network(target, file, asked, runtime)
        return file
    path = Path(target)
    if not path.exists():
        forms = ("module:callable", *PREFIXES.values())
        raise InputError(
            problem(
                f"there is no file '{target}'{nearest(target, list(CATALOG))}",
                expected="an exported file, a run folder, a recipe ending in .yaml, or a network: "
                f"{', '.join((*CATALOG, *forms))}",
                mend="Correct it.",
            )
        )
    return runtime_file(path, runtime)


def _check_network(target: str, file: RuntimeFile, asked: Asked, runtime: str | None) -> None:
    """Refuse a network that is to be run as something else than it is, or elsewhere."""
    if asked.host is not None:
        raise InputError(
            problem(
                f"--host with the network '{target}', which PyTorch and this package run",
                expected="an exported file, which its runtime alone runs there",
                mend="Export it first, and name that file.",
            )
        )
    if runtime not in (None, file.runtime):
        raise InputError(
            problem(
                f"--runtime {runtime} with the network '{target}', which PyTorch runs",
                expected="an exported file",
                mend=f"Name a file, or compare with it: --against {runtime}.",
            )
        )
    if asked.shape is not None and asked.shape != (own_shape := _image_shape(file)):
        raise InputError(
            problem(
                f"the pictures are {asked.shape} and those of {target} {own_shape}",
                expected="pictures of one shape",
                mend="Leave --shape out, or compare networks for the same pictures.",
            )
        )


def _image_shape(file: RuntimeFile) -> ImageShape:
    told: Any = None
    if file.runtime == "onnx":
        told = _onnx_shape(file.path)
    elif file.runtime == "eager":  # no other runtime tells it
        told = describe_fresh(file)["facts"].get("image_shape")
    if told is None or len(told) != 3 or not all(isinstance(size, int) for size in told):
        raise InputError(
            problem(
                f"{file.path} does not say what pictures it takes",
                expected="their shape",
                mend="Give it: --shape C,H,W.",
            )
        )
    channels, height, width = told
    return channels, height, width


def _onnx_shape(path: Path) -> list[Any]:
    """Return sizes of the input but for its batch, without the packages that write such files."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise MissingExtraError("onnxruntime", "predict") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )
    # ONNX Runtime's exceptions have no common base but Exception.
    except Exception as error:
        raise InputError(
            problem(
                f"ONNX Runtime cannot load {path} ({error})",
                expected="an intact ONNX file",
                mend="Export the model again.",
            )
        ) from None
    return list(session.get_inputs()[0].shape[1:])


def _other(against: str, file: RuntimeFile, asked: Asked, folder: Path) -> RuntimeFile:
    """Return what the file is compared with."""
    if against in TARGETS and not Path(against).exists():
        return exported_network(against, file, folder)
    return _resolve(against, asked, folder)


def _operators(
    target: str, file: RuntimeFile, images_NCHW: np.ndarray, num_threads: int
) -> OperatorTable | None:
    # A machine that only runs files has no torch; the figures of the file are known all the same.
    if file.runtime not in ("onnx", "eager") or importlib.util.find_spec("torch") is None:
        return None
    import torch

    from understudy.evaluate.eager import EagerModel
    from understudy.evaluate.operators import torch_operators
    from understudy.evaluate.operators_onnx import onnx_operators

    batch_NCHW = torch.from_numpy(images_NCHW)
    if file.runtime == "onnx":
        return onnx_operators(file.path, batch_NCHW, num_threads=num_threads)
    model = EagerModel(file.path).model
    return torch_operators(model, batch_NCHW, name=target, num_threads=num_threads)
