"""The lock keeps what a run was begun with, and tells what has changed of it."""

from __future__ import annotations

import json
import platform
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.manifest.load import load, restore
from postlude.manifest.lock import (
    Lock,
    LockedStage,
    bearing,
    changed_keys,
    dump_lock,
    hash_of,
    lock,
    read_lock,
)
from postlude.manifest.problem import ManifestError

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
trees = st.recursive(
    scalars, lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3), max_leaves=8
)


@given(st.dictionaries(st.text(), trees, max_size=4))
def test_any_tree_is_read_back_as_it_was_written(tree):
    stages = {"one": LockedStage("ab", ["chats"], ["train"], None), "two": LockedStage("cd", [], [], 4)}
    locked = Lock(hash_of(tree), {"torch": "2.0"}, stages, tree)
    assert read_lock(dump_lock(locked)) == locked


@pytest.mark.capability("The resolved manifest is locked into the run with hashes and versions")
def test_the_lock_of_a_manifest_says_what_ran_it(example):
    resolved = load(example, "x.yaml")
    locked = read_lock(dump_lock(lock(resolved, {"first": 2})))
    assert locked == lock(resolved, {"first": 2})
    assert restore(locked.manifest).model_dump() == resolved.manifest.model_dump()
    assert locked.versions["python"] == platform.python_version()
    assert locked.versions["torch"] == metadata.version("torch")
    assert locked.stages["first"].data == ["chats", "held"]
    assert (locked.stages["first"].threads, locked.stages["second"].threads) == (2, None)


def test_a_hash_depends_on_every_leaf_and_not_on_the_order_of_keys():
    tree = {"b": [1, 2.5], "a": {"c": None, "d": "x"}}
    assert hash_of(tree) == hash_of({"a": {"d": "x", "c": None}, "b": [1, 2.5]})
    others = [
        {"b": [2.5, 1], "a": {"c": None, "d": "x"}},
        {"b": [1, 2.5], "a": {"c": False, "d": "x"}},
        {"b": [1, 2.5], "a": {"c": None, "d": "y"}},
        {"b": [1, 2.5], "a": {"d": "x"}},
    ]
    assert len({hash_of(tree), *map(hash_of, others)}) == 5


# Each change, and the stages whose result it bears on.
CHANGES = [
    ("seed=18", {"first", "second"}),
    ("data.chats.limit=9", {"first", "second"}),
    ("data.held.source.split=dev", {"first"}),
    ("first.steps=9", {"first"}),
    ("defaults.batch.block=512", {"first", "second"}),
    ("defaults.beta=0.9", {"second"}),
    ("second.reference.path=other", {"second"}),
    ("compute.pools.train.workers=3", {"first", "second"}),
    ("first.optimizer.betas=[0.5, 0.9]", {"first"}),
    ("first.max_grad_norm=null", {"first"}),
    ("first.checkpoint.every=7", set()),
    ("first.checkpoint={keep: 9}", set()),
    ("name=other", set()),
    ("run_dir=elsewhere", set()),
    ("compute.pools.train.cpus_per_worker=2", set()),
]


@pytest.mark.capability("A stage that has begun refuses a changed manifest with a diff")
@pytest.mark.parametrize(("change", "stages"), CHANGES)
def test_what_bears_on_a_stage_changes_its_hash_and_is_told(example, change, stages):
    begun, now = load(example, "x.yaml"), load(example, "x.yaml", [change])
    before, after = lock(begun), lock(now)
    for stage in ("first", "second"):
        told = changed_keys(bearing(begun, stage), bearing(now, stage))
        assert bool(told) == (stage in stages), told
        assert (before.stages[stage].hash != after.stages[stage].hash) == (stage in stages)
    assert before.hash != after.hash


def test_a_difference_names_the_key_and_both_values(example):
    begun = load(example, "x.yaml")
    changes = ["first.optimizer.lr=0.5", "data.chats.limit=null", "first.recompute=layer", "first.data={held: 1.0}"]
    now = load(example, "x.yaml", [*changes, "second.data.held=3"])
    assert sorted(changed_keys(bearing(begun, "first"), bearing(now, "first"))) == [
        'data.chats.filters.0: "len(messages) >= 2" -> (not set)',
        "data.chats.filters.1.most: 30 -> (not set)",
        'data.chats.filters.1.name: "length" -> (not set)',
        'data.chats.format.field: "messages" -> (not set)',
        'data.chats.format.name: "chat" -> (not set)',
        "data.chats.limit: 1000 -> (not set)",
        'data.chats.on_bad_record: "stop" -> (not set)',
        "data.chats.source.columns: [] -> (not set)",
        'data.chats.source.name: "path" -> (not set)',
        'data.chats.source.path: "chats.jsonl" -> (not set)',
        'data.chats.train_on: "assistant" -> (not set)',
        'data.chats.truncate: "right" -> (not set)',
        "stages.first.data.chats: 1.0 -> (not set)",
        "stages.first.data.held: (not set) -> 1.0",
        "stages.first.optimizer.lr: 1e-05 -> 0.5",
        'stages.first.recompute: "none" -> "layer"',
    ]


def test_a_stage_that_is_new_or_gone_leaves_the_others_alone(example):
    begun = load(example, "x.yaml")
    more = load(example + "  third: {recipe: pair, model: {from: second}, data: {chats: 2.0}}\n", "x.yaml")
    for stage in ("first", "second"):
        assert bearing(begun, stage) == bearing(more, stage)


def test_a_provider_without_keys_is_locked_as_the_text_that_it_has_always_been(example):
    short, long = example, example.replace("compute:\n", "compute:\n  provider: {name: local}\n")
    for text in (short, long, example.replace("compute:\n", "compute:\n  provider: local\n")):
        resolved = load(text, "x.yaml")
        assert resolved.tree["compute"]["provider"] == "local"
        assert restore(resolved.tree) == resolved.manifest
        assert lock(resolved).hash == lock(load(short, "x.yaml")).hash


@pytest.mark.parametrize("text", ["name: x", "stages: 3", "hash: a\nversions: {}\nstages: {a: {b: 1}}\nmanifest: {}"])
def test_what_is_no_lock_is_refused(text):
    with pytest.raises(ManifestError, match=r"manifest\.lock\.yaml"):
        read_lock(text)


def test_the_text_is_for_people(example):
    text = dump_lock(lock(load(example, "x.yaml")))
    assert text.startswith("# ")
    assert "\n    first:\n      recipe: plain\n" in text.partition("\nmanifest:\n")[2]
    assert json.dumps(text)  # plain text, nothing that is not UTF-8
