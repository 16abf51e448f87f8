"""``understudy teachers rank``: which of several teachers makes the best student, and why.

Every candidate is loaded or trained and profiled in a run of its own below ``candidates``; the
probes are runs below ``probes``. What is finished is reused, so a ranking that was killed goes on.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from understudy.artifacts import Record
from understudy.errors import RecipeError, problem
from understudy.models.cost import ModelCost, model_cost
from understudy.progress import log
from understudy.recipes.check import check_recipe, check_sizes, problems_of
from understudy.recipes.networks import build_model, model_section
from understudy.recipes.prepare import split
from understudy.recipes.rank_open import no_choice
from understudy.recipes.rank_probe import (
    VALIDATION_NAME,
    candidate_run,
    probe_run,
    run_control,
    run_probe,
    sharing,
)
from understudy.recipes.rank_profile import PROFILE_NAME, load_right, profile, throughput_facts
from understudy.recipes.rank_rules import (
    Comparison,
    better_teachers_of_worse_students,
    paired_difference,
    ranked,
    student_difference,
    training_noise,
)
from understudy.recipes.rank_settings import CONTROL_NAME
from understudy.recipes.rank_words import in_words
from understudy.recipes.run import Run
from understudy.recipes.sections import TeacherSection
from understudy.recipes.strategies import Ensemble
from understudy.recipes.teach import teach_one
from understudy.report.ranking import Gap, PairRow, ProbeFacts, Ranking
from understudy.report.ranking_views import write_ranking
from understudy.report.sampling import Difference
from understudy.train.objective import value_at


@dataclass(frozen=True)
class Found:
    """What was found out about the candidates, by name; ``right_SN`` holds the control's too."""

    candidates: Mapping[str, Run]
    profiles: Mapping[str, Record]
    validated: Mapping[str, Sequence[Record]]
    right_N: Mapping[str, Tensor]
    right_SN: Mapping[str, Tensor]


def rank(run: Run, candidates: Mapping[str, Run]) -> Ranking:
    """Profile and probe ``checked_candidates``; write ranking.json, ranking.md and ranking.html."""
    for name, candidate in candidates.items():
        log.info("candidate %s: %s", name, model_section(candidate, "teacher").name)
        split(candidate)
        teach_one(candidate, "teacher")
    profiles = {name: profile(candidate) for name, candidate in candidates.items()}
    found = probed(run, candidates, profiles)
    ranking = in_words(gathered(run, found), run.recipe)
    write_ranking(ranking, run.folder)
    return ranking


def candidate_sections(run: Run) -> dict[str, TeacherSection]:
    """Return the teachers to choose from: ``candidates``, or those of an ensemble.

    Raises:
        RecipeError: there is nothing to choose.
    """
    recipe = run.recipe
    sections = dict(recipe.candidates)
    if not sections and isinstance(recipe.strategy, Ensemble):
        sections = dict(run.teachers)
    if len(sections) < 2:
        raise no_choice(len(sections))
    return sections


def checked_candidates(run: Run) -> dict[str, Run]:
    """Return the candidates' runs.

    Raises:
        RecipeError: with every problem of every candidate and of the probes.
    """
    sections = candidate_sections(run)
    if run.recipe.data.labelled_fraction < 1:
        raise RecipeError(
            problem(
                f"data.labelled_fraction is {run.recipe.data.labelled_fraction:g}",
                expected="labels of all training rows, as teachers are compared with none at all",
                mend="Set it to 1.",
            )
        )
    candidates = {name: candidate_run(run, name, part) for name, part in sections.items()}
    problems: dict[str, list[str]] = {}
    for name, candidate in candidates.items():
        for text in candidate_problems(candidate):
            problems.setdefault(text, []).append(name)
        for other in candidates.values():
            sharing(other, candidate, "source", "labelled_source", "labelled_splits", "splits")
    if not problems:
        first, first_candidate = next(iter(candidates.items()))
        probe = probe_run(run, first_candidate, first, 0)
        for text in problems_of(lambda: probe.splits) or check_sizes(probe):
            problems[f"probe: {text}"] = list(candidates)
    if problems:  # what all have is no candidate's own
        shared = [text for text, names in problems.items() if len(names) == len(candidates)]
        own = [
            f"candidates.{name}: {text}"
            for text, names in problems.items()
            for name in names
            if text not in shared
        ]
        raise RecipeError(*shared, *own)
    return candidates


def candidate_problems(candidate: Run) -> list[str]:
    """Return everything wrong with one candidate, its data and the student."""
    section = candidate.teachers["teacher"]
    if not section.has_weights:
        return [
            problem(
                f"the network {section.model.name} has no weights",
                expected="a checkpoint, or training to train it",
                mend="Give checkpoint=FILE beside its model.",
            )
        ]
    return problems_of(lambda: check_recipe(candidate))


def probed(run: Run, candidates: Mapping[str, Run], profiles: Mapping[str, Record]) -> Found:
    """Train and validate the probes, seed by seed."""
    seeds = range(run.recipe.probe.num_seeds)
    validated: dict[str, list[Record]] = {name: [] for name in (*candidates, CONTROL_NAME)}
    right: dict[str, list[Tensor]] = {name: [] for name in validated}
    first_candidate = next(iter(candidates.values()))
    first_probe = probe_run(run, first_candidate, CONTROL_NAME, 0)
    # Loaded and drawn once: they are the same in every probe.
    _ = first_probe.splits, first_probe.views
    total = len(seeds) * len(validated)
    for number, (seed, name) in enumerate(itertools.product(seeds, validated), start=1):
        log.info("probe %d of %d: %s, seed %d", number, total, name, run.recipe.seed + seed)
        candidate = candidates.get(name, first_candidate)
        probe = probe_run(run, candidate, name, seed)
        sharing(probe, first_probe, "source", "labelled_source", "labelled_splits")
        sharing(probe, first_probe, "splits", "views")
        record = run_control(probe) if name == CONTROL_NAME else run_probe(probe, candidate)
        validated[name].append(record)
        right[name].append(load_right(probe.folder / VALIDATION_NAME))
    return Found(
        candidates=candidates,
        profiles=profiles,
        validated=validated,
        right_N={n: load_right(c.folder / PROFILE_NAME) for n, c in candidates.items()},
        right_SN={name: torch.stack(rows) for name, rows in right.items()},
    )


