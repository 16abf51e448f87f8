"""The model card: what was released, from what, how good it is, and what it is not for.

The sections follow Mitchell et al. 2019, "Model Cards for Model Reporting". What is not given is
shown as not stated: a card must not read as if nothing were missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from understudy.package.manifest import ArtifactEntry, Preprocessing

CARD_NAME = "MODEL_CARD.md"
NOT_STATED = "not stated"

FULL_NAMES = {
    "ece": "Expected calibration error",
    "nll": "Negative log-likelihood",
    "brier": "Brier score",
    "num_params": "Parameters",
    "macs": "Multiply-adds",
}

Cell = str | int | float | bool | None
Facts = Mapping[str, Cell]


@dataclass(frozen=True)
class ScoreRow:
    """The student's score on some of the samples: of one class, or of one group.

    Attributes:
        accuracy: share of correct answers, None where there is no sample.
        group: what the samples are divided by, for rows of groups ("camera").
    """

    name: str
    accuracy: float | None
    num_samples: int
    group: str = ""


@dataclass(frozen=True)
class ModelCard:
    """What the card says; every mapping is shown as a table of name and value, in its order.

    Attributes:
        summary: one paragraph: what the model is for.
        licence: of the released files, such as "MIT" or "all rights reserved".
        data: source, fingerprint, samples of each split, licence.
        metrics: on the test split; a name with "accuracy" or "agreement" is shown in percent.
        per_group: scores of groups of the test split; () where the data's groups are not named.
        calibration: expected calibration error, Brier score, negative log-likelihood.
        budget: rows as ``BudgetRow.to_json`` gives them.
        limits: sentences on what is known not to work.
        versions, hardware: of the machine that trained the student.
        measured_on: sentences on the machines that measured the files.
        commands: how to make it again.
    """

    summary: str
    licence: str
    data: Facts = field(default_factory=dict)
    teacher: Facts = field(default_factory=dict)
    student: Facts = field(default_factory=dict)
    metrics: Facts = field(default_factory=dict)
    per_class: Sequence[ScoreRow] = ()
    per_group: Sequence[ScoreRow] | None = None
    calibration: Facts = field(default_factory=dict)
    budget: Sequence[Mapping[str, Any]] = ()
    intended_use: Sequence[str] = ()
    limits: Sequence[str] = ()
    versions: Facts = field(default_factory=dict)
    hardware: Facts = field(default_factory=dict)
    measured_on: Sequence[str] = ()
    commands: Sequence[str] = ()


def render_card(
    card: ModelCard,
    *,
    title: str,
    created: str,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    artifacts: Sequence[ArtifactEntry],
    notes: Sequence[str],
) -> str:
    """Return ``MODEL_CARD.md``. Needs jinja2, which writing a package has and reading has not."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("understudy.package", "templates"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": markdown_text, "value": shown_value, "words": words}
    text = environment.get_template("MODEL_CARD.md.j2").render(
        card=card,
        title=title,
        created=created,
        preprocessing=preprocessing,
        class_names=class_names,
        artifacts=artifacts,
        measured_names=_measured_names(artifacts),
        notes=notes,
        not_stated=NOT_STATED,
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def markdown_text(text: Any) -> str:
    """Return text that stands in a line or table cell as it is, whatever it holds."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", flat)


def shown_value(value: Any, name: str = "") -> str:
    """Return a value for a table cell; the name says what it counts.

    Percent for accuracies, sizes and times with their unit, whole numbers with separators.
    """
    if value is None or value == "":
        return NOT_STATED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _shown_number(value, name)
    if isinstance(value, Mapping):
        return markdown_text(", ".join(f"{key}: {one}" for key, one in value.items()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return markdown_text(", ".join(map(str, value)))
    return markdown_text(value)


def _shown_number(value: float, name: str) -> str:
    last = name.rsplit("_", 1)[-1]
    if "accuracy" in name or "agreement" in name:
        return f"{value:.2%}"
    if last == "bytes":
        return f"{value / 1000:,.1f} kB" if value < 1e6 else f"{value / 1e6:,.1f} MB"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f"{text} {last}" if last in ("ms", "mj", "hours", "seconds") else text


def words(name: str) -> str:
    """Return a field's name as words: "num_classes" is "Number of classes"."""
    if name in FULL_NAMES:
        return FULL_NAMES[name]
    text = re.sub(r"^num_", "number of ", name)
    text = re.sub(r"_(bytes|ms|mj|hours|seconds)$", "", text).replace("_", " ")
    return markdown_text(text[:1].upper() + text[1:])


def _measured_names(artifacts: Sequence[ArtifactEntry]) -> list[str]:
    """Return the measurements of any artifact that fit a column, in the order they appear."""
    names = {
        name: None
        for artifact in artifacts
        for name, value in artifact.measured.items()
        if not isinstance(value, dict | list)
    }
    return list(names)
