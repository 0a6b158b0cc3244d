"""Amendments change one key that may change, to a value that it may have."""

from __future__ import annotations

import json

import pytest

from postlude.manifest.amend import amended, change_of, check_amendment, keys_with_changes, undoing
from postlude.manifest.explain import explain
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError


@pytest.fixture
def resolved(example):
    return load(example, "x.yaml")


@pytest.fixture
def stages(resolved):
    return resolved.manifest.stages


def test_an_amendment_changes_one_key_and_nothing_else(stages):
    before = stages["first"]
    after = amended(before, ["optimizer.lr=3e-4"])
    assert after.optimizer.lr == 3e-4
    assert after.model_dump(exclude={"optimizer"}) == before.model_dump(exclude={"optimizer"})
    assert after.optimizer.model_dump(exclude={"lr"}) == before.optimizer.model_dump(exclude={"lr"})
    assert before.optimizer.lr == 1e-5


def test_an_amendment_says_what_was_there_before_and_what_it_means(stages):
    change = check_amendment(stages["first"], ["evaluate.every=7"], " evaluate.every = 3")
    assert (change.key, change.before, change.value, change.change.holds) == ("evaluate.every", 7, 3, "step")
    assert amended(stages["first"], ["max_grad_norm=null"]).max_grad_norm is None
    assert amended(stages["first"], ["schedule={name: cosine, warmup_steps: 3}"]).schedule.warmup_steps == 3
    assert amended(stages["first"], ["schedule.warmup_steps=4"]).schedule.warmup_steps == 4


@pytest.mark.parametrize(
    ("stage", "assignment", "what"),
    [
        ("first", "steps=3", "'steps' may not change .*: the schedule and the share"),
        ("first", "optimizer.name=sgd", "'optimizer.name' may not change .* its state was made for it"),
        ("first", "optimizer.lrr=3", r"Did you mean 'optimizer.lr'\?"),
        ("first", "no.such.thing=3", "There is no such key. What may: data"),
        ("first", "optimizer.lr=-1", "must be greater than 0, found -1"),
        ("first", "optimizer.lr=fast", "must be a number, found 'fast'"),
        ("first", "optimizer.lr=", "must be a number, found null"),
        ("first", "optimizer.lr=*", "not YAML"),
        ("first", "optimizer.lr", "takes KEY=VALUE"),
        ("first", "checkpoint.every=0", "must be greater than 0"),
        ("first", "data.others=1", "has no data.others"),
        ("first", "data={others: 1}", "only their weights may change"),
        ("first", "seed=1", "There is no such key"),
        ("second", "evaluate.every=3", "has no evaluate.every"),
        ("second", "optimizer.weight_decay=3", "may not change"),
        ("second", "optimizer.momentum=3", "may not change"),
        ("second", "beta=3", "what has this key does not say that it may"),
    ],
)
def test_an_amendment_that_cannot_be_is_refused(stages, stage, assignment, what):
    with pytest.raises(ManifestError, match=what):
        amended(stages[stage], [assignment])
    with pytest.raises(ManifestError, match=what):
        check_amendment(stages[stage], [], assignment)


def test_the_data_set_whose_passes_are_epochs_keeps_a_share(stages):
    stage = stages["first"].model_copy(update={"data": {"chats": 2.0, "held": 1.0}})
    assert amended(stage, ["data.held=1.0e-9", "data.chats=0.5"]).data == {"chats": 0.5, "held": 1e-9}
    with pytest.raises(ManifestError, match=r"an epoch is a pass over .* of 'chats' less than a hundredth"):
        amended(stage, ["data.chats=0.001"])


def test_an_amendment_is_undone_by_another(stages):
    begun, asked = stages["first"], ["optimizer.lr=3e-4", "evaluate.every=null", "optimizer.lr=1e-3"]
    assert undoing(begun, asked, 1) == "evaluate.every=10"
    assert undoing(begun, asked, 2) == "optimizer.lr=0.0003"
    with pytest.raises(ManifestError, match=r"was followed by 'optimizer.lr=1e-3': undo that one first"):
        undoing(begun, asked, 0)
    asked += [undoing(begun, asked, 2), undoing(begun, asked, 1)]
    assert amended(begun, asked) == amended(begun, asked[:1])


def test_every_value_of_a_stage_is_listed_with_an_answer_and_the_answer_is_kept(stages):
    """What is said to be amendable takes its own value again, and what is not is refused."""
    for stage in stages.values():
        keys = keys_with_changes(stage)
        assert len(keys) > 25
        for each in keys:
            assert each.change == change_of(stage, each.key)
            assignment = f"{each.key}={json.dumps(each.value)}"
            if each.change.allowed:
                assert amended(stage, [assignment]) == stage
            else:
                with pytest.raises(ManifestError, match="may not change"):
                    amended(stage, [assignment])


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("first.optimizer.lr", "It may be amended while the stage runs, from the next step on: it rises."),
        ("first.optimizer.betas", "It may not change while the stage runs: its state was made for it."),
        ("first.data.chats", "from the next step on: the weights hold for what is packed after the window"),
        ("first.checkpoint", "from the next step on"),
        ("data.chats.limit", "It may not change while the stage runs: the data are read as it says"),
        ("seed", "It may not change while the stage runs: the order of the data"),
    ],
)
def test_explain_says_whether_a_key_may_change(resolved, key, said):
    assert said in explain(resolved, key).meaning[-1]
