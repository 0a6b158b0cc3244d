"""The order of the stages follows from what they need."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from postlude.manifest.graph import datasets_used, order, stages_used
from postlude.manifest.load import load


def test_what_a_stage_needs_is_found_wherever_it_is_named(example):
    text = example.replace(
        "reference: {path: base}", "reference: {from: third}\n    judges: [{path: x}, {from: first}]"
    )
    text += "  third: {recipe: plain, data: {held: 1.0}}\n"
    stages = load(text, "x.yaml").manifest.stages
    assert stages_used(stages["second"]) == {
        ("model", "from"): "first",
        ("reference", "from"): "third",
        ("judges", 1, "from"): "first",
    }
    assert stages_used(stages["first"]) == {}
    assert datasets_used(stages["first"]) == {("data", "chats"): "chats", ("evaluate", "data", "held"): "held"}
    assert order(load(text, "x.yaml").manifest) == ["first", "third", "second"]


@settings(max_examples=30, deadline=None)
@given(st.permutations(list("abcdef")), st.data())
def test_each_stage_comes_after_what_it_needs_otherwise_as_written(names, data):
    topological = data.draw(st.permutations(names))
    needs = {
        name: data.draw(st.sets(st.sampled_from(topological[:i]), max_size=2)) if i else set()
        for i, name in enumerate(topological)
    }
    stages = {
        name: {"recipe": "pair", "model": {"path": "x"}, "data": {"d": 1.0}, "steps": 1}
        | {"judges": [{"from": need} for need in sorted(needs[name])]}
        for name in names
    }
    data_sets = {"d": {"source": {"path": "x"}, "format": "chat"}}
    ordered = order(load(json.dumps({"name": "x", "data": data_sets, "stages": stages}), "x.json").manifest)
    assert sorted(ordered) == sorted(names)
    done: list[str] = []
    for name in ordered:
        ready = [other for other in names if other not in done and needs[other] <= set(done)]
        assert name == ready[0]
        done.append(name)