def gathered(run: Run, found: Found) -> Ranking:
    """Return the ranking in figures; the words come after."""
    accuracies = {
        name: tuple(record.payload["accuracy"] for record in records)
        for name, records in found.validated.items()
    }
    noise = training_noise(accuracies)
    names = list(found.candidates)
    comparisons = [
        Comparison(
            first,
            second,
            paired_difference(found.right_N[first], found.right_N[second]),
            student_difference(found.right_SN[first], found.right_SN[second], noise),
        )
        for first, second in itertools.combinations(names, 2)
    ]
    means = {name: statistics.fmean(accuracies[name]) for name in accuracies}
    rates = {
        name: throughput_facts(candidate, found.profiles[name])["images_per_second"]
        for name, candidate in found.candidates.items()
    }
    groups = ranked({name: means[name] for name in names}, rates, comparisons)
    student = model_cost(build_model(first_of(found), "student"), run_shape(found))
    rows = [
        {
            **candidate_values(found, name, accuracies[name], student),
            "place": place,
            "tied_with": [other for other in group if other != name],
            "against_control": gap(
                student_difference(found.right_SN[name], found.right_SN[CONTROL_NAME], noise)
            ),
        }
        for place, (group, name) in enumerate(
            ((group, name) for group in groups for name in group), start=1
        )
    ]
    inversions = better_teachers_of_worse_students(comparisons)
    return Ranking.from_values(
        {
            **provenance(run, found),
            "probe": probe_facts(run, found, student),
            "training_deviation": noise.standard_deviation if noise else None,
            "control_accuracies": accuracies[CONTROL_NAME],
            "control_accuracy": means[CONTROL_NAME],
            "candidates": rows,
            "comparisons": [pair_values(one) for one in comparisons],
            "inversions": [pair_values(one) for one in inversions],
        }
    )


def provenance(run: Run, found: Found) -> dict[str, Any]:
    """Return from what the ranking was made, and when and where."""
    any_profile = next(iter(found.profiles.values()))
    candidate = first_of(found)
    return {
        "run_name": run.recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": run.recipe.seed,
        "recipe_hash": run.recipe_hash,
        "versions": any_profile.versions,
        "hardware": any_profile.hardware,
        "data": run.recipe.data.source,
        "num_classes": len(candidate.source.class_names),
        "num_train": len(candidate.splits.train),
        "num_validation": len(candidate.splits.validation),
    }


def probe_facts(run: Run, found: Found, student: ModelCost) -> ProbeFacts:
    """Return what the probes have in common."""
    settings, recipe = run.recipe.probe, run.recipe
    any_record = found.validated[CONTROL_NAME][0]
    num_available = len(first_of(found).splits.train)
    return ProbeFacts(
        num_epochs=settings.num_epochs,
        num_samples=settings.num_of(num_available) or num_available,
        num_steps=any_record.payload["num_steps"],
        num_views=min(recipe.views.num_views, settings.num_epochs),
        seeds=tuple(recipe.seed + number for number in range(settings.num_seeds)),
        temperature=value_at(recipe.distillation.temperature, 0.5),
        student=recipe.student.model.name,
        student_params=student.num_params,
        student_macs=student.macs,
    )


def candidate_values(
    found: Found, name: str, accuracies: Sequence[float], student: ModelCost
) -> dict[str, Any]:
    """Return the fields of one candidate that do not depend on the others."""
    candidate, record = found.candidates[name], found.profiles[name]
    cost = ModelCost(**record.payload["cost"])
    through = throughput_facts(candidate, record)
    num_images = len(candidate.splits.train) * candidate.recipe.views.num_views
    said = found.validated[name][0].payload
    ratio = cost.macs / student.macs if cost.macs and student.macs else None
    return {
        "name": name,
        "model": model_section(candidate, "teacher").name,
        "teacher_accuracy": found.right_N[name].double().mean().item(),
        **record.payload["cost"],
        "params_ratio": cost.num_params / student.num_params,
        "macs_ratio": ratio,
        "throughput": through,
        "labelling_seconds": num_images / through["images_per_second"],
        "peak_memory_bytes": record.timing["peak_memory_bytes"],
        "baseline_memory_bytes": record.timing["baseline_memory_bytes"],
        "energy_mj": record.timing.get("energy", {}).get("energy_mj"),
        "confidence": said["confidence"],
        "view_accuracy": said["view_accuracy"],
        "student_accuracies": accuracies,
        "student_accuracy": statistics.fmean(accuracies),
        "student_spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
    }


def first_of(found: Found) -> Run:
    """Return one of the candidates' runs, for what is the same in all."""
    return next(iter(found.candidates.values()))


def run_shape(found: Found) -> tuple[int, int, int]:
    """Return the shape of a picture."""
    return first_of(found).source.image_shape


def gap(difference: Difference) -> Gap:
    """Return a difference as the record holds it."""
    return Gap(difference.value, difference.margin)


def pair_values(comparison: Comparison) -> PairRow:
    """Return a comparison as the record holds it."""
    return PairRow(
        comparison.first, comparison.second, gap(comparison.teacher), gap(comparison.student)
    )
