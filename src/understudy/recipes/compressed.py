"""The student between training and release: where its weights lie and how it is brought to life."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from understudy.artifacts import RECORD_NAME, Record
from understudy.data.decode import ResizeRule
from understudy.data.splits import spread
from understudy.evaluate.budget import Budget
from understudy.export.target import ExportSource, Precision
from understudy.models.reshape import apply_channel_shapes
from understudy.recipes.networks import build_model, load_stored
from understudy.recipes.run import Run

KIND = "compression"
SHAPES_NAME = "shapes.json"
PREPARED_NAME = "prepared.safetensors"
# Ranges are set by a few hundred pictures; more changes nothing that validation could show.
MAX_CALIBRATION_IMAGES = 512
# What the ONNX file of a step can be asked for; training time is the student's own.
FILE_LIMITS = ("num_params", "macs", "model_size_bytes", "latency_ms", "peak_memory_bytes")
# Those that the ranges of quantisation-aware training begin with.
MAX_FIRST_IMAGES = 256


@dataclass(frozen=True)
class Network:
    """A state of the student, as the records of the steps name it.

    Attributes:
        weights: the folder in the run that holds ``model.safetensors``.
        shapes: the folder that holds the channel counts of a pruned one; None: as built.
        aware: the folder that holds the state after quantisation-aware training; None: there was
            none.
        precision: of the files that are made from it.
        float_layers: modules that stay in float in an int8 file.
    """

    weights: str = "student"
    shapes: str | None = None
    aware: str | None = None
    precision: Precision = "float32"
    float_layers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the state as a plain dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the state that ``to_json`` wrote."""
        return cls(**{**values, "float_layers": tuple(values["float_layers"])})


def load_network(run: Run, network: Network) -> nn.Module:
    """Return the float network of a state, in evaluation mode."""
    model = shaped_model(run, network)
    load_stored(run, model, network.weights, name=run.recipe.student.model.name)
    return model.eval()


def shaped_model(run: Run, network: Network) -> nn.Module:
    """Return the student as built, brought to the channel counts of a state."""
    model: nn.Module = build_model(run, "student")
    if network.shapes is not None:
        path = run.folder / network.shapes / SHAPES_NAME
        model = apply_channel_shapes(model, json.loads(path.read_text()))
    return model


def calibration_images(run: Run) -> Tensor:
    """Return uint8 images of the calibration split; none where there is no such split."""
    return run.source.images(spread(run.splits.calibration, MAX_CALIBRATION_IMAGES))


def resize_rule(run: Run) -> ResizeRule:
    """Return what becomes of a picture of another size: what loading did to the training data."""
    resized = run.recipe.data.image_size is not None
    return "stretch" if resized else "shorter_side_center_crop"


def export_source(run: Run, network: Network, *, recipe_hash: str = "") -> ExportSource:
    """Return what the targets export from.

    Args:
        recipe_hash: the key of the network's record, for files that are to name it.
    """
    model = load_network(run, network)
    named = {"recipe_hash": recipe_hash} if recipe_hash else {}
    source = ExportSource(
        model=model,
        image_shape=run.source.image_shape,
        class_names=tuple(run.source.class_names),
        calibration_NCHW=calibration_images(run),
        float_layers=network.float_layers,
        metadata={**named, "resize": resize_rule(run)},
        opset=run.recipe.export.opset,
    )
    if network.aware is None:
        return source
    from understudy.compress.quantize import convert_qat

    prepared = prepared_network(run, model, network.float_layers)
    prepared.load_state_dict(load_file(run.folder / network.aware / PREPARED_NAME))
    return replace(source, quantized=convert_qat(prepared))


def prepared_network(run: Run, model: nn.Module, float_layers: tuple[str, ...], **arguments: Any):  # type: ignore[no-untyped-def]
    """Return the network that quantisation-aware training begins with: always the same one."""
    from understudy.compress.quantize import prepare_qat

    # The ranges begin with pictures that nothing is chosen by.
    images_NCHW = run.source.images(spread(run.splits.calibration, MAX_FIRST_IMAGES))
    torch.manual_seed(run.seed_for("weights", "quantize"))
    return prepare_qat(model, example_NCHW=images_NCHW, float_layers=float_layers, **arguments)


def current_compression(run: Run) -> Record | None:
    """Return the compression of the run's student and recipe as they are now.

    None too where a step was begun anew since, with other settings, and compression did not end.
    """
    if not (run.folder / KIND / RECORD_NAME).exists():
        return None
    last = Record.load(run.folder / KIND)
    student = run.parent("student", "train")
    if last.parents.get("student") != student.hash or last.recipe != run.recipe.section(KIND):
        return None
    for kind in last.payload["steps"]:
        folder = run.folder / kind
        if not (folder / RECORD_NAME).exists():
            return None
        if Record.load(folder).hash != last.parents.get(kind):
            return None
    return last


def last_network(record: Record) -> Network:
    """Return the state that compression ended with."""
    return Network.from_json(record.payload["network"])


def steps_of(run: Run, compressed: Record) -> list[Record]:
    """Return the records of the steps of a compression, as it judged them.

    A step that the limits on shipped files took back is not kept, whatever its own gates said.
    """
    records = [Record.load(run.folder / kind) for kind in compressed.payload["steps"]]
    taken_back = compressed.payload.get("taken_back", {})
    return [
        replace(
            record, payload={**record.payload, "kept": False, "reason": taken_back[record.kind]}
        )
        if record.kind in taken_back
        else record
        for record in records
    ]


def file_budget(run: Run) -> Budget:
    """Return the limits that the ONNX file of a step can be asked for."""
    return Budget(**{name: getattr(run.recipe.budget, name) for name in FILE_LIMITS})


def onnx_path(run: Run, network: Network) -> Path:
    """Return the float32 ONNX file of a state that is not quantised."""
    if network.weights == "student":
        return run.folder / "export" / "student.onnx"
    return run.folder / network.weights / "student.onnx"
