"""Amendments change one key that may change, to a value that it may have."""

from __future__ import annotations

import pytest

from postlude.manifest.amend import apply_amendment, check_amendment
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError


@pytest.fixture
def stages(example):
    return load(example, "x.yaml").manifest.stages


def test_an_amendment_changes_one_key_and_nothing_else(stages):
    before = stages["first"]
    after = apply_amendment(before, "optimizer.lr=3e-4")
    assert after.optimizer.lr == 3e-4
    assert after.model_dump(exclude={"optimizer"}) == before.model_dump(exclude={"optimizer"})
    assert after.optimizer.model_dump(exclude={"lr"}) == before.optimizer.model_dump(exclude={"lr"})
    assert before.optimizer.lr == 1e-5


def test_an_amendment_says_what_was_there_before(stages):
    change = check_amendment(stages["first"], " evaluate.every = 3")
    assert (change.key, change.before, change.value) == ("evaluate.every", 10, 3)
    assert apply_amendment(stages["first"], "max_grad_norm=null").max_grad_norm is None


@pytest.mark.parametrize(
    ("stage", "assignment", "what"),
    [
        ("first", "steps=3", "'steps' may not change"),
        ("first", "optimizer.name=sgd", "'optimizer.name' may not change"),
        ("first", "optimizer.lrr=3", r"Did you mean 'optimizer.lr'\?"),
        ("first", "optimizer.lr=-1", "must be greater than 0, found -1"),
        ("first", "optimizer.lr=fast", "must be a number, found 'fast'"),
        ("first", "optimizer.lr=", "must be a number, found null"),
        ("first", "optimizer.lr=*", "not YAML"),
        ("first", "optimizer.lr", "takes KEY=VALUE"),
        ("first", "checkpoint.every=0", "must be greater than 0"),
        ("second", "evaluate.every=3", "has no evaluate.every"),
        ("second", "optimizer.weight_decay=3", "has no optimizer.weight_decay"),
    ],
)
def test_an_amendment_that_cannot_be_is_refused(stages, stage, assignment, what):
    for refuse in (apply_amendment, check_amendment):
        with pytest.raises(ManifestError, match=what):
            refuse(stages[stage], assignment)
