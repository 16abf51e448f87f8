"""What each way of teaching is worth: one small student on CIFAR-10, taught by every method.

Every method trains the same network (under 12,000 parameters) with the same data, splits, stored
views, optimiser, schedule and number of updates; only the way of teaching differs. The control
learns from labels alone. A method's weights are the defaults or a tenth of them, whichever the
validation split prefers with the first seed; all its seeds then have the same. Seeds change first
weights and order; splits and views stay, so that the teachers' outputs are computed once. Nothing
is chosen on the test split: it is read once, when the table is written.

    python benchmarks/methods.py train --data CIFAR10 --teachers FOLDER --out RUNS
    python benchmarks/methods.py costs --data CIFAR10 --teachers FOLDER --out RUNS
    python benchmarks/methods.py table --data CIFAR10 --teachers FOLDER --out RUNS

``train`` may be stopped at any moment and started again: finished runs are kept, a started one
continues from its checkpoint. ``costs`` times an update of every method on an idle machine.
``table`` evaluates each student on the test split and prints the table of docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from understudy.artifacts import write_text
from understudy.evaluate.accuracy import predict_logits
from understudy.progress import setup_logging
from understudy.recipes.chain import run_steps
from understudy.recipes.job import open_run, start, working
from understudy.recipes.label import label
from understudy.recipes.networks import trained_model
from understudy.recipes.prepare import split
from understudy.recipes.run import Run
from understudy.recipes.teach import teach
from understudy.recipes.train import role_training, train_role
from understudy.runtime import hardware_facts, package_versions
from understudy.train.devices import make_fabric
from understudy.train.distill_settings import DistillSettings
from understudy.train.loss_table import LOSSES
from understudy.train.training import Training

STUDENT = {"name": "separable", "arguments": {"stages": [[16, 2], [32, 1], [64, 2], [96, 2]]}}
# About four times the student's parameters: the assistant, and the teacher that learns online.
MIDDLE = {"name": "separable", "arguments": {"stages": [[32, 2], [64, 1], [128, 2], [192, 2]]}}
IMAGENET_PIXELS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
ATTENTION_LAYERS = [
    {"student": "blocks.0", "teacher": "layer2"},
    {"student": "blocks.1", "teacher": "layer3"},
]
LABELS_AND = {"kl_weight": 0.0, "ce_weight": 1.0}

# method -> changes to the recipe; "kl" is the recipe as it is, "control" its control.
METHODS: dict[str, dict[str, Any]] = {
    "control": {},
    "kl": {},
    "dkd": {"distillation": {**LABELS_AND, "losses": {"dkd": {}}}},
    "dist": {"distillation": {**LABELS_AND, "losses": {"dist": {}}}},
    "standardized_kl": {
        "distillation": {
            "kl_weight": 0.0,
            "ce_weight": 0.1,
            "losses": {"standardized_kl": {"weight": 0.9}},
        }
    },
    "attention_transfer": {
        "distillation": {
            **LABELS_AND,
            "losses": {"attention_transfer": {"layers": ATTENTION_LAYERS}},
        }
    },
    "rkd": {"distillation": {**LABELS_AND, "losses": {"rkd": {}}}},
    "similarity_preserving": {
        "distillation": {**LABELS_AND, "losses": {"similarity_preserving": {}}}
    },
    "crd": {"distillation": {**LABELS_AND, "losses": {"crd": {}}}},
    "multi_level": {
        "distillation": {
            "losses": {
                "attention_transfer": {"weight": 100.0, "layers": ATTENTION_LAYERS},
                "embedding_alignment": {"weight": 0.5},
                "class_prior": {},
            }
        }
    },
    "mutual": {"strategy": {"name": "mutual"}, "teacher": None},
    "online": {
        "strategy": {"name": "online"},
        "teacher": {"model": {**MIDDLE, "normalization": IMAGENET_PIXELS}},
    },
    "born_again": {"strategy": {"name": "born_again"}, "teacher": None},
    "assistant_chain": {"strategy": {"name": "progressive", "assistants": [MIDDLE]}},
    "ensemble": {"strategy": {"name": "ensemble"}},
    "curriculum": {"distillation": {"curriculum": {"difficulty": "loss", "pacing": "root"}}},
    # Not asked for by the comparison, shown for completeness.
    "self_paced": {
        "distillation": {"curriculum": {"difficulty": "student_loss", "pacing": "self_paced"}}
    },
    "ema_teacher": {"strategy": {"name": "ema_teacher"}, "teacher": None},
    "embedding_alignment": {"distillation": {**LABELS_AND, "losses": {"embedding_alignment": {}}}},
    "class_prior": {"distillation": {"losses": {"class_prior": {"weight": 0.3}}}},
    "salient_attention": {
        "distillation": {
            **LABELS_AND,
            "losses": {"salient_attention": {"layers": ATTENTION_LAYERS}},
        }
    },
    "pkt": {"distillation": {**LABELS_AND, "losses": {"pkt": {}}}},
    "correlation_congruence": {
        "distillation": {**LABELS_AND, "losses": {"correlation_congruence": {}}}
    },
}
SCALES = (1.0, 0.1)
TABLE_START = "<!-- table: written by benchmarks/methods.py -->"
TABLE_END = "<!-- end of table -->"
NUM_ASKED = list(METHODS).index("self_paced")


def recipe_of(method: str, scale: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of one method with one seed, the teaching weights times ``scale``."""
    teachers = {
        depth: {
            "model": {"name": f"resnet{depth}", "normalization": IMAGENET_PIXELS},
            "checkpoint": str(next(Path(options.teachers).glob(f"resnet{depth}-*"))),
        }
        for depth in (20, 56)
    }
    recipe: dict[str, Any] = {
        "name": method,
        "seed": seed,
        "data": {"source": str(options.data), "split_seed": 0, "on_bad": "skip"},
        "views": {
            "num_views": options.views,
            "seed": 0,
            "transforms": [{"pad_crop": {"padding": 4}}, {"flip": {}}],
        },
        "teacher": teachers[56],
        "student": {"model": STUDENT},
        "training": {
            "num_epochs": options.epochs,
            "batch_size": 128,
            "optimizer": {"name": "adamw", "learning_rate": 0.02, "weight_decay": 0.01},
            "learning_rate_schedule": {"shape": "cosine", "warmup_epochs": 0.5},
            "validate_every_epochs": 2,
        },
        "control": False,
        "device": {"num_threads": options.threads},
    }
    for name, value in METHODS[method].items():
        both = isinstance(value, Mapping) and isinstance(recipe.get(name), Mapping)
        recipe[name] = {**recipe[name], **value} if both and name != "teacher" else value
    if method == "ensemble":
        recipe["strategy"] = {**recipe["strategy"], "teachers": [teachers[20]]}
    recipe["distillation"] = scaled(recipe.get("distillation", {}), scale)
    return recipe


