"""What the lab found beside what the paper prints, with the difference and a reading of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from understudy.artifacts import Record
from understudy.lab.paper import ITEMS
from understudy.lab.paper_figures import (
    alpha_parts,
    curves_chart,
    dropout_parts,
    online_parts,
    pretrained_parts,
    temperature_parts,
)
from understudy.lab.paper_readings import reading_of_accuracy
from understudy.lab.paper_records import Records
from understudy.lab.paper_values import (
    ACCURACIES,
    EPOCHS,
    OPERATORS,
    PARAMETERS,
    SECONDS,
)
from understudy.report.charts import Chart
from understudy.report.document import Chapter, Document, Grid, Part
from understudy.report.formats import count, fixed, moment, percent, points, significant

TITLE = "Efficient Knowledge Distillation, run again"
TITLES = {
    "parameters": "Parameters (Table 5)",
    "operators": "Operators (Tables 1 to 4)",
    "dropout": "Which dropout rate",
    "accuracy": "Accuracy and time (Tables 6 and 7, Figures 1 and 2)",
    "online": "Online against offline (Figure 5)",
    "pretrained": "A large pretrained teacher (Figure 6)",
    "alpha": "The weight of the teacher (Figure 3)",
    "temperature": "The temperature (Figure 4)",
}


def paper_document(records: Records) -> Document:
    """Return the page: every number beside the paper's; what was not run says how to run it."""
    chapters: list[Chapter] = []
    for name in ITEMS:
        found = records.get(name, ())
        chapters += chapters_of(name, found) if found else [Chapter(TITLES[name], not_run(name))]
    return Document(
        eyebrow="lab",
        title=TITLE,
        headline=headline(records),
        facts=("Lin and Shen 2024", f"{len(records)} of {len(ITEMS)} items run"),
        chapters=tuple(chapters),
        kind="good" if len(records) == len(ITEMS) else "open",
    )


def chapters_of(name: str, records: Sequence[Record]) -> list[Chapter]:
    """Return the chapter of every record of an item."""
    chapters = []
    for number, record in enumerate(records):
        title, parts = TITLES[name], PARTS[name](record.payload)
        if len(records) > 1:
            title += f", dropout {record.recipe['setting']['dropout']:g}"
            # A chart's name is its address in the page.
            parts = tuple(
                replace(part, name=f"{part.name}-{number}") if isinstance(part, Chart) else part
                for part in parts
            )
        chapters.append(Chapter(title, (*parts, provenance(record))))
    return chapters


def headline(records: Records) -> str:
    """Return how far the reproduction is, in a sentence for each dropout rate."""
    found = records.get("accuracy", ())
    if not found:
        return "The trainings were not run yet."
    told = []
    for record in found:
        setting, num = record.recipe["setting"], len(record.payload["networks"])
        rate = f" with dropout {setting['dropout']:g}" if len(found) > 1 else ""
        told.append(
            f"{num} networks of the paper{rate}, {setting['num_epochs']} of its {EPOCHS} epochs "
            "each."
        )
    if any(record.recipe["setting"]["num_epochs"] < EPOCHS for record in found):
        told.append(
            "Fewer epochs do not reach the paper's numbers: compare the curves and the order."
        )
    return " ".join(told)


def not_run(name: str) -> tuple[Part, ...]:
    """Return what stands where an item has no record."""
    return (f"Not run. `understudy lab paper --only {name} --data FOLDER` runs it.",)


def provenance(record: Record) -> str:
    """Return when, on what and with which setting an item was run."""
    setting, facts = record.recipe["setting"], []
    if record.kind not in ("lab-parameters", "lab-operators"):
        facts.append(f"seed {record.seed}")
        if record.kind != "lab-dropout":
            facts.append(f"dropout {setting['dropout']:g}")
        if (accelerator := setting.get("accelerator", "cpu")) != "cpu":
            gpu = record.hardware.get("gpu", "no GPU found")
            facts.append(f"trained with accelerator {accelerator} ({gpu})")
    facts.append(record.hardware.get("processor", "unknown machine"))
    # The operators are timed on one thread whatever the trainings have.
    threads = 1 if record.kind == "lab-operators" else setting["threads"] or "all"
    facts += [f"threads {threads}", f"torch {record.versions.get('torch', '?')}"]
    return f"Run {moment(record.created)}: {', '.join(facts)}."


def parameter_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return Table 5."""
    rows = []
    for name, theirs in PARAMETERS.items():
        ours = payload["counts"].get(name)
        verdict = "not built" if ours is None else "equal" if ours == theirs else "differs"
        rows.append((name, count(theirs), "" if ours is None else count(ours), verdict))
    note = "The ViT is built from its configuration; no weights are loaded for this."
    return (Grid(note, ("Network", "Paper", "Here", "Reading"), tuple(rows), texts=(3,)),)


def operator_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return Tables 1 to 4."""
    parts: list[Part] = [
        "One batch of 100 pictures in training mode on one thread: in evaluation mode dropout does "
        "nothing, and has neither the paper's time nor its memory. Here leaky ReLU and dropout "
        "after it are one operator where a compiler is installed. Model inference is timed without "
        "the profiler, where kernels do several operators in one pass: the rows may add up to "
        "more. A MB has 2^20 bytes, as in the paper, whose convolutions hold exactly as much."
    ]
    for name, theirs in OPERATORS.items():
        table = payload["tables"][name]
        rows = [
            ("model inference", ms(theirs["model inference"][0]), ms(table["total_ms"]), "", "")
        ]
        ours = {row["kind"]: row for row in table["rows"]}
        ours |= {row["kind"]: row for row in (table["created"], table["loading"]) if row}
        for kind in dict.fromkeys([*list(theirs)[1:], *ours]):
            their_time, their_memory = theirs.get(kind, (None, None))
            row = ours.get(kind)
            rows.append(
                (
                    kind,
                    "" if their_time is None else ms(their_time),
                    "" if row is None else ms(row["time_ms"]),
                    "" if their_memory is None else f"{their_memory:g} MB",
                    "" if row is None else f"{row['memory_bytes'] / 2**20:.2f} MB",
                )
            )
        titles = (name, "Paper", "Here", "Paper", "Here")
        parts.append(Grid("Time and memory of each kind of operator.", titles, tuple(rows)))
    return (*parts, share_grid(payload["tables"]))


