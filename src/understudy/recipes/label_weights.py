"""What the keys of trainings say of how labels are weighed among pictures without one."""

from __future__ import annotations

from understudy.recipes.run import Run
from understudy.train.settings import TrainSettings


def labels_section(run: Run, settings: TrainSettings, *, labels_alone: bool) -> dict[str, str]:
    """Return what a key holds where an update is cut into parts that have unequal shares of labels.

    Every part counted alike once, however few of its pictures had a label.

    Args:
        labels_alone: it is trained on labelled pictures and without the teacher; what is mixed
            into them may still have no label.
    """
    recipe = run.recipe
    is_cut = settings.num_micro_batches > 1 or recipe.device.num_processes > 1
    if recipe.data.all_labelled or not is_cut:
        return {}
    if labels_alone:
        differs = run.views.mixes
    else:
        differs = recipe.strategy.name != "label_free" or recipe.exits is not None
    return {"labels": "weighed over the update"} if differs else {}