def scaled(distillation: dict[str, Any], scale: float) -> dict[str, Any]:
    """Return the section with every weight but that of the labels times ``scale``."""
    losses = {
        name: {**loss, "weight": scale * loss.get("weight", LOSSES[name].weight)}
        for name, loss in distillation.get("losses", {}).items()
    }
    kl_weight = distillation.get("kl_weight", DistillSettings().kl_weight)
    return {**distillation, "kl_weight": scale * kl_weight, "losses": losses}


def folder_of(method: str, scale: float, seed: int, options: argparse.Namespace) -> Path:
    """Return where a run lies."""
    folder: Path = options.out / f"{method}-x{scale:g}-{seed}"
    return folder


def chosen_scale(method: str, options: argparse.Namespace) -> float:
    """Return the scale that is best on the validation split with the first seed, of those there."""
    found = {}
    for scale in SCALES:
        path = folder_of(method, scale, options.seeds[0], options) / "result.json"
        if path.exists():
            found[scale] = json.loads(path.read_text())["validation_accuracy"]
    return max(found, key=lambda scale: found[scale]) if found else SCALES[0]


def train_one(method: str, scale: float, seed: int, options: argparse.Namespace) -> None:
    """Train one method's student with one seed, or find it finished."""
    folder = folder_of(method, scale, seed, options)
    result = folder / "result.json"
    if result.exists():
        return
    run = open_run(recipe_of(method, scale, seed, options), out=folder)
    role = role_of(method)
    with working(run):
        start(run)
        run_steps(run)
        split(run)
        if role == "student" and run.teaches_first:
            teach(run)
            label(run)
        record = train_role(run, role)
    accuracy = record.payload["rows"][-1]["validation_accuracy"]
    facts = {"validation_accuracy": accuracy, "num_updates": record.payload["num_steps"]}
    facts["train_seconds"] = record.timing["train_seconds"]
    write_text(result, json.dumps(facts))
    print(f"{method} x{scale:g} seed {seed}: {accuracy:.2%} validation", flush=True)


