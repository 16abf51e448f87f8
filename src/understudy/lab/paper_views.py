"""What the lab found beside what the paper prints, with the difference and a reading of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from understudy.artifacts import Record
from understudy.lab.paper import ITEMS
from understudy.lab.paper_readings import (
    reading_of_accuracy,
    reading_of_dropout,
    reading_of_grid,
    reading_of_online,
    reading_of_pretrained,
)
from understudy.lab.paper_values import (
    ACCURACIES,
    EPOCHS,
    OFFLINE_HOURS,
    ONLINE_HOURS,
    OPERATORS,
    PARAMETERS,
    PRETRAINED_ACCURACY,
    PRETRAINED_SECONDS,
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
COLOURS = ("@student", "@teacher", "@control", "@accent", "@muted")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def paper_document(records: Mapping[str, Record]) -> Document:
    """Return the page: every number beside the paper's; what was not run says how to run it."""
    chapters = []
    for name in ITEMS:
        record = records.get(name)
        parts = not_run(name) if record is None else PARTS[name](record.payload)
        if record is not None:
            parts = (*parts, provenance(record))
        chapters.append(Chapter(TITLES[name], parts))
    return Document(
        eyebrow="lab",
        title=TITLE,
        headline=headline(records),
        facts=("Lin and Shen 2024", f"{len(records)} of {len(ITEMS)} items run"),
        chapters=tuple(chapters),
        kind="good" if len(records) == len(ITEMS) else "open",
    )


def headline(records: Mapping[str, Record]) -> str:
    """Return how far the reproduction is, in a sentence."""
    record = records.get("accuracy")
    if record is None:
        return "The trainings were not run yet."
    epochs = record.recipe["setting"]["num_epochs"]
    num = len(record.payload["networks"])
    told = f"{num} networks of the paper, {epochs} of its {EPOCHS} epochs each."
    if epochs < EPOCHS:
        told += " Fewer epochs do not reach the paper's numbers: compare the curves and the order."
    return told


def not_run(name: str) -> tuple[Part, ...]:
    """Return what stands where an item has no record."""
    return (f"Not run. `understudy lab paper --only {name} --data FOLDER` runs it.",)


def provenance(record: Record) -> str:
    """Return when, on what and with which setting an item was run."""
    setting = record.recipe["setting"]
    trained = record.kind not in ("lab-parameters", "lab-operators")
    how = f"seed {record.seed}, "
    if record.kind != "lab-dropout":
        how += f"dropout {setting['dropout']:g}, "
    machine = record.hardware.get("processor", "unknown machine")
    return (
        f"Run {moment(record.created)}: {how if trained else ''}{machine}, "
        f"threads {setting['threads'] or 'all'}, torch {record.versions.get('torch', '?')}."
    )


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
        "after it are one operator where a compiler is installed. A MB has 2^20 bytes, as in the "
        "paper, whose convolutions hold exactly as much."
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
    return tuple(parts)


def ms(value: float) -> str:
    """Return milliseconds."""
    return f"{significant(value, 4)} ms"


def accuracy_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return Tables 6 and 7 and the curves."""
    networks = payload["networks"]
    accuracies, times = [], []
    for name, (their_training, their_validation) in ACCURACIES.items():
        their_epoch, their_inference = SECONDS[name]
        if name not in networks:
            accuracies.append(
                (name, percent(their_training), "not run", percent(their_validation), "not run",
                 "", "")
            )  # fmt: skip
            times.append(
                (name, f"{their_epoch:g} s", "not run", "", f"{their_inference:g} s", "not run", "")
            )
            continue
        epoch, training, validation = networks[name]["curve"][-1]
        accuracies.append(
            (
                name,
                percent(their_training),
                percent(training),
                percent(their_validation),
                percent(validation),
                points(validation - their_validation),
                str(int(epoch)),
            )
        )
        ours = networks[name]
        times.append(
            (
                name,
                f"{their_epoch:g} s",
                f"{fixed(ours['epoch_seconds'], 1)} s",
                f"{fixed(their_epoch / ours['epoch_seconds'], 1)}×",
                f"{their_inference:g} s",
                f"{fixed(ours['inference_seconds'], 2)} s",
                f"{fixed(their_inference / ours['inference_seconds'], 1)}×",
            )
        )
    missing = absent_networks(networks)
    return (
        *missing,
        Grid(
            "Training accuracy is the mean over the last epoch's updates, dropout at work.",
            ("Network", "Training, paper", "Here", "Validation, paper", "Here", "Points", "Epochs"),
            tuple(accuracies),
        ),
        curves_chart("validation", "Validation accuracy", networks, column=2),
        curves_chart("training", "Training accuracy", networks, column=1),
        Grid(
            "Seconds an epoch, the median here; the paper's on its own machine. Inference here: "
            "10,000 pictures in batches of 100, from a pass over up to 2,000; the paper does not "
            "say of what its epoch of inference is. A student's training reads stored outputs, "
            "which the paper's did not.",
            ("Network", "Training, paper", "Here", "Faster", "Inference, paper", "Here", "Faster"),
            tuple(times),
        ),
        reading_of_accuracy(networks),
    )


def absent_networks(networks: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return how the networks of Table 6 that have no result are run."""
    layers = sorted({name.split()[-1] for name in ACCURACIES if name not in networks})
    if not layers:
        return ()
    asked = " ".join(f"--layers {number}" for number in layers)
    have = sorted({name.split()[-1] for name in networks if name.startswith("TS ")})
    kept = "".join(f"--layers {number} " for number in have)
    return (
        f"Not run: {', '.join(name for name in ACCURACIES if name not in networks)}. "
        f"`understudy lab paper --only accuracy {kept}{asked} --data FOLDER` runs them.",
    )


