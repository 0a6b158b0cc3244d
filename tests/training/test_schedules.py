"""Schedules: transformers' own as the oracle, and what every schedule must keep."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from postlude.manifest.component import lookup, names

ORACLES = {
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
}


@pytest.mark.capability("Learning-rate schedules: constant, linear, cosine, warm-up-stable-decay")
@pytest.mark.parametrize("name", ORACLES)
def test_after_the_warm_up_the_rate_is_transformers_own(name: str) -> None:
    total, warm_up = 57, 9
    schedule = lookup("schedules", name)(warmup_steps=warm_up)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = ORACLES[name](optimizer, warm_up, total)
    for step in range(total):
        if step >= warm_up:
            assert schedule.factor(step, step / total) == pytest.approx(oracle.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
@given(total=st.integers(1, 500), share=st.floats(0, 1), data=st.data())
def test_every_factor_is_above_zero_and_at_most_one(name: str, total: int, share: float, data: st.DataObject) -> None:
    schedule = lookup("schedules", name)(warmup_steps=int(share * total))
    step = data.draw(st.integers(0, total - 1))
    assert 0 <= schedule.factor(step, step / total) <= 1 + 1e-12
    if step < schedule.warmup_steps:
        assert schedule.factor(step, step / total) == pytest.approx((step + 1) / schedule.warmup_steps)


def test_wsd_holds_the_peak_then_falls_to_its_floor() -> None:
    schedule = lookup("schedules", "wsd")(decay=0.25, floor=0.1)
    assert {schedule.factor(step, step / 100) for step in range(76)} == {1.0}
    falling = [schedule.factor(step, step / 100) for step in range(76, 100)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(0.1 + 0.9 * 0.01 / 0.25)


def test_all_schedules_are_registered() -> None:
    assert {"constant", "cosine", "linear", "wsd"} <= set(names("schedules"))