def role_of(method: str) -> str:
    """Return which network of a run is the method's student."""
    return "control" if method == "control" else "student"


def train_all(options: argparse.Namespace) -> None:
    """Train every method with every seed; a method that fails does not stop the others."""
    failed = []
    for seed in options.seeds:
        for method in options.methods:
            is_first = seed == options.seeds[0] and method != "control"
            for scale in SCALES if is_first else [chosen_scale(method, options)]:
                try:
                    train_one(method, scale, seed, options)
                except Exception as error:
                    failed.append(f"{method} x{scale:g} seed {seed}: {error}")
                    print(failed[-1], flush=True)
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


def finished_run(method: str, seed: int, options: argparse.Namespace) -> Run | None:
    """Return a run whose student is trained, None where it is not."""
    scale, first = chosen_scale(method, options), options.seeds[0]
    tried = [folder_of(method, s, first, options) / "result.json" for s in SCALES]
    if method != "control" and not all(path.exists() for path in tried):
        return None  # the weights are not chosen yet
    folder = folder_of(method, scale, seed, options)
    if not (folder / "result.json").exists():
        return None
    return open_run(recipe_of(method, scale, seed, options), out=folder)


def step_costs(options: argparse.Namespace) -> None:
    """Time updates of every method in turns; print the median and the ratio to the control."""
    trainings = {}
    for method in options.methods:
        run = finished_run(method, options.seeds[0], options)
        if run is None:
            continue
        trainings[method] = updates_of(run, role_of(method), options.out / "costs" / method)
    times: dict[str, list[float]] = {method: [] for method in trainings}
    for turn in range(options.updates + 3):
        for method, updates in trainings.items():
            started = time.perf_counter()
            next(updates)
            if turn >= 3:
                times[method].append(1000 * (time.perf_counter() - started))
    medians = {method: statistics.median(values) for method, values in times.items()}
    costs = {
        method: {
            "median_ms": medians[method],
            "quartiles_ms": statistics.quantiles(values, n=4)[::2],
            "ratio": statistics.median(
                [value / other for value, other in zip(values, times["control"], strict=True)]
            ),
            "n": len(values),
        }
        for method, values in times.items()
    }
    write_text(
        options.out / "costs.json", json.dumps({"hardware": hardware_facts(), "costs": costs})
    )
    print(json.dumps(costs, indent=2))


def updates_of(run: Run, role: str, folder: Path) -> Any:
    """Yield once after every update of a training that starts anew."""
    fabric = make_fabric()
    fabric.launch()
    torch.set_num_threads(run.recipe.device.num_threads or 1)
    folder.mkdir(parents=True, exist_ok=True)
    model, plan = role_training(run, role, folder)
    training = Training(model, plan, fabric)
    while True:
        for batch, teacher in training.rest_of_epoch():
            training.backward(batch, teacher)
            training.optimizer.step()
            training.plan.objective.after_step(training.network)
            yield


