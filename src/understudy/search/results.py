"""What came of a search: trials, the best ones, and which parameters mattered."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from understudy.search.halving import pareto
from understudy.search.plan import OBJECTIVES, SearchPlan
from understudy.search.study import MEASURES_KEY, REASON_KEY, import_optuna, plain_value

if TYPE_CHECKING:
    import optuna

MIN_TRIALS_FOR_IMPORTANCE = 4


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        number: from 0.
        state: complete, pruned, failed or running.
        settings: path to value, ties included.
        measures: what was measured on the validation split, of the network or of its file.
        curve: (epoch, validation accuracy) as far as it was watched for pruning.
        seconds: from the first process that took it up to its end.
        reason: why it failed.
    """

    number: int
    state: str
    settings: dict[str, Any]
    measures: dict[str, Any]
    curve: tuple[tuple[int, float], ...]
    seconds: float | None
    reason: str | None


@dataclass(frozen=True)
class SearchResults:
    """A search as it stands.

    Attributes:
        best: numbers of the trials that no other beats in every objective, the best accuracy
            first, or where that is no objective the best in the first one; with one objective a
            single one.
        importances: objective to parameter to the share of the objective's variance over the
            trials that it explains by itself (functional ANOVA, Hutter, Hoos and Leyton-Brown
            2014), largest first; the rest is of several together. Empty where too few trials are
            complete.
    """

    name: str
    plan: dict[str, Any]
    trials: tuple[TrialRow, ...]
    best: tuple[int, ...]
    importances: dict[str, dict[str, float]]
    recipe: dict[str, Any]
    folder: str
    test_was_read: bool = False

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives' names."""
        return tuple(self.plan["objectives"])

    @property
    def complete(self) -> list[TrialRow]:
        """The trials that have a result."""
        return [row for row in self.trials if row.state == "complete"]

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_results(
    study: optuna.Study, plan: SearchPlan, *, name: str, folder: str, recipe: Mapping[str, Any]
) -> SearchResults:
    """Return the results of a study; ``recipe`` is what every trial started from."""
    trials = study.get_trials(deepcopy=False)
    # One without values was claimed, and nothing has come of it yet.
    rows = tuple(trial_row(frozen, plan) for frozen in trials if frozen.params)
    return SearchResults(
        name=name,
        plan=plan.to_json()
        | {
            "directions": [OBJECTIVES[objective] for objective in plan.objectives],
            "pruner": plan.pruner if plan.prunes else "none",
            "judged_on": "validation",
        },
        trials=rows,
        best=best_of(rows, plan.objectives),
        importances=importances(study, plan),
        recipe=dict(recipe),
        folder=folder,
    )


def trial_row(frozen: optuna.trial.FrozenTrial, plan: SearchPlan) -> TrialRow:
    """Return one trial as plain values."""
    parameters = plan.space.parameters
    known = frozen.params
    drawn = {
        path: plain_value(parameters[path], known[path]) for path in parameters if path in known
    }
    duration = frozen.duration
    return TrialRow(
        number=frozen.number,
        state={"COMPLETE": "complete", "FAIL": "failed"}.get(
            frozen.state.name, frozen.state.name.lower()
        ),
        settings=plan.space.settings(drawn) if len(drawn) == len(parameters) else drawn,
        measures=dict(frozen.user_attrs.get(MEASURES_KEY, {})),
        curve=tuple(sorted(frozen.intermediate_values.items())),
        seconds=None if duration is None else duration.total_seconds(),
        reason=frozen.user_attrs.get(REASON_KEY),
    )


def best_of(rows: Sequence[TrialRow], objectives: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of the trials that no other one dominates.

    One trial dominates another if it is no worse in any objective and better in one; among equal
    ones, the first counts. The best accuracy comes first, whatever objective was named first.
    """
    names = sorted(objectives, key=lambda name: name != "accuracy")
    signs = [1 if OBJECTIVES[name] == "maximize" else -1 for name in names]
    complete = [row for row in rows if row.state == "complete"]
    scores = [
        tuple(sign * row.measures[name] for sign, name in zip(signs, names, strict=True))
        for row in complete
    ]
    best = sorted(pareto(scores), key=lambda position: scores[position], reverse=True)
    return tuple(complete[position].number for position in best)


def importances(study: optuna.Study, plan: SearchPlan) -> dict[str, dict[str, float]]:
    """Return each parameter's share of every objective's variance, where that can be told."""
    optuna = import_optuna()
    states = (optuna.trial.TrialState.COMPLETE,)
    trials = study.get_trials(deepcopy=False, states=states)
    if len(trials) < MIN_TRIALS_FOR_IMPORTANCE:
        return {}
    paths = set.intersection(*(set(trial.params) for trial in trials))
    varied = sorted(p for p in paths if len({str(trial.params[p]) for trial in trials}) > 1)
    found: dict[str, dict[str, float]] = {}
    for position, name in enumerate(plan.objectives):
        values = {trial.values[position] for trial in trials}
        if len(values) < 2 or not varied:
            continue
        try:
            with warnings.catch_warnings():  # of ``normalize``, experimental since 2022
                warnings.simplefilter("ignore")
                shares = optuna.importance.get_param_importances(
                    study,
                    evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
                    params=varied,
                    target=lambda trial, position=position: trial.values[position],
                    normalize=False,
                )
        except RuntimeError:  # its trees explain nothing, as where equal settings took other times
            continue
        found[name] = {path: float(share) for path, share in shares.items()}
    return found