def curves_chart(name: str, title: str, networks: Mapping[str, Any], *, column: int) -> Chart:
    """Return one line a network over epochs."""
    lines = []
    for number, (network, found) in enumerate(networks.items()):
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": network,
                "x": [row[0] for row in found["curve"]],
                "y": [row[column] for row in found["curve"]],
                "line": {
                    "color": COLOURS[number % len(COLOURS)],
                    "dash": DASHES[(number // len(COLOURS) + number) % len(DASHES)],
                },
            }
        )
    layout = {
        "xaxis": {"title": {"text": "epoch"}},
        "yaxis": {"title": {"text": title.lower()}, "tickformat": ".0%"},
    }
    return Chart(name, title, "Every network over its epochs.", {"data": lines, "layout": layout})


def dropout_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return the student's accuracy for each rate."""
    curves = payload["curves"]
    rows = tuple(
        (rate, str(int(curve[-1][0])), percent(curve[-1][1]), percent(curve[-1][2]))
        for rate, curve in curves.items()
    )
    titles = ("Rate", "Epochs", "Training accuracy", "Validation accuracy")
    theirs = ACCURACIES["Student"]
    caption = (
        f"The paper's student: {percent(theirs[0])} and {percent(theirs[1])} at {EPOCHS} epochs."
    )
    shown = {f"dropout {rate}": {"curve": curve} for rate, curve in curves.items()}
    chart = curves_chart("dropout", "Validation accuracy", shown, column=2)
    return (Grid(caption, titles, rows), chart, reading_of_dropout(curves))


def online_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return both ways of teaching side by side."""
    online, offline = payload["curve"][-1], payload["offline_curve"][-1]
    hours = (payload["epoch_seconds"] / 36, payload["offline_epoch_seconds"] / 36)
    rows = (
        ("online", percent(online[2]), f"{ONLINE_HOURS:g} h", f"{fixed(hours[0], 2)} h"),
        ("offline", percent(offline[2]), f"{OFFLINE_HOURS:g} h", f"{fixed(hours[1], 2)} h"),
    )
    caption = (
        f"After {int(online[0])} epochs; hours are for {EPOCHS} epochs at the median time of one: "
        "online teacher and student together, offline the teacher's and then the student's, whose "
        f"labelling took {fixed(payload['label_seconds'], 0)} s once."
    )
    shown = {
        "TS Online": {"curve": payload["curve"]},
        "TS 6 (offline)": {"curve": payload["offline_curve"]},
    }
    return (
        Grid(caption, ("Way", "Validation accuracy", "Time, paper", "Here"), rows),
        curves_chart("online", "Validation accuracy", shown, column=2),
        reading_of_online(payload),
    )


def pretrained_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return the student of the large teacher, and what an epoch costs with and without a store."""
    epoch, _, validation = payload["curve"][-1]
    without = payload["epoch_seconds"] + payload["label_seconds"]
    rows = (
        ("student's validation accuracy", percent(PRETRAINED_ACCURACY), percent(validation)),
        ("epoch with stored outputs", "", f"{fixed(payload['epoch_seconds'], 1)} s"),
        (
            "epoch that runs the teacher",
            f"{PRETRAINED_SECONDS:g} s",
            f"{fixed(without, 1)} s",
        ),
        ("teacher's parameters", count(PARAMETERS["ViT-B/16, 10 classes"]),
         count(payload["teacher_params"])),
        ("teacher's validation accuracy", "97.88 %", percent(payload["teacher_accuracy"])),
    )  # fmt: skip
    caption = (
        f"Teacher here: {payload['teacher']}; {int(epoch)} epochs. Without the store an epoch has "
        "the teacher's pass over the training pictures besides, which labelling timed."
    )
    return (Grid(caption, ("", "Paper (ViT)", "Here"), rows), reading_of_pretrained(payload))


def grid_parts(payload: Mapping[str, Any], path: str, title: str) -> tuple[Part, ...]:
    """Return accuracy over one varied parameter."""
    found = sorted((point["settings"][path], point["curve"]) for point in payload["points"])
    rows = tuple(
        (f"{value:g}", str(int(curve[-1][0])), percent(curve[-1][1]), percent(curve[-1][2]))
        for value, curve in found
    )
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [value for value, _ in found],
            "y": [curve[-1][column] for _, curve in found],
            "line": {"color": colour},
        }
        for column, name, colour in ((1, "training", "@control"), (2, "validation", "@student"))
    ]
    axis: dict[str, Any] = {"title": {"text": title}}
    if path.endswith("temperature"):
        axis["type"] = "log"
    layout = {"xaxis": axis, "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".0%"}}
    chart = Chart(path.split(".")[-1], title, "After the last epoch.",
                  {"data": data, "layout": layout})  # fmt: skip
    titles = (title, "Epochs", "Training accuracy", "Validation accuracy")
    return (Grid("Taught by Teacher 6.", titles, rows), chart, reading_of_grid(path, found))


def alpha_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return Figure 3."""
    return grid_parts(payload, "distillation.kl_weight", "alpha")


def temperature_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return Figure 4."""
    return grid_parts(payload, "distillation.temperature", "temperature")


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
