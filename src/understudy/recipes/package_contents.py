"""What a package says beside its files: the model card, preprocessing, reference statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from understudy import __version__
from understudy.artifacts import Record, content_hash
from understudy.evaluate.accuracy import evaluate_logits, predict_logits
from understudy.evaluate.budget import BudgetRow
from understudy.package.card import ModelCard, ScoreRow, shown_value, words
from understudy.package.statistics import reference_statistics
from understudy.package.writing import PackageContents
from understudy.recipes.artifacts import answers, artifact_of
from understudy.recipes.compressed import KIND, export_source, last_network, resize_rule
from understudy.recipes.compression_report import single_picture
from understudy.recipes.members import teacher_name
from understudy.recipes.networks import model_section
from understudy.recipes.release_settings import ReleaseSection
from understudy.recipes.run import Run

# So many classes are named; the card lists all beside their scores.
NUM_NAMES = 20


def package_contents(
    run: Run,
    records: Sequence[Record],
    budget: Mapping[str, Sequence[BudgetRow]],
    failed: Mapping[str, str],
) -> PackageContents:
    """Return the contents of a release's package; equal runs give equal contents.

    Args:
        failed: targets that are left out, and why.
    """
    indices_N = run.splits.validation
    images_NCHW = run.source.images(indices_N).numpy()
    logits_NK = shipped_logits(run, records, indices_N).numpy()
    return PackageContents(
        name=run.recipe.name,
        version=release_version(records, run.recipe.release),
        created=records[0].created,
        class_names=run.source.class_names,
        image_shape=run.source.image_shape,
        card=model_card(run, records, budget, failed),
        statistics=reference_statistics(images_NCHW, logits_NK, class_names=run.source.class_names),
        resize=resize_rule(run),
        measured={artifact_name(record): measured_facts(record) for record in records},
    )


def release_version(records: Sequence[Record], section: ReleaseSection) -> str:
    """Return a version that differs where files, licence or intended use do."""
    return content_hash(
        [[record.hash for record in records], section.licence, section.intended_use]
    )[:12]


def shipped_first(records: Sequence[Record]) -> Record:
    """Return the artifact that a package speaks of: the first one that was run here, if any was."""
    return next((record for record in records if record.payload["metrics"]), records[0])


def shipped_logits(run: Run, records: Sequence[Record], indices_N: Tensor) -> Tensor:
    """Return logits_NK of what ships: by the files themselves where they run in a process here.

    Otherwise (a page, a format of another system) by the same network in PyTorch.
    """
    shipped = shipped_first(records)
    if shipped.payload["metrics"] and shipped.payload["target"] != "web":
        return answers(run, artifact_of(run, shipped), indices_N)
    source = export_source(run, last_network(Record.load(run.folder / KIND)))
    network: Any = source.model
    if shipped.payload["precision"] == "int8" and source.quantized is not None:
        network = source.quantized
    return predict_logits(lambda images: network(images.float() / 255), run.source, indices_N)


def shipped_metrics(run: Run, records: Sequence[Record]) -> dict[str, Any]:
    """Return the scores of what ships on the test split."""
    found: dict[str, Any] | None = shipped_first(records).payload["metrics"]
    if found is not None:
        return found
    indices_N = run.splits.test
    metrics = evaluate_logits(
        shipped_logits(run, records, indices_N),
        run.source.labels_N[indices_N],
        class_names=run.source.class_names,
    )
    return metrics.to_json()


def artifact_name(record: Record) -> str:
    """Return the name of an artifact in its package."""
    return f"{record.payload['target']}-{record.payload['precision']}"


def measured_facts(record: Record) -> dict[str, Any]:
    """Return what was measured of an artifact, as flat figures."""
    payload, timing = record.payload, record.timing
    facts: dict[str, Any] = {}
    if payload["metrics"] is not None:
        facts["accuracy"] = payload["metrics"]["accuracy"]
        if payload.get("float_accuracy") is not None:
            facts["float_accuracy"] = payload["float_accuracy"]
    if payload["parity"] is not None:
        facts["agreement_with_trained"] = payload["parity"]["top1_agreement"]
        facts["mean_abs_difference"] = payload["parity"]["mean_abs_difference"]
    single = single_picture(timing)
    if single:
        facts |= {"latency_p50_ms": single["p50_ms"], "latency_p95_ms": single["p95_ms"]}
    if "memory" in timing:
        facts["peak_memory_bytes"] = timing["memory"]["peak_memory_bytes"]
    return facts


def model_card(
    run: Run,
    records: Sequence[Record],
    budget: Mapping[str, Sequence[BudgetRow]],
    failed: Mapping[str, str],
) -> ModelCard:
    """Return the card of the first artifact that was run, with the budget of all."""
    recipe, source = run.recipe, run.source
    evaluation = run.parent("evaluation", "evaluate").payload
    split = run.parent("split", "teach").payload
    shipped, metrics = shipped_first(records), shipped_metrics(run, records)
    scores_of = {"test accuracy": metrics["accuracy"], "test samples": metrics["num_samples"]}
    if not shipped.payload["metrics"]:
        scores_of["measured in"] = "PyTorch: nothing here runs these files"
    costs = evaluation["costs"]
    teacher: dict[str, Any] = {"network": "none"}
    if run.teachers:
        teacher = {"network": teacher_name(run), "parameters": costs["teacher"]["num_params"]}
        teacher["test accuracy"] = evaluation["metrics"]["teacher"]["test"]["accuracy"]
    counts = [sum(row) for row in metrics["confusion"]]
    scores = zip(source.class_names, metrics["per_class_accuracy"], counts, strict=True)
    student = run.parent("student", "train")
    return ModelCard(
        summary=summary_of(source.image_shape, source.class_names),
        licence=recipe.release.licence,
        data={
            "source": recipe.data.source,
            "fingerprint": split["fingerprint"],
            **{f"{name} samples": number for name, number in split["num_samples"].items()},
            "licence": None,  # a recipe names none
        },
        teacher=teacher,
        student={
            "network": model_section(run, "student").name,
            "parameters": shipped.payload["num_params"],
            "shipped first": artifact_name(shipped),
        },
        metrics=scores_of,
        per_class=[ScoreRow(name, accuracy, number) for name, accuracy, number in scores],
        per_group=(),  # a recipe names none
        calibration={
            "expected calibration error": metrics["ece"],
            "Brier score": metrics["brier"],
            "negative log-likelihood": metrics["nll"],
        },
        budget=named_rows(budget),
        intended_use=[recipe.release.intended_use] if recipe.release.intended_use else (),
        limits=[
            *limits_of(metrics, source.class_names),
            *(f"{name} was asked for and is not here: {why}" for name, why in failed.items()),
        ],
        versions=student.versions,
        hardware=student.hardware,
        measured_on=measured_on(records),
        commands=[f"understudy release recipe.yaml  # understudy {__version__}"],
    )


def named_rows(budget: Mapping[str, Sequence[BudgetRow]]) -> list[dict[str, Any]]:
    """Return the rows of all artifacts, each with its artifact's name."""
    return [
        {**row.to_json(), "name": f"{kind.removeprefix('artifact-')}: {row.name}"}
        for kind, rows in budget.items()
        for row in rows
    ]


