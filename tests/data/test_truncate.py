"""Truncation keeps what it says, and no example loses its last trained token unnoticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.data.truncate import NOTHING_LEFT, TOO_LONG, shared_limit, truncate

WEIGHTS = st.lists(st.sampled_from([0.0, 0.0, 1.0, 0.5]), min_size=1, max_size=40).map(np.array)


@given(WEIGHTS, st.integers(1, 45), st.sampled_from(["left", "right", "drop", "split"]))
def test_pieces_fit_hold_something_trained_and_account_for_every_token(weights, block, policy):
    kept = truncate(weights, block, policy)
    if len(weights) <= block:
        assert list(kept.spans) == [(0, len(weights))]
        assert (kept.cut, kept.dropped) == (0, None)
        return
    assert all(0 < end - start <= block for start, end in kept.spans)
    assert all(weights[start + 1 : end].any() for start, end in kept.spans)
    if kept.dropped is None:
        seen = {token for start, end in kept.spans for token in range(start, end)}
        assert len(seen) + kept.cut == len(weights)
    else:
        assert not kept.spans
        assert kept.cut == 0


@given(WEIGHTS, st.integers(2, 45))
def test_splitting_trains_every_token_once(weights, block):
    kept = truncate(weights, block, "split")
    trained = [token for start, end in kept.spans for token in range(start + 1, end) if weights[token]]
    if len(weights) > block:
        assert trained == [token for token in range(1, len(weights)) if weights[token]]


@given(WEIGHTS, st.integers(1, 45))
def test_one_side_is_kept_or_the_loss_is_told(weights, block):
    if len(weights) <= block:
        return
    for policy, span in (("right", (0, block)), ("left", (len(weights) - block, len(weights)))):
        kept = truncate(weights, block, policy)
        if weights[span[0] + 1 : span[1]].any():
            assert list(kept.spans) == [span]
            assert kept.cut == len(weights) - block
        else:
            assert kept.dropped == NOTHING_LEFT


@pytest.mark.parametrize(("length", "dropped"), [(8, None), (9, TOO_LONG)])
def test_drop_takes_what_is_longer_than_the_block(length, dropped):
    assert truncate(np.ones(length), 8, "drop").dropped == dropped


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(6, 100))
def test_documents_that_stay_together_fill_the_room_and_no_more(lengths, block):
    limit = shared_limit(lengths, block)
    kept = [min(length, limit) for length in lengths]
    assert sum(kept) <= block
    if sum(lengths) <= block:
        assert kept == lengths
    else:  # one token more for each of those that are cut would not fit
        assert sum(min(length, limit + 1) for length in lengths) > block
