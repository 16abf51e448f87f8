"""Trials in order: drawn, given to the objective, recorded; Optuna keeps them.

Any number of processes, on any number of machines, work on one study. The storage numbers trials,
and that number is the claim: nobody else has it, and what is drawn is a function of it. A trial
whose process died is taken up by the next process that looks for work in the same folder, wherever
that lies by then, with the same values: what its training left on disk is continued.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import socket
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from understudy.artifacts import write_text
from understudy.errors import InputError, MissingExtraError, UnderstudyError, problem
from understudy.progress import log
from understudy.runtime import derive_seed
from understudy.search.plan import OBJECTIVES, Attempt, Objective, Pruned, SearchPlan
from understudy.search.space import Choice, Range, yaml_text

if TYPE_CHECKING:
    import optuna

PLAN_KEY, FOLDER_KEY, REASON_KEY, MEASURES_KEY = "plan", "folder", "reason", "measures"
BINDING_KEY = "made_from"
# Of a trial: the last epoch reported, whether it was asked to stop, and how often it died where.
EPOCH_KEY, STOPPED_KEY, DEATHS_KEY = "epoch", "stopped", "deaths"
MAX_DEATHS = 3
HIDDEN = ":***@"
_PASSWORD = re.compile(r"(://[^:/@]*):[^@/]*@")
TRIALS_NAME, PLACE_NAME = "trials", "place"


def import_optuna() -> Any:
    """Return Optuna, quiet; or say which extra brings it."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise MissingExtraError("optuna", "search") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(storage: str, name: str, plan: SearchPlan) -> optuna.Study:
    """Create a study, or go on with the one of this name.

    Args:
        storage: URL of a database, such as ``sqlite:////folder/search.db``.

    Raises:
        InputError: the database cannot be used, or holds a search with another plan.
    """
    library = import_optuna()
    try:
        study: optuna.Study = library.create_study(
            storage=storage,
            study_name=name,
            directions=[OBJECTIVES[objective] for objective in plan.objectives],
            load_if_exists=True,
        )
    except Exception as error:
        # The driver of the database is the user's choice, and so are its exceptions.
        line = without_password(" ".join(str(error).split()))[:300]
        raise InputError(
            problem(
                f"the storage {without_password(storage)} cannot be used ({line})",
                expected="the URL of a database that SQLAlchemy opens",
                mend="Correct --storage; without it, a file in the search folder is used.",
            )
        ) from None
    found = study.user_attrs.get(PLAN_KEY)
    if found is None:
        study.set_user_attr(PLAN_KEY, plan.to_json())
    elif found != plan.to_json():
        raise InputError(
            problem(
                f"'{name}' in {without_password(storage)} is another search: "
                f"{'; '.join(differences(found, plan.to_json()))}",
                expected="the same recipe, space, objectives, sampler and seed, to go on",
                mend="Give what was given before, or another --out.",
            )
        )
    study.pruner = make_pruner(plan)
    return study


def without_password(text: str) -> str:
    """Return a text with the passwords of its URLs hidden."""
    return _PASSWORD.sub(rf"\1{HIDDEN}", text)


def check_bound(study: optuna.Study, made_from: Mapping[str, str]) -> None:
    """Refuse to go on with something else than what the trials so far were made from.

    Args:
        made_from: what it is, as far as it is known.

    Raises:
        InputError: earlier trials had other data, or another teacher.
    """
    found = study.user_attrs.get(BINDING_KEY, {})
    if changed := [key for key in made_from if found.get(key, made_from[key]) != made_from[key]]:
        raise InputError(
            problem(
                f"'{study.study_name}' is a search with another {' and another '.join(changed)}",
                expected="the same pictures, teacher weights and code, as its trials are compared",
                mend="Give what was given before, or another --out.",
            )
        )


def bind(study: optuna.Study, made_from: Mapping[str, str]) -> None:
    """Keep in the study what its trials are made from, and check it."""
    check_bound(study, made_from)
    study.set_user_attr(BINDING_KEY, study.user_attrs.get(BINDING_KEY, {}) | dict(made_from))


def differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return in what a search differs from the one that is asked for."""
    return [
        f"its {key} is another"
        if key == "recipe"  # a hash, which says nothing to a reader
        else f"its {key} is {found.get(key)}, and {value} was asked for"
        for key, value in asked.items()
        if found.get(key) != value
    ]


def make_pruner(plan: SearchPlan) -> optuna.pruners.BasePruner:
    """Return the pruner of a plan."""
    pruners = import_optuna().pruners
    if not plan.prunes:
        return pruners.NopPruner()
    makers = {
        "median": lambda: pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
        "halving": lambda: pruners.SuccessiveHalvingPruner(),
        "hyperband": lambda: pruners.HyperbandPruner(),
    }
    return makers[plan.pruner]()


def make_sampler(plan: SearchPlan, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of one trial: a function of the seed and of the trial's number.

    A sampler of the whole search would draw the first values again when a search goes on. Of a
    grid, the trial's number says which point it is.
    """
    samplers = import_optuna().samplers
    seed = derive_seed(plan.seed, "search", number) % (1 << 32)
    if plan.sampler == "grid":
        point = {path: stored(value) for path, value in plan.space.grid()[number].items()}
        with warnings.catch_warnings():  # Optuna has called it experimental since 2020
            warnings.simplefilter("ignore")
            return samplers.PartialFixedSampler(point, samplers.RandomSampler(seed=seed))
    if plan.sampler == "tpe":
        # What others are trying counts as poor, or workers would try nearly the same.
        return samplers.TPESampler(seed=seed, constant_liar=True)
    if plan.sampler == "nsga2":
        return samplers.NSGAIISampler(seed=seed)
    return samplers.RandomSampler(seed=seed)


def num_wanted(plan: SearchPlan) -> int:
    """Return how many trials there are to be, of all processes together."""
    wanted = plan.num_trials
    if plan.sampler == "grid":
        size = len(plan.space.grid())
        wanted = size if wanted is None else min(size, wanted)
    assert wanted is not None, "checked: only a grid is without a number"
    return wanted


def work(study: optuna.Study, plan: SearchPlan, folder: Path, objective: Objective) -> None:
    """Do trials until none is left to draw or to take over."""
    while (taken := take(study, plan, folder)) is not None:
        trial, lock = taken
        with contextlib.closing(lock):
            run_trial(study, plan, trial, trial_folder(folder, trial.number), objective)


def take(study: optuna.Study, plan: SearchPlan, folder: Path) -> tuple[optuna.Trial, Any] | None:
    """Return a trial, with the lock that says that it is worked on; None: nothing is left."""
    with locked(folder / "draw.lock"):
        return take_up(study, plan, folder) or claim(study, plan, folder)


def take_up(study: optuna.Study, plan: SearchPlan, folder: Path) -> tuple[optuna.Trial, Any] | None:
    """Return a trial whose process in this folder is gone, with its lock; None: there is none."""
    running = import_optuna().trial.TrialState.RUNNING
    for frozen in study.get_trials(deepcopy=False, states=(running,)):
        if not is_of(folder, frozen):
            continue  # of another machine
        if frozen.number >= num_wanted(plan):
            continue  # left by ``claim``
        lock = try_lock(trial_folder(folder, frozen.number))
        if lock is None:
            continue
        # Its process may have finished it after the list was made, and then let go of it.
        if study.get_trials(deepcopy=False)[frozen.number].state != running:
            lock.close()
            continue
        trial = opened(study, plan, frozen._trial_id, frozen.number)
        if is_worth_another_try(study, trial):
            log.info("trial %d: taken up where its process left it", frozen.number)
            return trial, lock
        lock.close()
    return None


def claim(study: optuna.Study, plan: SearchPlan, folder: Path) -> tuple[optuna.Trial, Any] | None:
    """Return a new trial, with its lock; None: as many as are wanted were drawn.

    It is created with its folder's place in it: whenever its process dies, that folder takes it up.
    """
    if len(study.get_trials(deepcopy=False)) >= num_wanted(plan):
        return None
    trials = import_optuna().trial
    owned = trials.create_trial(
        state=trials.TrialState.RUNNING, user_attrs={FOLDER_KEY: place(folder)}
    )
    trial_id = study._storage.create_new_trial(study._study_id, template_trial=owned)
    number = study._storage.get_trial(trial_id).number
    if number >= num_wanted(plan):
        # Another machine claimed the last one after they were counted. A trial cannot be deleted:
        # this one stays without values, for when more are wanted.
        return None
    lock = try_lock(trial_folder(folder, number))
    if lock is None:
        raise InputError(
            problem(
                f"{trial_folder(folder, number)} is in use by another search",
                expected="a folder for one search",
                mend="Choose another --out.",
            )
        )
    return opened(study, plan, trial_id, number), lock


def opened(study: optuna.Study, plan: SearchPlan, trial_id: int, number: int) -> optuna.Trial:
    """Return a trial whose values are drawn, where they are not yet, by the sampler of its own."""
    study.sampler = make_sampler(plan, number)
    return import_optuna().trial.Trial(study, trial_id)


