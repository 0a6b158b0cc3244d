"""Of all that the ranks of a group say, the first cause is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.cluster.failure import Failure, Kind, Outcome, first_cause, outcome_of
from postlude.errors import DataError


def test_mistakes_are_not_recovered_from_and_preemptions_have_a_budget_of_their_own():
    assert {kind for kind in Kind if not kind.recovers} == {Kind.USER, Kind.PROGRAM}
    assert {kind for kind in Kind if kind.budget != Kind.PROCESS.budget} == {Kind.PREEMPTION, Kind.STANDSTILL}
    assert Kind.STANDSTILL.budget is None


@given(st.lists(st.sampled_from([None, *Kind]), min_size=1).filter(any))
def test_the_first_cause_is_what_explains_the_others(kinds):
    order = list(Kind)
    found = first_cause([Outcome(rank, kind=kind, reason=str(rank)) for rank, kind in enumerate(kinds)])
    assert order.index(found.kind) == min(order.index(kind) for kind in kinds if kind is not None)
    assert kinds.index(found.kind) == found.rank


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("row 7 is empty"), Kind.USER),
        (KeyError("x"), Kind.PROGRAM),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), Kind.PROGRAM),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:1234"), Kind.COLLECTIVE),
        (RuntimeError("NCCL communicator was aborted on rank 1"), Kind.COLLECTIVE),
    ],
)
def test_an_exception_is_classified_where_it_was_raised(error, kind):
    found = outcome_of(1, "here", raised(error))
    assert (found.kind, found.rank, found.host) == (kind, 1, "here")
    assert "test_failure.py" in found.trace


def test_what_led_to_an_exception_counts():
    error = raised(ValueError("could not save"))
    error.__cause__ = raised(RuntimeError("gloo: Connection reset by peer"))
    assert outcome_of(0, "here", error).kind is Kind.COLLECTIVE


def test_a_failure_says_who_and_where():
    assert str(Failure(Kind.PROCESS, "the process died", 3, "10.0.0.4")) == "rank 3 on 10.0.0.4: the process died"