def test_facts(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return a run's accuracies; the test split is read once and the answers kept."""
    run = finished_run(method, seed, options)
    if run is None:
        return None
    path = run.folder / "test.json"
    if not path.exists():
        model = trained_model(run, role_of(method), run.parent(role_of(method), "train"))
        test_N = run.splits.test
        right_N = predict_logits(model, run.source, test_N).argmax(1) == run.source.labels_N[test_N]
        write_text(path, json.dumps({"right": right_N.int().tolist()}))
    right = json.loads(path.read_text())["right"]
    facts: dict[str, Any] = json.loads((run.folder / "result.json").read_text())
    return {**facts, "test_accuracy": sum(right) / len(right)}


def table(options: argparse.Namespace) -> None:
    """Write results.json and print one line a method, paired with the control of its seed."""
    found = {
        method: {seed: test_facts(method, seed, options) for seed in options.seeds}
        for method in options.methods
    }
    costs_path = options.out / "costs.json"
    costs = json.loads(costs_path.read_text())["costs"] if costs_path.exists() else {}
    lines = ["| method | weights | validation | test | test against the control | n | update |"]
    lines.append("|---|---|---|---|---|---|---|")
    for method, runs in found.items():
        seeds = [seed for seed, facts in runs.items() if facts and found["control"][seed]]
        if not seeds:
            continue
        columns = [
            mean_and_spread([100 * runs[seed][name] for seed in seeds], " %")
            for name in ("validation_accuracy", "test_accuracy")
        ]
        gains = [
            100 * (runs[seed]["test_accuracy"] - found["control"][seed]["test_accuracy"])
            for seed in seeds
        ]
        columns.append("" if method == "control" else mean_and_spread(gains, "", sign="+"))
        cost = f"{costs[method]['ratio']:.2f}" if method in costs else "not timed"
        columns.insert(0, "" if method == "control" else f"× {chosen_scale(method, options):g}")
        lines.append(f"| `{method}` | {' | '.join(columns)} | {len(seeds)} | {cost} |")
    values = {m: {str(s): f for s, f in runs.items() if f} for m, runs in found.items()}
    write_text(options.out / "results.json", json.dumps(values, indent=2))
    print("\n".join(lines))
    if options.write is not None:
        text = options.write.read_text()
        before, rest = text.split(TABLE_START)
        _, after = rest.split(TABLE_END)
        body = "\n".join(["", conditions(options), "", *lines, ""])
        write_text(options.write, f"{before}{TABLE_START}{body}{TABLE_END}{after}")


def conditions(options: argparse.Namespace) -> str:
    """Return what the table was measured with, in words."""
    facts, versions = hardware_facts(), package_versions()
    return (
        "CIFAR-10; teacher ResNet-56 (93.39 %), for `ensemble` ResNet-20 (91.73 %) too; student "
        f"`{STUDENT['name']}` {STUDENT['arguments']['stages']} of 11,754 parameters; "
        f"{options.epochs} epochs of 351 updates, {options.views} stored views, AdamW at 0.02 "
        "(chosen on the validation split for the control, used for all). *Weights*: those of the "
        "recipe reference times this, 1 or 0.1, chosen on the first seed's validation split. "
        f"{facts['processor']}, {options.threads} thread, "
        f"torch {versions['torch']}. Accuracies: mean ± standard deviation over seeds, on 5,000 "
        "validation and 10,000 test pictures."
    )


def mean_and_spread(values: list[float], unit: str, *, sign: str = "") -> str:
    """Return the mean and the standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}{unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("train", "costs", "table"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teachers", type=Path, required=True, help="resnet20-* and resnet56-*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:NUM_ASKED])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="page to write the table into")
    parser.add_argument("--updates", type=int, default=15, help="timed updates of each method")
    options = parser.parse_args()
    setup_logging()
    actions = {"train": train_all, "costs": step_costs, "table": table}
    actions[options.action](options)


if __name__ == "__main__":
    main()
