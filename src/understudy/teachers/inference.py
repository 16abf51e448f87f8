"""The fastest way to run a given teacher on this machine, and proof that it is still that teacher.

Float32 runtimes are candidates: PyTorch as it stands, PyTorch with batch norm folded into the
convolutions and channels last, the same with native convolutions, ONNX Runtime. The fastest whose
outputs agree with plain PyTorch is taken. Bfloat16 and int8 change the outputs materially, so they
are only ever chosen by name, and their name is part of the address under which outputs are stored.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.errors import InputError, ModelError, problem
from understudy.models.taps import Tap
from understudy.runtime import derive_seed
from understudy.teachers.outputs import TeacherOutputs
from understudy.teachers.runtimes import NATIVE, Run, plain_pytorch, runtimes

__all__ = ["NATIVE", "PRECISIONS", "Candidate", "Inference", "fast_inference"]

log = logging.getLogger("understudy")

PRECISIONS = ("auto", "float32", "bfloat16", "int8")

# Largest difference of a number between float32 runtimes, as a share of the largest one. A
# ResNet-56 gave 5e-7 (2e-6 in native convolutions); float16 storage rounds by up to 5e-4.
TOLERANCE = 1e-4
NUM_TIMED_IMAGES = 64
NUM_TIMED_RUNS = 3
MIN_CALIBRATION_IMAGES = 32

# A ResNet-56 took 8 s to export and then ran a quarter faster.
MIN_SECONDS_TO_EXPORT = 40.0


@dataclass(frozen=True)
class Candidate:
    """One runtime as measured on the sample images.

    Attributes:
        runtime: its name.
        images_per_second: throughput of its fastest timed run; 0 where it could not be used.
        max_abs_difference: largest difference of a logit from plain PyTorch.
        feature_difference: largest difference of a feature, as a share of its tap's largest value.
        kl: mean KL divergence of its probabilities from plain PyTorch's, in nats.
        agreement: share of the sample images with the same first class.
        refusal: why it could not be used; None where it could.
    """

    runtime: str
    images_per_second: float = 0.0
    max_abs_difference: float = 0.0
    feature_difference: float = 0.0
    kl: float = 0.0
    agreement: float = 1.0
    refusal: str | None = None


@dataclass(frozen=True)
class Inference:
    """A teacher ready to run: call it with uint8 images NCHW, get float32 logits_NK on the CPU.

    ``outputs`` gives the features of the taps beside them, from the same pass.

    Attributes:
        precision: "float32", "bfloat16" or "int8": what changes outputs materially, and part of
            the address of stored outputs.
        runtime: the candidate that was chosen.
        candidates: everything that was measured; empty where only one runtime was possible.
        taps: whose features ``outputs`` gives.
    """

    run: Run
    precision: str
    runtime: str
    candidates: tuple[Candidate, ...]
    taps: tuple[Tap, ...] = ()

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        with torch.no_grad():
            return self.run(images_NCHW)[0].float().cpu()

    def outputs(self, images_NCHW: Tensor) -> TeacherOutputs:
        """Return logits and features by ``Tap.key``, float32 on the CPU."""
        with torch.no_grad():
            logits_NK, features = self.run(images_NCHW)
        on_cpu = {tap.key: features[tap.key].float().cpu() for tap in self.taps}
        return TeacherOutputs(logits_NK.float().cpu(), on_cpu)


def fast_inference(
    model: nn.Module,
    *,
    image_shape: tuple[int, int, int],
    precision: str = "auto",
    device: str = "cpu",
    sample_images_NCHW: Tensor | None = None,
    runtime: str | None = None,
    num_images: int | None = None,
    taps: Sequence[Tap] = (),
) -> Inference:
    """Return the teacher in the fastest runtime of the asked precision.

    Args:
        model: uint8 images NCHW to logits_NK. It is put into evaluation mode, and copied where a
            runtime changes it.
        image_shape: (C, H, W).
        precision: "auto" measures all float32 runtimes and takes the fastest; "float32" is PyTorch
            without measuring (the same on every machine); "bfloat16" and "int8" are other numbers.
        device: "cpu" or a CUDA device.
        sample_images_NCHW: real images, uint8, to measure on; int8 is calibrated on them.
            None measures on noise.
        runtime: the name of the runtime to use, as an earlier call chose it; nothing is measured.
            Runtimes of one precision differ in the last bits, which a resumed job may not.
        num_images: how many images are to be run. Exporting to ONNX takes some seconds and is not
            tried where all of them take less than ``MIN_SECONDS_TO_EXPORT``. None: very many.
        taps: layers whose features are wanted beside the logits; a runtime has to agree in them
            too, and is timed with them.

    Raises:
        ModelError: the network has no such layer (``models.taps.check_taps`` says it before); or
            its answers to the sample images are not finite, or other ones each time.
        InputError: unknown precision, int8 without enough real images or on another device, or a
            runtime that this precision and device do not have.
    """
    _check(precision, device, sample_images_NCHW)
    taps = tuple(dict.fromkeys(taps))
    model = model.eval().to(device)
    if sample_images_NCHW is None:
        generator = torch.Generator().manual_seed(derive_seed(0, "inference", "sample"))
        sample_images_NCHW = torch.randint(
            256, (NUM_TIMED_IMAGES, *image_shape), dtype=torch.uint8, generator=generator
        )
    builders = runtimes(model, device, precision, sample_images_NCHW, taps)
    arithmetic = "float32" if precision == "auto" else precision
    if runtime is None and precision != "float32":
        timed_images_NCHW = sample_images_NCHW[:NUM_TIMED_IMAGES]
        reference = plain_pytorch(model, device, taps)
        chosen = _fastest(builders, reference, timed_images_NCHW, arithmetic, num_images)
        return replace(chosen, taps=taps)
    runtime = runtime or "pytorch"
    if runtime not in builders:
        raise InputError(
            problem(
                f"the runtime '{runtime}' for precision '{precision}' on '{device}'",
                expected=", ".join(builders),
                mend="Leave it out to have the fastest one measured.",
            )
        )
    return Inference(builders[runtime](), arithmetic, runtime, (), taps)


def _check(precision: str, device: str, sample_images_NCHW: Tensor | None) -> None:
    problems = []
    if precision not in PRECISIONS:
        problems.append(
            problem(
                f"the teacher's precision is '{precision}'",
                expected=", ".join(PRECISIONS),
                mend="Use auto for exact outputs as fast as this machine gives them.",
            )
        )
    num_images = 0 if sample_images_NCHW is None else len(sample_images_NCHW)
    if precision == "int8" and (device != "cpu" or num_images < MIN_CALIBRATION_IMAGES):
        problems.append(
            problem(
                f"int8 on '{device}' with {num_images} images to calibrate on",
                expected=f"the CPU and at least {MIN_CALIBRATION_IMAGES} real images",
                mend="Give images of the calibration split, or use precision auto.",
            )
        )
    if problems:
        raise InputError(*problems)


def _fastest(
    builders: dict[str, Callable[[], Run]],
    reference: Run,
    images_NCHW: Tensor,
    precision: str,
    num_images: int | None,
) -> Inference:
    with torch.no_grad():
        expected = reference(images_NCHW)
    _check_finite(*expected)
    limit = TOLERANCE * max(1.0, expected[0].abs().max().item())
    runs: dict[str, Run] = {}
    candidates: list[Candidate] = []
    for runtime, build in builders.items():
        if runtime == "onnxruntime" and _soon_done(candidates, num_images):
            candidates.append(Candidate(runtime, refusal="too few images to repay the export"))
            continue
        try:
            run = build()
            candidate = _measured(runtime, run, images_NCHW, expected)
        except Exception as error:
            if precision != "float32" or runtime == "pytorch":
                raise
            # A teacher that a faster runtime cannot take is no error: the plain one can.
            refusal = str(error).splitlines()[0][:200] if str(error) else repr(error)
            log.debug("%s cannot run this teacher: %s", runtime, refusal)
            candidates.append(Candidate(runtime, refusal=refusal))
            continue
        why = _disagreement(candidate, limit) if precision == "float32" else None
        if why is not None:
            candidate = Candidate(runtime, max_abs_difference=math.inf, refusal=why)
        candidates.append(candidate)
        runs[runtime] = run
    usable = [candidate for candidate in candidates if candidate.refusal is None]
    if not usable:  # plain PyTorch itself disagrees with plain PyTorch
        raise ModelError(
            problem(
                "the teacher answers the same pictures differently each time "
                f"({candidates[0].runtime} {candidates[0].refusal})",
                expected="the same answers from a network in evaluation mode",
                mend="Take randomness, such as a dropout that is always on, out of its forward.",
            )
        )
    best = max(usable, key=lambda candidate: candidate.images_per_second)
    log.info(
        "The teacher runs in %s: %.0f images/s, outputs within %.2g of plain PyTorch, "
        "KL %.2g, same class in %.2f %%",
        best.runtime,
        best.images_per_second,
        best.max_abs_difference,
        best.kl,
        100 * best.agreement,
    )
    return Inference(runs[best.runtime], precision, best.runtime, tuple(candidates))


def _check_finite(logits_NK: Tensor, features: dict[str, Tensor]) -> None:
    for what, values in {"answers": logits_NK, **features}.items():
        bad_N = ~torch.isfinite(values.flatten(1)).all(dim=1)
        if bad_N.any():
            named = what if what == "answers" else f"features '{what}'"
            raise ModelError(
                problem(
                    f"the teacher's {named} are not finite for {int(bad_N.sum())} of "
                    f"{len(bad_N)} sample pictures",
                    expected="finite numbers for every picture",
                    mend="Take weights from a training that did not diverge, and compare the "
                    "teacher's normalization with the one it was trained with.",
                )
            )


def _soon_done(candidates: list[Candidate], num_images: int | None) -> bool:
    if num_images is None:
        return False
    fastest = max(candidate.images_per_second for candidate in candidates)
    return num_images < fastest * MIN_SECONDS_TO_EXPORT


def _disagreement(candidate: Candidate, limit: float) -> str | None:
    # Written so that NaN disagrees.
    if not candidate.max_abs_difference <= limit:
        return f"differs by {candidate.max_abs_difference:.2g}, more than {limit:.2g}"
    if not candidate.feature_difference <= TOLERANCE:
        return f"features differ by {candidate.feature_difference:.2g}, more than {TOLERANCE:.2g}"
    return None


def _measured(
    runtime: str, run: Run, images_NCHW: Tensor, expected: tuple[Tensor, dict[str, Tensor]]
) -> Candidate:
    seconds = []
    with torch.no_grad():
        logits_NK, features = run(images_NCHW)
        for _ in range(NUM_TIMED_RUNS):
            started = time.perf_counter()
            run(images_NCHW)[0].cpu()
            seconds.append(time.perf_counter() - started)
    logits_NK, expected_NK = logits_NK.float().cpu(), expected[0].float().cpu()
    kl = F.kl_div(
        logits_NK.log_softmax(1), expected_NK.log_softmax(1), log_target=True, reduction="batchmean"
    )
    same_class = logits_NK.argmax(1) == expected_NK.argmax(1)
    shares = [_share(features[key], values) for key, values in expected[1].items()]
    return Candidate(
        runtime,
        images_per_second=len(images_NCHW) / min(seconds),
        max_abs_difference=(logits_NK - expected_NK).abs().max().item(),
        feature_difference=max(shares, default=0.0),
        kl=max(0.0, kl.item()),
        agreement=same_class.float().mean().item(),
    )


def _share(features: Tensor, expected: Tensor) -> float:
    if features.shape != expected.shape:
        return math.inf
    largest = expected.abs().max().item()
    difference = (features.float() - expected.float()).abs().max().item()
    return difference / largest if largest else math.inf if difference else 0.0
