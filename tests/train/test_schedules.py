"""Schedules at their ends, in the middle, and against torch's own."""

import math

import pytest
import torch

from understudy.train.schedules import learning_rate_factor, schedule_value


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_value_moves_from_start_to_end(shape):
    values = [schedule_value(4, 1, shape=shape, progress=p / 10) for p in range(11)]
    assert values[0] == 4
    assert values[10] == pytest.approx(1)
    assert values[5] == pytest.approx(2.5)
    assert values == sorted(values, reverse=True)


def test_value_moves_in_steps():
    value = [
        schedule_value(1, 0, shape="step", progress=p, steps=(0.5, 0.75)) for p in (0.4, 0.5, 0.9)
    ]
    assert value == [1, 0.5, 0]


def test_cosine_equals_torch():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=99)
    for step in range(100):
        ours = learning_rate_factor(
            step, num_steps=100, shape="cosine", num_warmup_steps=0, final_factor=0.0
        )
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        reference.step()


def test_warmup_then_shape():
    def factors(shape, final=0.1):
        return [
            learning_rate_factor(
                s, num_steps=50, shape=shape, num_warmup_steps=10, final_factor=final
            )
            for s in range(50)
        ]

    for shape in ("cosine", "linear", "constant", "one_cycle"):
        values = factors(shape)
        assert values[:10] == sorted(values[:10])
        assert values[9] == pytest.approx(1.0)
        assert values[-1] == pytest.approx(1.0 if shape == "constant" else 0.1)
        assert all(math.isfinite(v) and 0 < v <= 1 for v in values)
