"""The student's trunk in a file of its own, and embeddings that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from understudy.artifacts import Record, atomic_path, write_text
from understudy.data.batches import iter_view_batches
from understudy.data.view_spec import MIXING_TRANSFORMS
from understudy.data.views import Views
from understudy.export.parity import require_parity
from understudy.export.task_heads import TrunkRuntime, check_head_parity, export_head, export_trunk
from understudy.heads.tasks import EMBEDDING_TAP, OwnHead, Trunk, embed
from understudy.progress import log, shown_progress
from understudy.recipes.export import parity_pictures, parity_section
from understudy.recipes.head_settings import OWN_TASK
from understudy.recipes.label import uses_gpu
from understudy.recipes.networks import trained_model
from understudy.recipes.outputs import sample_pictures, spreads_sample
from understudy.recipes.run import Run
from understudy.teachers.inference import fast_inference

TRUNK_NAME = "trunk.onnx"
EMBEDDINGS_NAME = "embeddings.safetensors"
COMMANDS = {"student": "train"}
BATCH_SIZE = 500

# uint8 images_NCHW to embedding_ND.
Embed = Callable[[Tensor], Tensor]


def head_name(task: str) -> str:
    """Return the file name of a head."""
    return f"head_{task}.onnx"


def trunk_of(run: Run) -> Trunk:
    """Return the student up to its embedding."""
    student = trained_model(run, "student", run.parent("student", "train"))
    return Trunk(student, run.source.image_shape)


def export_own_trunk(run: Run) -> Record:
    """Write the trunk and the student's own classifier as files; together they are the student.

    Raises:
        ParityError: the two files together differ from the student.
    """
    student = run.parent("student", "train")
    section = run.recipe.section("export") | parity_section(run)
    stage = run.begin("trunk", section=section, parents={"student": student.hash})
    if stage.record is not None:
        return stage.record
    options, source = run.recipe.export, run.source
    trunk = trunk_of(run)
    trunk_path, head_path = stage.folder / TRUNK_NAME, stage.folder / head_name(OWN_TASK)
    facts = export_trunk(trunk, trunk_path, image_shape=source.image_shape, opset=options.opset)
    export_head(
        OwnHead(trunk, source.image_shape),
        head_path,
        trunk=trunk,
        task=OWN_TASK,
        class_names=source.class_names,
        opset=options.opset,
    )
    parity = check_head_parity(
        trunk.model,
        TrunkRuntime(trunk_path).add_head(OWN_TASK, head_path),
        OWN_TASK,
        source.images(parity_pictures(run)),
        tolerance=options.parity_tolerance,
    )
    require_parity(parity, trunk_path)
    log.info("trunk: %s, %d bytes, %d features", trunk_path, facts.size_bytes, trunk.width)
    payload = {
        "identity": trunk.identity(),
        "width": trunk.width,
        "facts": facts.to_json(),
        "parity": parity.to_json(),
    }
    return stage.finish(payload, files=[TRUNK_NAME, head_path.name])


def embeddings(run: Run, role: str, parts: Sequence[str]) -> dict[str, Tensor]:
    """Return float32 embedding_ND of the student or the teacher, computed where not stored yet.

    Every part is a stage of its own below ``embeddings/ROLE``: what is done is kept.

    Args:
        parts: "validation" or "test" for these splits as they are, "view-3" for that view of the
            training split, all in the order of the split.
    """

    @cache
    def embedder() -> Embed:
        return student_embedder(run) if role == "student" else teacher_embedder(run, role)

    return {part: _part(run, role, part, embedder) for part in parts}


def _part(run: Run, role: str, part: str, embedder: Callable[[], Embed]) -> Tensor:
    section: dict[str, Any] = {}
    if part.startswith("view-"):
        section = {"views_seed": run.views.seed, "transforms": head_transforms(run)}
    if role != "student":
        section |= answers_section(run)
    stage = run.begin(
        f"embeddings/{role}/{part}",
        section=section,
        parents={
            "split": run.parent("split", "teach").hash,
            role: run.parent(role, COMMANDS.get(role, "teach")).hash,
        },
    )
    path = stage.folder / EMBEDDINGS_NAME
    if stage.record is None:
        run_embed = embedder()
        rows, num_images, num_done = [], len(part_indices(run, part)), 0
        with shown_progress(f"embeddings of the {role}, {part}") as progress:
            for images_NCHW in part_images(run, part):
                rows.append(run_embed(images_NCHW))
                num_done += len(images_NCHW)
                progress(num_done, num_images)
        with atomic_path(path) as temporary:
            save_file({"embedding_ND": torch.cat(rows)}, temporary)
        stage.finish({"num_samples": num_images}, files=[EMBEDDINGS_NAME])
    return load_file(path)["embedding_ND"]


def answers_section(run: Run) -> dict[str, Any]:
    """Return the parts of the recipe that decide a teacher's embeddings."""
    section: dict[str, Any] = {"labelling": run.recipe.section("labelling")}
    if run.recipe.labelling.precision == "int8" and spreads_sample(run):
        section["sample"] = "spread"
    return section


def part_indices(run: Run, part: str) -> Tensor:
    """Return the samples of a part."""
    indices_N: Tensor = getattr(run.splits, "train" if part.startswith("view-") else part)
    return indices_N


def part_images(run: Run, part: str) -> Iterator[Tensor]:
    """Yield uint8 images_NCHW of a part."""
    batches = torch.split(part_indices(run, part), BATCH_SIZE)
    if not part.startswith("view-"):
        yield from run.source.iter_images(batches)
        return
    views = Views(head_transforms(run), seed=run.views.seed, partner_pool=run.splits.train)
    view = int(part.removeprefix("view-"))
    for batch in iter_view_batches(run.source, views, batches, view=view):
        yield batch.images_NCHW


def head_transforms(run: Run) -> list[dict[str, dict[str, Any]]]:
    """Return the transforms of the recipe without those that mix two pictures.

    A mixed picture has labels of two samples, and its embedding is that of neither.
    """
    return [t for t in run.transforms if not set(t) & set(MIXING_TRANSFORMS)]


def student_embedder(run: Run) -> Embed:
    """Return the student's trunk."""
    trunk = trunk_of(run)
    return lambda images_NCHW: next(embed(trunk, [images_NCHW]))


def teacher_embedder(run: Run, role: str) -> Embed:
    """Return the teacher in its fastest runtime; a continued stage keeps the one it began with."""
    precision = run.recipe.labelling.precision
    # Each precision has runtimes of its own, and the folder may have been begun with another one.
    path: Path = run.folder / "embeddings" / f"runtime-{role}-{precision}"
    infer = fast_inference(
        trained_model(run, role, run.parent(role, "teach")),
        image_shape=run.source.image_shape,
        precision=precision,
        device="cuda" if uses_gpu(run) else "cpu",
        sample_images_NCHW=run.source.images(sample_pictures(run)),
        runtime=path.read_text() if path.exists() else None,
        num_images=len(run.splits.train),
        taps=[EMBEDDING_TAP],
    )
    write_text(path, infer.runtime)
    return lambda images_NCHW: infer.outputs(images_NCHW).features[EMBEDDING_TAP.key]