def summary_of(image_shape: tuple[int, int, int], class_names: Sequence[str]) -> str:
    """Return what the model does, with the names of its first classes."""
    return (
        f"Classifies pictures of {image_shape[2]} x {image_shape[1]} pixels "
        f"into {len(class_names)} classes: {_first(class_names)}."
    )


def _first(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - NUM_NAMES} more" if len(names) > NUM_NAMES else ""
    return ", ".join(names[:NUM_NAMES]) + more


def measured_on(records: Sequence[Record]) -> list[str]:
    """Return the machine and versions of every artifact's measurements, equal ones once."""
    names: dict[str, list[str]] = {}
    for record in records:
        machine = [
            str(value) if name in ("processor", "system", "gpu") else f"{words(name)} {cell}"
            for name, value in record.hardware.items()
            if name != "machine" and (cell := shown_value(value, name))
        ]
        versions = [f"{name} {version}" for name, version in record.versions.items()]
        names.setdefault(f"{', '.join(machine)}; {', '.join(versions)}", []).append(
            artifact_name(record)
        )
    return [f"{', '.join(found)}: measured on {where}." for where, found in names.items()]


def limits_of(metrics: Mapping[str, Any], class_names: Sequence[str]) -> list[str]:
    """Return what is known not to work well, from the figures themselves."""
    known = [
        (accuracy, name)
        for name, accuracy in zip(class_names, metrics["per_class_accuracy"], strict=True)
        if accuracy is not None
    ]
    worst, name = min(known)
    unseen = [one for one in class_names if one not in {name for _, name in known}]
    untested = [f"No test picture shows one of these classes: {_first(unseen)}."] if unseen else []
    return [
        f"The worst class is {name}: {worst:.2%} of its test pictures are right.",
        *untested,
        "Every picture gets one of these classes, also one that shows none of them.",
        "Figures are those of the test split; other cameras, light or framing were not tested.",
    ]
