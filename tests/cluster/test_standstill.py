"""Times of standing still are found by clocks that are only moved here."""

from __future__ import annotations

import pytest

from postlude.cluster.standstill import Standstill


class Clocks:
    """The two clocks of a machine."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.awake = self.whole = 100.0
        patch.setattr(Standstill, "_running", staticmethod(lambda: self.awake))
        patch.setattr(Standstill, "_passed", staticmethod(lambda: self.whole))

    def pass_by(self, seconds: float, asleep: float = 0.0) -> None:
        self.awake += seconds
        self.whole += seconds + asleep


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


def test_a_gap_is_told_once_and_excuses_for_a_while(clocks: Clocks) -> None:
    standstill = Standstill(5.0)
    clocks.pass_by(0.5)
    assert standstill.look() == []
    assert not standstill.ended_within(60.0)
    clocks.pass_by(40.0)
    assert standstill.ended_within(60.0)
    (stand,) = standstill.look()
    assert (stand.seconds, stand.slept) == (40.0, False)
    assert "stood still for 40 seconds: it was stopped" in str(stand)
    assert standstill.look() == []
    for _ in range(120):
        clocks.pass_by(0.5)
        assert standstill.look() == []
    assert not standstill.ended_within(60.0)


def test_a_machine_that_slept_is_told_from_a_process_that_was_stopped(clocks: Clocks) -> None:
    standstill = Standstill(5.0)
    clocks.pass_by(0.4, asleep=3600.0)
    (stand,) = standstill.look()
    assert stand.slept
    assert "its machine slept" in str(stand)


def test_the_time_before_it_began_does_not_count(clocks: Clocks) -> None:
    standstill = Standstill(5.0)
    clocks.pass_by(100.0)
    with standstill:
        assert standstill.look() == []
        assert not standstill.ended_within(60.0)
