"""The step that makes the student int8: calibrated after training, or learnt in more training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from understudy.compress.quantize import QatNetwork, check_layers, float_weights
from understudy.compress.sensitivity import LayerSensitivity, choose_float_layers, sensitivity
from understudy.compress.settings import QuantizeStep
from understudy.errors import InputError, ModelError
from understudy.evaluate.accuracy import predict_logits
from understudy.export.onnx_run import onnx_logits
from understudy.export.target import find_target
from understudy.export.tracing import inside
from understudy.models.cost import model_cost
from understudy.progress import log
from understudy.recipes.compressed import (
    PREPARED_NAME,
    Network,
    calibration_images,
    export_source,
    load_network,
    prepared_network,
)
from understudy.recipes.further_training import further_plan
from understudy.recipes.networks import WEIGHTS_NAME
from understudy.recipes.prune_step import FILE_NAME, Made, save_state
from understudy.recipes.run import Run, Stage
from understudy.recipes.train import run_training
from understudy.train.plan import TrainPlan

# The last share of quantisation-aware training learns the network as it will run.
FROZEN_SHARE = 0.25

Judge = Callable[[Tensor], bool]


def quantize_step(
    run: Run, stage: Stage, step: QuantizeStep, before: Network, *, judge: Judge
) -> Made:
    """Make the int8 file, with the named layers in float and as few others as the gates ask for.

    Args:
        judge: whether answers on the validation split keep the gates on accuracy.

    Raises:
        InputError: a named layer is not in the student.
    """
    if problems := check_layers(load_network(run, before), step.float_layers):
        raise InputError(*problems)
    network = Network(before.weights, before.shapes, None, "int8", step.float_layers)
    details: dict[str, Any] = {}
    if step.method == "aware":
        network = aware_network(run, stage, step, before)
    logits_NK = int8_logits(run, network, stage.folder)
    if step.max_float_layers:
        rows = layer_sensitivity(run, network)
        details["sensitivity"] = [row.to_json() for row in rows]
        if not judge(logits_NK):
            more = layers_in_float(run, network, stage.folder, rows, step.max_float_layers, judge)
            network = replace(network, float_layers=(*step.float_layers, *more))
            logits_NK = int8_logits(run, network, stage.folder)
    model = load_network(run, network)
    cost = model_cost(model, run.source.image_shape)
    float_logits_NK = predict_logits(model, run.source, run.splits.validation)
    labels_N = run.source.labels_N[run.splits.validation]
    details["float_accuracy"] = (float_logits_NK.argmax(1) == labels_N).double().mean().item()
    files = [FILE_NAME]
    if network.aware is not None:
        files += [WEIGHTS_NAME, PREPARED_NAME]
    return Made(
        name=f"quantize ({step.method})",
        network=network,
        logits_NK=logits_NK,
        num_params=cost.num_params,
        macs=cost.macs,
        file=FILE_NAME,
        files=tuple(files),
        details=details,
    )


def int8_logits(run: Run, network: Network, folder: Path) -> Tensor:
    """Write the int8 ONNX file of a state and return its answers on the validation split."""
    find_target("onnx").export(export_source(run, network), folder, precision="int8")
    return onnx_logits(folder / FILE_NAME, run.source, run.splits.validation)


def aware_network(run: Run, stage: Stage, step: QuantizeStep, before: Network) -> Network:
    """Train with int8 arithmetic; write the state of that, and the float weights it left."""
    assert step.training is not None, "the step trains"
    prepare = partial(aware_training, step=step, before=before)
    folder = stage.folder / "training"
    run_training(run, "student", folder, precision=step.training.precision, prepare=prepare)
    model = load_network(run, before)
    prepared: QatNetwork = prepared_network(run, model, step.float_layers)
    prepared.load_state_dict(load_file(folder / WEIGHTS_NAME))
    save_state(prepared, stage.folder / PREPARED_NAME)
    save_state(float_weights(prepared, model), stage.folder / WEIGHTS_NAME)
    return Network(stage.kind, before.shapes, stage.kind, "int8", step.float_layers)


def aware_training(
    run: Run, role: str, folder: Path, *, step: QuantizeStep, before: Network
) -> tuple[nn.Module, TrainPlan]:
    """Return the network that rounds, and what it is trained with."""
    settings = step.training
    assert settings is not None, "the step trains"
    model = load_network(run, before)
    plan = further_plan(run, model, step, phase="quantize", folder=folder)
    num_passes = settings.num_epochs * plan.feed.num_batches * settings.num_micro_batches
    freeze_after = math.ceil((1 - FROZEN_SHARE) * num_passes)
    return prepared_network(run, model, step.float_layers, freeze_after=freeze_after), plan


def layer_sensitivity(run: Run, network: Network) -> tuple[LayerSensitivity, ...]:
    """Return what each layer loses alone on the validation split: a pass over it for each."""
    indices_N = run.splits.validation
    return sensitivity(
        load_network(run, network),
        run.source.images(indices_N),
        run.source.labels_N[indices_N],
        calibration_NCHW=calibration_images(run),
    )


def layers_in_float(
    run: Run,
    network: Network,
    folder: Path,
    rows: Sequence[LayerSensitivity],
    at_most: int,
    judge: Judge,
) -> tuple[str, ...]:
    """Return the fewest of the worst layers that must stay in float besides the network's own."""
    named = network.float_layers
    in_int8 = [row for row in rows if not inside(row.name, named)]

    def passes(layers: tuple[str, ...]) -> bool:
        kept = replace(network, float_layers=(*named, *layers))
        return judge(int8_logits(run, kept, folder))

    try:
        chosen = choose_float_layers(in_int8, passes, max_float_layers=at_most)
    except ModelError as error:  # the gate then takes the step back, with its own reason
        log.warning("%s", "; ".join(error.problems))
        chosen = ()
    log.info("in float: %s", ", ".join((*named, *chosen)) or "nothing")
    return chosen
