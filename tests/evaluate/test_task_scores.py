"""Scores of a task, and what can be had without a head for it."""

import pytest
import torch

from understudy.evaluate.task_scores import baselines, nesting_of, score_task
from understudy.heads.tasks import UNLABELLED, UNSEEN


@pytest.fixture
def breeds():
    """Two classes of the data; the task's classes 0 and 1 are the first, 2 to 11 the second."""
    own_N = torch.tensor([0] * 30 + [1] * 100)
    task_N = torch.cat(
        [torch.arange(30) % 2 * (torch.arange(30) % 3 == 0), 2 + torch.arange(100) % 10]
    )
    return own_N, task_N


def test_nesting_is_found_in_either_direction(breeds):
    own_N, task_N = breeds
    finer = nesting_of(own_N, task_N, num_own=2, num_task=12)
    assert (finer.kind, finer.share) == ("finer", 1.0)
    coarser = nesting_of(task_N, own_N, num_own=12, num_task=2)
    assert (coarser.kind, coarser.share) == ("coarser", 1.0)
    half = torch.where(torch.arange(130) % 2 == 0, task_N, UNLABELLED)
    hidden = torch.where(torch.arange(130) % 5 == 0, -1, own_N)
    some = nesting_of(hidden, half, num_own=2, num_task=12)
    assert int(some.counts_CK.sum()) == int(((half >= 0) & (hidden >= 0)).sum())
    crossed = nesting_of(torch.arange(40) % 2, torch.arange(40) // 2 % 3, num_own=2, num_task=3)
    assert crossed.kind is None
    assert crossed.share < 0.95
    assert crossed.agreement(torch.zeros(3).long(), torch.zeros(3).long()) is None


def test_scores_count_what_they_say(breeds):
    nesting = nesting_of(*breeds, num_own=2, num_task=12)
    labels_N = torch.tensor([0, 1, 2, 11, UNSEEN, UNLABELLED])
    own_N = torch.tensor([0, 1, 1, 1, 0, 0])
    logits_NK = torch.zeros(6, 12)
    logits_NK[0, 0] = 5  # right
    logits_NK[1, [0, 1]] = torch.tensor([5.0, 4.0])  # wrong, second guess; own head says class 1
    logits_NK[2, 3] = 5  # wrong, and label 2 is tied for the rest
    logits_NK[2, 2] = -1
    logits_NK[3, 11] = 5  # right
    scores = score_task(logits_NK, labels_N, own_N=own_N, nesting=nesting)
    assert (scores.num_samples, scores.num_unseen, scores.num_unlabelled) == (4, 1, 1)
    assert scores.accuracy == 2 / 4
    assert scores.accuracy_with_unseen == 2 / 5
    assert scores.top5_accuracy == 3 / 4
    assert scores.consistency == 3 / 4
    expected = torch.nn.functional.cross_entropy(logits_NK[:4].double(), labels_N[:4]).item()
    assert scores.nll == pytest.approx(expected)


def test_a_split_without_a_known_label_has_no_scores(breeds):
    nesting = nesting_of(*breeds, num_own=2, num_task=12)
    scores = score_task(
        torch.zeros(2, 12),
        torch.tensor([UNSEEN, UNLABELLED]),
        own_N=torch.zeros(2),
        nesting=nesting,
    )
    assert scores.to_json() == {
        "num_samples": 0,
        "num_unseen": 1,
        "num_unlabelled": 1,
        **dict.fromkeys(
            ("accuracy", "accuracy_with_unseen", "top5_accuracy", "nll", "consistency")
        ),
    }


def test_baselines_need_no_head(breeds):
    own_N, task_N = breeds
    nesting = nesting_of(own_N, task_N, num_own=2, num_task=12)
    labels_N = torch.tensor([0, 0, 1, 2, 5, UNSEEN])
    answers_N = torch.tensor([0, 0, 0, 1, 1, 1])  # of the own head
    found = baselines(labels_N, task_N, own_N=answers_N, nesting=nesting)
    # Class 0 goes most often with 0, class 1 (first of equals) with 2; 0 is the most frequent.
    assert found == {"chance": 1 / 12, "majority": 2 / 5, "from_classes": 3 / 5}
