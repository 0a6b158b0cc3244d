"""The tokens of a sample come back as they were kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.runs import tokens

f32 = st.floats(width=32, allow_nan=False)


@given(st.lists(st.tuples(st.text(), st.booleans(), st.integers(0, 3), f32, f32, f32), max_size=20))
def test_tokens_come_back(drawn: list) -> None:
    sampled = [is_sampled for _, is_sampled, *_ in drawn]
    own = [row for row in drawn if row[1]]
    columns = [np.array([row[place] for row in own], np.float32) for place in (3, 4, 5)]
    line = tokens.told([row[0] for row in drawn], sampled, [row[2] for row in own], *columns)
    back = tokens.Tokens.of(json.loads(json.dumps(line)))
    assert back is not None
    assert back.texts == [row[0] for row in drawn]
    assert back.sampled.tolist() == sampled
    assert back.versions.tolist() == [row[2] if row[1] else -1 for row in drawn]
    for kept, column in zip((back.engine_logp, back.trainer_logp, back.entropy), columns, strict=True):
        assert np.array_equal(kept[back.sampled], column)
        assert np.isnan(kept[~back.sampled]).all()


def test_the_ratio_is_of_the_trainer_to_the_engine() -> None:
    one = np.array([-1.0], np.float32)
    line = tokens.told(["a", "b"], [False, True], [3], one, one + np.log(2.0), one)
    told = tokens.Tokens.of(line)
    assert told is not None
    assert np.isnan(told.ratio[0])
    assert told.ratio[1] == pytest.approx(2.0)


def test_a_line_without_tokens_has_none() -> None:
    assert tokens.Tokens.of({"step": 1}) is None


def test_what_does_not_fit_together_is_refused() -> None:
    one = np.zeros(1, np.float32)
    line = tokens.told(["a", "b"], [False, True], [3], one, one, one)
    for wrong in ({"token_texts": ["a"]}, {"engine_logp": "AAAA"}, {"token_versions": [3, 2]}):
        with pytest.raises(ValueError):
            tokens.Tokens.of(line | wrong)
