"""How well a head does its task, beside what needs no head: guessing, and the classes alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.heads.tasks import UNLABELLED, UNSEEN

TOP = 5
# With this many classes or fewer the top five say little.
FEW_CLASSES = 10
# Largest share of training samples against a nesting that still counts as one: mislabelled ones.
MAX_EXCEPTIONS = 0.05


@dataclass(frozen=True)
class TaskScores:
    """What a head does on one split.

    Attributes:
        num_samples: those with a label that occurs in the training split.
        num_unseen: those with a label that does not; no head could answer them.
        num_unlabelled: those without a label, which count nowhere.
        accuracy: share of right answers among ``num_samples``; None where there are none.
        accuracy_with_unseen: the same, the unseen counted as wrong.
        top5_accuracy: share with the label among the five largest logits; None with few classes.
        nll: mean negative log-likelihood of the label, in nats.
        consistency: share of ``num_samples`` whose answer agrees with the class that the
            network's own head gives; None where tasks are not nested (``Nesting``).
    """

    num_samples: int
    num_unseen: int
    num_unlabelled: int
    accuracy: float | None
    accuracy_with_unseen: float | None
    top5_accuracy: float | None
    nll: float | None
    consistency: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the scores as a plain dict."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Nesting:
    """How the classes of a task lie in those of the data, or the other way round.

    Attributes:
        kind: "finer" where a task's class belongs to one class of the data (breeds in animals),
            "coarser" where a class of the data belongs to one of the task, else None.
        share: of the training samples for which that is so.
        counts_CK: training samples by class of the data and class of the task.
    """

    kind: Literal["finer", "coarser"] | None
    share: float
    counts_CK: Tensor

    def agreement(self, own_N: Tensor, answers_N: Tensor) -> float | None:
        """Return the share of answers that agree with the classes given by the own head."""
        if self.kind is None or len(own_N) == 0:
            return None
        if self.kind == "finer":
            agrees_N = self.counts_CK.argmax(dim=0)[answers_N] == own_N
        else:
            agrees_N = self.counts_CK.argmax(dim=1)[own_N] == answers_N
        return agrees_N.double().mean().item()

    def answers_from(self, own_N: Tensor) -> Tensor:
        """Return for each class of the data the task's class it most often goes with."""
        return self.counts_CK.argmax(dim=1)[own_N]


def nesting_of(
    own_labels_N: Tensor, task_labels_N: Tensor, *, num_own: int, num_task: int
) -> Nesting:
    """Return how a task and the data's classes are nested, from the labels of training samples.

    Samples that lack either label (a negative number) do not count.
    """
    both_N = (own_labels_N >= 0) & (task_labels_N >= 0)
    own_labels_N, task_labels_N = own_labels_N[both_N], task_labels_N[both_N]
    counts = torch.bincount(own_labels_N * num_task + task_labels_N, minlength=num_own * num_task)
    counts_CK = counts.view(num_own, num_task)
    shares: dict[Literal["finer", "coarser"], float] = {
        "finer": (counts_CK.amax(dim=0).sum() / counts_CK.sum()).item(),
        "coarser": (counts_CK.amax(dim=1).sum() / counts_CK.sum()).item(),
    }
    kind = max(shares, key=lambda name: shares[name])
    is_nested = shares[kind] >= 1 - MAX_EXCEPTIONS
    return Nesting(kind if is_nested else None, shares[kind], counts_CK)


def score_task(
    logits_NK: Tensor, labels_N: Tensor, *, own_N: Tensor, nesting: Nesting
) -> TaskScores:
    """Return the scores of a task's logits.

    Args:
        logits_NK: of all N samples of a split.
        labels_N: int64, with ``UNLABELLED`` and ``UNSEEN`` (``TaskLabels``).
        own_N: the classes that the network's own head gives.
    """
    known_N = labels_N >= 0
    num_known, num_unseen = int(known_N.sum()), int((labels_N == UNSEEN).sum())
    num_unlabelled = int((labels_N == UNLABELLED).sum())
    if num_known == 0:
        return TaskScores(0, num_unseen, num_unlabelled, None, None, None, None, None)
    logits_NK, labels_N, own_N = logits_NK[known_N].double(), labels_N[known_N], own_N[known_N]
    answers_N = logits_NK.argmax(dim=1)
    num_right = int((answers_N == labels_N).sum())
    top5 = None
    if logits_NK.shape[1] > FEW_CLASSES:
        best_N5 = logits_NK.topk(TOP, dim=1).indices
        top5 = (best_N5 == labels_N[:, None]).any(dim=1).double().mean().item()
    return TaskScores(
        num_samples=num_known,
        num_unseen=num_unseen,
        num_unlabelled=num_unlabelled,
        accuracy=num_right / num_known,
        accuracy_with_unseen=num_right / (num_known + num_unseen),
        top5_accuracy=top5,
        nll=F.cross_entropy(logits_NK, labels_N).item(),
        consistency=nesting.agreement(own_N, answers_N),
    )


def baselines(
    labels_N: Tensor, train_labels_N: Tensor, *, own_N: Tensor, nesting: Nesting
) -> dict[str, float | None]:
    """Return the accuracies, over samples with a known label, of what needs no head.

    "chance": 1 / K. "majority": always the most frequent class of the training split.
    "from_classes": for the class that the own head gives, the task's class it most often goes with.
    """
    known_N = labels_N >= 0
    labels_N, own_N = labels_N[known_N], own_N[known_N]
    scores: dict[str, float | None] = {"chance": 1 / nesting.counts_CK.shape[1]}
    majority = torch.bincount(train_labels_N).argmax()
    guesses = {
        "majority": majority.expand_as(labels_N),
        "from_classes": nesting.answers_from(own_N),
    }
    for name, answers_N in guesses.items():
        right_N = (answers_N == labels_N).double()
        scores[name] = right_N.mean().item() if len(right_N) else None
    return scores
