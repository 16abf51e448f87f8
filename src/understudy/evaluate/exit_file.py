"""The exported file with the choice of its exit: whether it decides as the policy, and its time."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from understudy.errors import ParityError, problem
from understudy.evaluate.exit_policy import NEVER, ExitPolicy, confidences, leave_at
from understudy.evaluate.fresh_process import run_fresh
from understudy.evaluate.latency import measure_latency
from understudy.export.exits import ExitWriter, run_choice
from understudy.export.onnx_run import open_session
from understudy.export.parity import DEFAULT_TOLERANCE
from understudy.progress import Progress, silent

# Two runtimes round differently: so near to a threshold both decisions are right.
NEAR_THRESHOLD = 1e-4


@dataclass(frozen=True)
class ChoiceParity:
    """The file in ONNX Runtime, one picture at a time, against the policy on PyTorch's logits.

    Attributes:
        num_images: pictures compared.
        num_same_exit: of them left at the same exit.
        num_near: of them left at another, with a confidence within 1e-4 of a threshold.
        max_abs_difference: largest |difference| of a logit from those of the exit it left at.
        tolerance: the largest difference allowed.
        batch_agrees: all pictures in one batch leave together where the policy says.
        passed: everything agrees.
    """

    num_images: int
    num_same_exit: int
    num_near: int
    max_abs_difference: float
    tolerance: float
    batch_agrees: bool
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Return the result as a plain dict."""
        return asdict(self)


def check_choice(
    path: Path,
    images_NCHW: Tensor,
    logits_ENK: Tensor,
    policy: ExitPolicy,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
) -> ChoiceParity:
    """Compare decisions and logits of a file with those of the policy it was written for.

    Args:
        path: a file of ``ExitWriter``.
        images_NCHW: uint8, real ones.
        logits_ENK: PyTorch's for these pictures, of every exit.
        policy: what the file was written for.
        tolerance: relative to the largest |logit| (at least 1).

    Raises:
        ParityError: they do not agree.
    """
    session = open_session(path)
    answers = [run_choice(session, image) for image in torch.split(images_NCHW, 1)]
    found_N = torch.tensor([number for _, number in answers])
    confidences_EN = confidences(logits_ENK, policy.temperatures)
    expected_N = leave_at(confidences_EN, policy.thresholds)
    limits_E1 = torch.tensor(policy.thresholds)[:, None]
    near_N = ((confidences_EN[:-1] - limits_E1).abs() < NEAR_THRESHOLD).any(dim=0)
    file_NK = torch.cat([logits_NK for logits_NK, _ in answers])
    model_NK = logits_ENK[found_N, torch.arange(len(found_N))]
    difference = (file_NK.double() - model_NK.double()).abs().max().item()
    allowed = tolerance * max(1.0, logits_ENK.abs().max().item())
    _, together = run_choice(session, images_NCHW)
    # The least sure picture of a batch decides for all.
    least_E1 = confidences_EN.min(dim=1, keepdim=True).values
    batch_agrees = together == int(leave_at(least_E1, policy.thresholds)[0]) or bool(near_N.any())
    differs_N = found_N != expected_N
    agrees = difference <= allowed and not bool((differs_N & ~near_N).any())
    parity = ChoiceParity(
        num_images=len(found_N),
        num_same_exit=int((~differs_N).sum()),
        num_near=int((differs_N & near_N).sum()),
        max_abs_difference=difference,
        tolerance=allowed,
        batch_agrees=batch_agrees,
        passed=agrees and batch_agrees,
    )
    if not parity.passed:
        raise ParityError(
            problem(
                f"{path} leaves at the policy's exit for {parity.num_same_exit} of "
                f"{parity.num_images} images{'' if batch_agrees else ', not for their batch'}; "
                f"its logits differ by up to {difference:.3g}",
                expected=f"the same exits, and a difference of at most {allowed:.3g}",
                mend="Export again; if this stays, one of its layers is translated wrongly.",
            )
        )
    return parity


def exit_latencies_ms(
    writer: ExitWriter,
    images_NCHW: ArrayLike,
    *,
    num_threads: int = 1,
    min_seconds: float = 1.0,
    progress: Progress = silent,
) -> tuple[float, ...]:
    """Return the median time of a picture that leaves at each exit, each in a fresh process.

    Measured are files that send every picture out at one exit, past the heads and decisions of the
    exits before.

    Args:
        writer: of the network.
        images_NCHW: uint8, real ones.
        num_threads: of ONNX Runtime.
        min_seconds: time spent on each exit.
        progress: told the number of exits done.
    """
    medians = []
    num_exits = writer.num_exits
    with TemporaryDirectory(prefix="understudy-") as folder:
        for number in range(num_exits):
            progress(number, num_exits, f"exit {number}")
            thresholds = [0.0 if k == number else NEVER for k in range(num_exits - 1)]
            path = Path(folder) / f"exit_{number}.onnx"
            writer.write_choice(path, thresholds=thresholds, temperatures=[1.0] * num_exits)
            measured = measure_latency(
                path,
                images_NCHW,
                batch_sizes=[1],
                num_threads=[num_threads],
                min_seconds=min_seconds,
            )
            medians.append(measured.measurements[0].p50_ms)
    return tuple(medians)


def mean_time_ms(
    path: Path, images_NCHW: Tensor, *, num_threads: int = 1, min_seconds: float = 1.0
) -> float:
    """Return the mean over pictures of each one's median time, run alone and all in turn.

    Pictures differ in where they leave, so a median over all would be that of one exit; a mean over
    the runs would count what else the machine did.
    """
    result = run_fresh(
        path,
        images_NCHW.numpy(),
        batch_size=1,
        num_threads=num_threads,
        num_batches=len(images_NCHW),
        min_seconds=min_seconds,
    )
    times_ns, num_images = result["times_ns"], len(images_NCHW)
    # Some pictures ran once more than others; a picture that did not run does not count.
    medians_ns = [
        statistics.median(times_ns[first::num_images])
        for first in range(min(num_images, len(times_ns)))
    ]
    return statistics.fmean(medians_ns) / 1e6