def share_grid(tables: Mapping[str, Any]) -> Grid:
    """Return which part of a batch convolution and dropout take: what the paper concludes from."""
    rows = []
    for name, theirs in OPERATORS.items():
        row = [name]
        for kind in ("conv2d", "dropout"):
            their_share = theirs[kind][0] / theirs["model inference"][0]
            our_share = sum(r["share"] for r in tables[name]["rows"] if kind in r["kind"])
            row += [percent(their_share, 1), percent(our_share, 1)]
            row.append(points(our_share - their_share, 1))
        rows.append(tuple(row))
    titles = ("Network", "Convolution, paper", "Here", "", "Dropout, paper", "Here", "")
    return Grid(
        "Share of model inference; here of the time of all operators. Dropout here has with it "
        "the leaky ReLU that it is one operator with.",
        titles,
        tuple(rows),
    )


def ms(value: float) -> str:
    """Return milliseconds."""
    return f"{significant(value, 4)} ms"


def accuracy_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return Tables 6 and 7 and the curves."""
    networks = payload["networks"]
    accuracies, times = [], []
    for name in ACCURACIES:
        accuracies.append(accuracy_row(name, networks.get(name)))
        times.append(time_row(name, networks.get(name)))
    note = "Training accuracy is the mean over the last epoch's updates, dropout at work."
    if (num := payload.get("num_samples")) is not None:
        note += (
            f" {count(num['train'])} pictures train and {count(num['validation'])} validate, as a "
            "hash of every picture decides; the paper has 45,000 and 5,000."
        )
    titles = ("Network", "Training, paper", "Here", "Validation, paper", "Here", "Points", "Epochs")
    return (
        *absent_networks(payload),
        Grid(note, titles, tuple(accuracies)),
        curves_chart("validation", "Validation accuracy", networks, column=2),
        curves_chart("training", "Training accuracy", networks, column=1),
        Grid(
            times_note(networks),
            ("Network", "Training, paper", "Here", "Faster", "Inference, paper", "Here", "Faster"),
            tuple(times),
        ),
        reading_of_accuracy(payload),
    )


def accuracy_row(name: str, ours: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return a network's row of Table 6."""
    training, validation = ACCURACIES[name]
    if ours is None:
        return (name, percent(training), "not run", percent(validation), "not run", "", "")
    epoch, our_training, our_validation = ours["curve"][-1]
    return (
        name,
        percent(training),
        percent(our_training),
        percent(validation),
        percent(our_validation),
        points(our_validation - validation),
        str(int(epoch)),
    )


def time_row(name: str, ours: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return a network's row of Table 7; a GPU's seconds have no ratio to those of a processor."""
    training, inference = SECONDS[name]
    if ours is None:
        return (name, f"{training:g} s", "not run", "", f"{inference:g} s", "not run", "")
    epoch, faster = f"{fixed(ours['epoch_seconds'], 1)} s", ""
    if ours.get("gpu") is None:
        faster = f"{fixed(training / ours['epoch_seconds'], 1)}×"
    else:
        epoch += " (GPU)"
    return (
        name,
        f"{training:g} s",
        epoch,
        faster,
        f"{inference:g} s",
        f"{fixed(ours['inference_seconds'], 2)} s",
        f"{fixed(inference / ours['inference_seconds'], 1)}×",
    )


def times_note(networks: Mapping[str, Any]) -> str:
    """Return what the seconds of Table 7 are of."""
    told = (
        "Seconds an epoch, the median here; the paper's on its own machine. Inference here: "
        "10,000 pictures in batches of 100, from a pass over up to 2,000; the paper does not "
        "say of what its epoch of inference is. A student's training reads stored outputs, "
        "which the paper's did not."
    )
    gpus = sorted({network["gpu"] for network in networks.values() if network.get("gpu")})
    if gpus:
        told += (
            f" (GPU): trained on {', '.join(gpus)}, so without a ratio to the paper's seconds; "
            "inference is the processor's."
        )
    return told


def absent_networks(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return how the networks of Table 6 that have no result are run."""
    networks = payload["networks"]
    layers = sorted({name.split()[-1] for name in ACCURACIES if name not in networks})
    if not layers:
        return ()
    asked = " ".join(f"--layers {number}" for number in layers)
    have = sorted({name.split()[-1] for name in networks if name.startswith("TS ")})
    kept = "".join(f"--layers {number} " for number in have)
    return (
        f"Not run: {', '.join(name for name in ACCURACIES if name not in networks)}. "
        f"`understudy lab paper --only accuracy --dropout {payload['dropout']:g} {kept}{asked} "
        "--data FOLDER` runs them.",
    )


PARTS = {
    "parameters": parameter_parts,
    "operators": operator_parts,
    "dropout": dropout_parts,
    "accuracy": accuracy_parts,
    "online": online_parts,
    "pretrained": pretrained_parts,
    "alpha": alpha_parts,
    "temperature": temperature_parts,
}