def is_worth_another_try(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Return whether to take up a trial whose process is gone; fail one that always dies.

    A trial that needs more memory than there is kills its process every time, at the same epoch.
    """
    known = trial.user_attrs
    if known.get(STOPPED_KEY):
        trial.set_user_attr(STOPPED_KEY, False)
        return True
    epoch, (last_epoch, count) = known.get(EPOCH_KEY), known.get(DEATHS_KEY, (None, 0))
    count = count + 1 if epoch == last_epoch else 1
    trial.set_user_attr(DEATHS_KEY, (epoch, count))
    if count < MAX_DEATHS:
        return True
    where = "before its first validation" if epoch is None else f"after epoch {epoch}"
    reason = f"its process died {count} times {where}; perhaps it needs more memory than there is"
    trial.set_user_attr(REASON_KEY, reason)
    study.tell(trial, state=import_optuna().trial.TrialState.FAIL)
    log.warning("trial %d failed: %s", trial.number, reason)
    return False


def run_trial(
    study: optuna.Study, plan: SearchPlan, trial: optuna.Trial, folder: Path, objective: Objective
) -> None:
    """Give a trial to the objective and tell the study how it ended."""
    states = import_optuna().trial.TrialState
    settings = plan.space.settings(
        {path: draw(trial, path, plan) for path in plan.space.parameters}
    )
    log.info("trial %d: %s", trial.number, ", ".join(f"{k}={v}" for k, v in settings.items()))
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def report(epoch: int, accuracy: float) -> None:
        trial.set_user_attr(EPOCH_KEY, epoch)
        if not plan.prunes or epoch in reported:
            return
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise Pruned

    try:
        measures = objective(Attempt(trial.number, settings, folder, report))
    except Pruned:
        study.tell(trial, state=states.PRUNED)
        log.info("trial %d: stopped, others were better at this point", trial.number)
    except KeyboardInterrupt:
        trial.set_user_attr(STOPPED_KEY, True)
        raise
    except UnderstudyError as error:
        trial.set_user_attr(REASON_KEY, str(error))
        study.tell(trial, state=states.FAIL)
        log.warning("trial %d failed: %s", trial.number, error)
    else:
        trial.set_user_attr(MEASURES_KEY, dict(measures))
        study.tell(trial, [float(measures[name]) for name in plan.objectives])
        shown = ", ".join(f"{name} {measures[name]:.6g}" for name in plan.objectives)
        log.info("trial %d: %s", trial.number, shown)


def draw(trial: optuna.Trial, path: str, plan: SearchPlan) -> Any:
    """Return a trial's value of one parameter."""
    parameter = plan.space.parameters[path]
    if isinstance(parameter, Choice):
        found = trial.suggest_categorical(path, [stored(value) for value in parameter.values])
        return next(value for value in parameter.values if stored(value) == found)
    assert isinstance(parameter, Range)
    if parameter.whole:
        return trial.suggest_int(path, int(parameter.low), int(parameter.high), log=parameter.log)
    return trial.suggest_float(path, parameter.low, parameter.high, log=parameter.log)


def stored(value: Any) -> Any:
    """Return a value as the database keeps it: scalars as they are, others as YAML."""
    return (
        value if value is None or isinstance(value, bool | int | float | str) else yaml_text(value)
    )


def plain_value(parameter: Range | Choice, value: Any) -> Any:
    """Return the value that ``stored`` was given."""
    if isinstance(parameter, Choice) and isinstance(value, str) and value not in parameter.values:
        return yaml.safe_load(value)
    return value


def trial_folder(folder: Path, number: int) -> Path:
    """Return the folder of one trial."""
    return folder / TRIALS_NAME / f"{number:04d}"


def place(folder: Path) -> str:
    """Return the id of a search folder, drawn when it is first asked for; ``draw.lock`` is held.

    It lies in the folder and moves with it, to another disk or another machine.
    """
    path = folder / PLACE_NAME
    if not path.exists():
        write_text(path, uuid.uuid4().hex)
    return path.read_text().strip()


def is_of(folder: Path, trial: optuna.trial.FrozenTrial) -> bool:
    """Return whether a trial was claimed in this folder.

    Databases of earlier versions name the machine and the path. Where those have changed since, the
    trial's own folder tells: only the search that claimed a trial makes it one.
    """
    claimed_in = str(trial.user_attrs.get(FOLDER_KEY))
    if ":" not in claimed_in:
        return claimed_in == place(folder)
    is_here = claimed_in == f"{socket.gethostname()}:{folder.resolve()}"
    return is_here or trial_folder(folder, trial.number).is_dir()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this machine, after waiting for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(folder: Path) -> Any:
    """Return an open file that holds a folder's lock, or None where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".trial.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
