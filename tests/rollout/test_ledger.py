"""The ledger: whatever is interrupted, each prompt is issued until it is settled, and settled once."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.errors import DataError
from postlude.rollout.ledger import Ledger
from postlude.storage import exact_json


@dataclass
class Rows:
    groups: list[int]

    @property
    def files(self):
        return [list(range(len(self.groups)))]

    seekable = True


def ledger(epochs: int | None = 2, **rows: list[int]) -> Ledger:
    sources = {name: Rows(groups) for name, groups in (rows or {"a": [3, 4], "b": [5]}).items()}
    return Ledger(sources, dict.fromkeys(sources, 1.0), seed=7, epochs=epochs)


@pytest.mark.capability("The prompt ledger: each prompt is trained or dropped, exactly once")
@given(st.integers(0, 2**32))
def test_every_draw_is_settled_once_whatever_is_lost(seed):
    rng = random.Random(seed)
    calm = ledger()
    drawn = {issue.number: issue for issue in calm.issue(1000)}
    assert list(drawn) == list(range(len(drawn)))
    now, settled, waiting = ledger(), {}, {}
    saved = exact_json.dump(now.state()), {}
    while not now.exhausted or waiting:
        issued = now.issue(rng.randint(1, 4))
        assert all(issue == drawn[issue.number] for issue in issued)
        waiting |= {issue.number: issue for issue in issued}
        for issue in list(waiting.values())[: rng.randint(0, 5)]:
            reason = rng.choice([None, "too long"])
            now.settle(waiting.pop(issue.number), reason)
            assert issue.number not in settled
            settled[issue.number] = reason
        if rng.random() < 0.5:
            saved = exact_json.dump(now.state()), dict(settled)
        if rng.random() < 0.25:  # killed
            now, settled, waiting = ledger(), dict(saved[1]), {}
            now.load(exact_json.load(saved[0]))
    assert settled.keys() == drawn.keys()
    assert now.trained == sum(reason is None for reason in settled.values())
    assert now.dropped.total() == len(drawn) - now.trained
    assert now.progress == 1


def test_a_pass_is_every_record_once():
    issues = ledger(1, only=[4, 3]).issue(100)
    assert sorted((issue.group, issue.position) for issue in issues) == [
        (g, p) for g, n in ((0, 4), (1, 3)) for p in range(n)
    ]
    assert {issue.epoch for issue in issues} == {0}
    assert [i.epoch for i in ledger(None, only=[2]).issue(5)] == [0, 0, 1, 1, 2]


def test_what_is_kept_elsewhere_is_open_and_not_issued_again():
    now = ledger()
    first, second = now.issue(2)
    then = ledger()
    then.load(now.state(but=[first]))
    assert then.issue(1) == [second]
    then.settle(first)
    with pytest.raises(KeyError):
        then.settle(first)


def test_other_data_are_refused():
    with pytest.raises(DataError, match="Restore the data"):
        ledger(only=[3]).load(ledger(only=[4]).state())
    with pytest.raises(DataError, match="no records"):
        ledger(empty=[0])
