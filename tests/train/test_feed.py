"""Which view an epoch shows, and that it is what the batches hold."""

import torch

from understudy.data.views import Views
from understudy.train.feed import Feed, ViewPlan
from understudy.train.settings import TrainSettings


def plan(length, num_all, **last):
    settings = TrainSettings(num_epochs=length, last_views=last or None)
    return ViewPlan.of(settings, num_all)


def shown(view_plan, num_epochs):
    return [view_plan.view(epoch) for epoch in range(num_epochs)]


def test_every_view_comes_again_and_again():
    assert shown(plan(7, 3), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_last_views_wait_for_the_last_epochs():
    assert shown(plan(9, 5, num_epochs=3, num_views=2), 9) == [0, 1, 2, 0, 1, 2, 3, 4, 3]


def test_a_short_training_may_show_the_last_views_alone():
    assert shown(plan(3, 5, num_epochs=3, num_views=2), 3) == [3, 4, 3]
    assert shown(plan(2, 2, num_epochs=2, num_views=2), 2) == [0, 1]


def test_the_last_epoch_shows_unmixed_pictures(digits):
    indices_N = torch.arange(64)
    views = Views([{"cutmix": {"probability": 1, "until_view": 2}}], seed=0, partner_pool=indices_N)
    view_plan = plan(5, 3, num_epochs=1, num_views=1)
    feed = Feed(digits, views, indices_N, 32, view_plan, 0)
    for epoch in range(5):
        batches = [batch for batch, _ in feed.epoch(epoch)]
        same = all(torch.equal(b.images_NCHW, digits.images(b.indices_N)) for b in batches)
        assert same == (epoch == 4)
