"""The result of ranking teachers in words: a headline, reasons for each, and what is not shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from understudy.recipes.schema import Recipe
from understudy.recipes.strategies import Ensemble
from understudy.report.formats import (
    NOT_MEASURED,
    count,
    duration,
    fixed,
    percent,
    points,
    significant,
    size,
)
from understudy.report.judges import SATURATED
from understudy.report.ranking import CandidateRow, Gap, PairRow, Ranking
from understudy.train.loss_table import LOSSES

# A teacher that is right this much less often on the training views than on validation pictures.
VIEW_LOSS = 0.05
# Share of the way from chance to certainty.
NEARLY_UNIFORM = 0.1
# As in a chain of assistants, whose steps are kept within it.
LARGE_GAP = 10.0


def in_words(ranking: Ranking, recipe: Recipe) -> Ranking:
    """Return the ranking with headline, reasons and caveats."""
    rows = [replace(row, reasons=tuple(reasons(ranking, row))) for row in ranking.candidates]
    worded = replace(ranking, candidates=tuple(rows))
    return replace(worded, headline=headline(worded), caveats=tuple(caveats(worded, recipe)))


def with_margin(gap: Gap) -> str:
    """Return a difference of accuracies and what chance explains of it."""
    return f"{points(gap.value)} (± {fixed(100 * gap.margin, 2)})"


def headline(ranking: Ranking) -> str:
    """Return what to take, in one or two sentences."""
    best = ranking.candidates[0]
    if best.tied_with:
        others = join(best.tied_with)
        text = (
            f"Take {best.name}: students of {join((best.name, *best.tied_with))} are equally good "
            f"within noise, and it labels faster than {others}."
        )
    elif len(ranking.candidates) > 1:
        text = f"Take {best.name}: its student is better than the others' by more than noise."
    else:
        text = f"{best.name} is the only candidate."
    if ranking.inversions:
        pair = ranking.inversions[0]
        text += f" {pair.first} is a better teacher than {pair.second} and makes a worse student."
    helpful = [row for row in ranking.candidates if row.against_control.value > 0]
    if not any(not row.against_control.is_noise for row in helpful):
        text += " No student is shown to be better than one without a teacher in this probe."
    return text


def reasons(ranking: Ranking, row: CandidateRow) -> Iterator[str]:
    """Yield why a candidate stands where it stands, one sentence each."""
    yield student_sentence(ranking, row)
    if row.tied_with:
        yield tie_sentence(ranking, row)
    inverted = [pair for pair in ranking.inversions if pair.first == row.name]
    for pair in inverted:
        yield (
            f"A better teacher that makes a worse student: {with_margin(pair.teacher)} of accuracy "
            f"against {pair.second}, and its student {with_margin(pair.student)}."
        )
    for other in ranking.candidates:
        if other.name == row.name:
            continue
        pair = ranking.pair(row.name, other.name)
        if unshown(pair):
            yield (
                f"More accurate than {other.name} by {with_margin(pair.teacher)}, which its "
                f"student does not show: {with_margin(pair.student)}, within noise."
            )
    yield from likely_causes(row, ranking.num_classes, is_inverted=bool(inverted))
    yield cost_sentence(row)


def unshown(pair: PairRow) -> bool:
    """Whether the first is the better teacher and the students are within noise."""
    return pair.teacher.value > pair.teacher.margin and pair.student.is_noise


def student_sentence(ranking: Ranking, row: CandidateRow) -> str:
    """Return what the student reached, and how it compares with one without a teacher."""
    num_seeds = len(row.student_accuracies)
    spread = ""
    if row.student_spread is not None:
        spread = f", standard deviation {fixed(100 * row.student_spread, 2)}"
    seeds = f"mean of {num_seeds} seeds{spread}" if num_seeds > 1 else "one seed"
    gap = row.against_control
    judged = "within noise of" if gap.is_noise else "better than" if gap.value > 0 else "worse than"
    return (
        f"Its student reaches {percent(row.student_accuracy)} ({seeds}), {with_margin(gap)}, "
        f"{judged} the one without a teacher ({percent(ranking.control_accuracy)})."
    )


def tie_sentence(ranking: Ranking, row: CandidateRow) -> str:
    """Return with whom it is tied and what decides among them."""
    best = min((row, *map(ranking.candidate, row.tied_with)), key=lambda one: one.place)
    if row is best:
        return (
            f"Its student is within noise of that of {join(row.tied_with)}; it comes first as it "
            "labels fastest."
        )
    share = best.throughput.images_per_second / row.throughput.images_per_second
    return (
        f"Its student is within noise of that of {best.name}, which labels "
        f"{significant(share, 2)} times as fast."
    )


def likely_causes(row: CandidateRow, num_classes: int, *, is_inverted: bool) -> Iterator[str]:
    """Yield facts that are known to make a teacher less useful than its accuracy says."""
    if row.confidence >= SATURATED:
        yield (
            f"Its soft targets say little more than labels: mean confidence "
            f"{fixed(row.confidence, 3)}. A higher distillation.temperature, or views that mix "
            "pictures, bring out more."
        )
    chance = 1 / num_classes
    if row.confidence - chance < NEARLY_UNIFORM * (1 - chance):
        yield (
            f"Its soft targets are nearly uniform: mean confidence {fixed(row.confidence, 3)} of "
            f"{num_classes} classes. A lower distillation.temperature brings out more."
        )
    if row.view_accuracy is not None and row.teacher_accuracy - row.view_accuracy > VIEW_LOSS:
        yield (
            f"It is right on {percent(row.view_accuracy, 1)} of the training views and on "
            f"{percent(row.teacher_accuracy, 1)} of the validation pictures: it was not trained "
            "for these views, which are all that its student sees."
        )
    if row.params_ratio >= LARGE_GAP and is_inverted:
        yield (
            f"It has {significant(row.params_ratio, 2)} times the student's parameters: strategy "
            "progressive bridges such a gap with assistants."
        )


def cost_sentence(row: CandidateRow) -> str:
    """Return what the teacher costs on this machine."""
    through = row.throughput
    memory = "memory not measured"
    if row.memory_growth_bytes is not None:
        memory = f"{size(row.memory_growth_bytes)} of memory"
    energy = NOT_MEASURED if row.energy_mj is None else f"{significant(row.energy_mj)} mJ a picture"
    return (
        f"It labels {count(through.images_per_second)} images/s in {through.runtime} (median of "
        f"{through.num_batches} batches of {through.batch_size}), "
        f"{duration(row.labelling_seconds)} for all views of the recipe, with {memory}; "
        f"energy {energy}."
    )


def caveats(ranking: Ranking, recipe: Recipe) -> Iterator[str]:
    """Yield what the ranking does not show."""
    probe = ranking.probe
    yield (
        f"A probe is {count(probe.num_steps)} updates ({probe.num_epochs} epochs of "
        f"{count(probe.num_samples)} of {count(ranking.num_train)} samples); the recipe's training "
        f"has {recipe.training.num_epochs} epochs. A longer training may rank close candidates "
        "otherwise."
    )
    if ranking.training_deviation is None:
        yield (
            "One seed: how much students differ from training to training is not known, so noise "
            "counts the pictures only. Set probe.num_seeds to 3 or more."
        )
    if given := given_weights(recipe):
        yield (
            f"The weights of {join(given)} were given: if validation pictures were among those "
            "that they were trained on, their own accuracies are too high here and tell less."
        )
    names = list(recipe.distillation.losses)
    left_out = [name for name in names if name not in logit_names(recipe)]
    if left_out:
        yield f"Losses on layers are left out of the probes: {', '.join(left_out)}."
    yield (
        f"All accuracies are of the {count(ranking.num_validation)} validation pictures; the test "
        "split was not read. "
        + (
            "Energy was not measured."
            if all(row.energy_mj is None for row in ranking.candidates)
            else "Energy is what the machine's counters rose above idle while labelling."
        )
    )


def given_weights(recipe: Recipe) -> tuple[str, ...]:
    """Return the candidates that were not trained here."""
    sections = dict(recipe.candidates)
    if not sections and recipe.teacher is not None and isinstance(recipe.strategy, Ensemble):
        others = recipe.strategy.teachers
        sections = {"teacher": recipe.teacher}
        sections |= {f"teacher-{number}": one for number, one in enumerate(others, start=2)}
    return tuple(name for name, section in sections.items() if section.training is None)


def logit_names(recipe: Recipe) -> list[str]:
    """Return the further losses that read logits."""
    return [name for name in recipe.distillation.losses if LOSSES[name].reads == "logits"]


def join(names: tuple[str, ...]) -> str:
    """Return names as a list in a sentence."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
