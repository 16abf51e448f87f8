"""Checks of a recipe's curriculum and of how its weights are balanced, before anything runs."""

from __future__ import annotations

from understudy.errors import problem
from understudy.recipes.run import Run
from understudy.train.balance import largest_weights

# Log densities: they can be below 0.
SIGNED_LOSSES = ("vid",)
# Their objectives are not the student's alone.
UNBALANCED_STRATEGIES = ("mutual", "deep_to_shallow")


def check_curriculum(run: Run) -> list[str]:
    """The difficulty of the samples must be known to the side that is asked for it."""
    settings = run.recipe.distillation.curriculum
    if settings is None:
        return []
    where = f"distillation.curriculum.difficulty is {settings.difficulty}"
    if settings.difficulty == "student_loss":
        num_unlabelled = int((run.source.labels_N[run.splits.train] < 0).sum())
        if not num_unlabelled:
            return []
        return [
            problem(
                f"{where} and {num_unlabelled} training samples have no label",
                expected="a label for each, to take the student's loss of",
                mend="Set it to entropy, margin or loss, which the teacher's outputs tell.",
            )
        ]
    problems = []
    if not run.stores_outputs:
        problems.append(
            problem(
                f"{where} and strategy {run.recipe.strategy.name} "
                + ("runs the teacher live" if run.teaches_first else "has no trained teacher"),
                expected="a teacher whose outputs are stored before the student is trained",
                mend="Set distillation.curriculum.difficulty to student_loss.",
            )
        )
    if run.views.mixes:
        problems.append(
            problem(
                f"{where} together with views that mix two pictures",
                expected="the teacher's outputs for one sample at a time",
                mend="Drop mixup and cutmix from views.transforms, or set it to student_loss.",
            )
        )
    return problems


def check_balance(run: Run) -> list[str]:
    """There must be something to balance, and a way to measure it."""
    settings, recipe = run.recipe.distillation, run.recipe
    method = settings.balance.method
    if method == "fixed":
        return []
    where = f"distillation.balance.method is {method}"
    if recipe.strategy.name in UNBALANCED_STRATEGIES:
        return [
            problem(
                f"{where} and strategy {recipe.strategy.name} has no soft and hard terms of one "
                "student",
                expected="another strategy, or fixed",
                mend="Drop distillation.balance.",
            )
        ]
    weighted = [name for name, weight in largest_weights(settings).items() if weight > 0]
    problems = []
    if len(weighted) < 2 or (method == "validation" and "ce" not in weighted):
        needed = "ce and another term" if method == "validation" else "two terms or more"
        problems.append(
            problem(
                f"{where} and only {', '.join(weighted)} has a weight",
                expected=needed,
                mend="Give more terms a weight, or drop distillation.balance.",
            )
        )
    signed = [name for name in SIGNED_LOSSES if name in weighted]
    if method == "uncertainty" and signed:
        problems.append(
            problem(
                f"{where} together with {', '.join(signed)}, which can be negative",
                expected="terms of at least 0: the weight of a negative one would grow for ever",
                mend="Drop the loss, or take balance gradient_norm or validation.",
            )
        )
    return problems + (check_gradient_norm(run) if method == "gradient_norm" else [])


def check_gradient_norm(run: Run) -> list[str]:
    """Gradients of single terms must be possible to take, and weights be meant as shares."""
    settings, training = run.recipe.distillation, run.recipe.training
    problems = []
    if training.precision != "float32":
        problems.append(
            problem(
                "distillation.balance.method is gradient_norm with training.precision "
                f"{training.precision}, whose backward pass is for the sum of all terms",
                expected="float32",
                mend="Set training.precision to float32, or take another balance.",
            )
        )
    unsaid = [name for name, loss in settings.losses.items() if loss.weight is None]
    if unsaid:
        problems.append(
            problem(
                f"distillation.balance.method is gradient_norm and {', '.join(unsaid)} has its "
                "default weight, which makes up for the scale of the loss",
                expected="weights that say how large each term's gradient is to the others'",
                mend=f"Give distillation.losses.{unsaid[0]}.weight, such as 0.5.",
            )
        )
    return problems
