"""Defaults, then the stage, then the command line: held against a second, plainer account of the rules."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from postlude.manifest.load import load, restore
from postlude.manifest.problem import ManifestError

LAYERS = ("defaults", "command line, defaults", "stage", "command line, stage")
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "batch.window": st.integers(1, 99),
    "checkpoint.every": st.integers(1, 99),
    "checkpoint.keep": st.integers(1, 99),
    "max_grad_norm": st.floats(0.5, 9) | st.none(),
    "threads": st.integers(1, 8) | st.none(),
    "precision": st.sampled_from(["auto", "fp32"]),
    "compile": st.booleans(),
    "beta": st.floats(0.25, 1),
}
# A layer of the optimiser: a name, a rate, both or neither.
OPTIMIZERS = st.fixed_dictionaries(
    {}, optional={"name": st.sampled_from(["adamw", "sgd"]), "lr": st.floats(0.001, 1).map(lambda x: round(x, 3))}
)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        here = tree
        for part in above:
            here = here.setdefault(part, {})
        here[last] = value
    return tree


def yaml(tree: Any) -> str:
    text = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.dump(tree, text)
    return text.getvalue()


def leaves(tree: Any, path: tuple = ()):
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list) and tree:
        for i, value in enumerate(tree):
            yield from leaves(value, (*path, i))
    else:
        yield path, tree


class Case:
    """A manifest of two stages and a command line, drawn layer by layer."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.said: dict[str, dict[str, dict[str, Any]]] = {}
        shared = {layer: self._layer(draw) for layer in LAYERS[:2]}
        for stage in ("one", "two"):
            self.said[stage] = {**shared, **{layer: self._layer(draw) for layer in LAYERS[2:]}}
        own = {"recipe": "pair", "model.path": "base", "data.chats": 1.0, "steps": 3}
        self.text = yaml(
            {
                "name": "drawn",
                "data": {"chats": {"source": {"path": "x"}, "format": "chat"}},
                "defaults": nested(shared["defaults"]),
                "stages": {stage: nested({**own, **layers["stage"]}) for stage, layers in self.said.items()},
            }
        )
        assignments = self._assignments("defaults", shared["command line, defaults"])
        for stage, layers in self.said.items():
            prefix = draw(st.sampled_from([stage, f"stages.{stage}"]))
            assignments += self._assignments(prefix, layers["command line, stage"])
        self.assignments = draw(st.permutations(assignments))

    @staticmethod
    def _layer(draw: st.DrawFn) -> dict[str, Any]:
        chosen = draw(st.sets(st.sampled_from(sorted(VALUES)), max_size=4))
        optimizer = draw(OPTIMIZERS)
        return {
            **{key: draw(VALUES[key]) for key in sorted(chosen)},
            **{f"optimizer.{key}": value for key, value in optimizer.items()},
        }

    @staticmethod
    def _assignments(prefix: str, layer: dict[str, Any]) -> list[str]:
        return [f"{prefix}.{key}={json.dumps(value)}" for key, value in layer.items()]

    def expected(self, stage: str) -> dict[str, tuple[Any, str]]:
        """By key of the stage: its value and the layer that it comes from."""
        stands: dict[str, tuple[Any, str]] = {}
        for layer in LAYERS:
            said = self.said[stage][layer]
            name = said.get("optimizer.name")
            if name is not None and name != stands.get("optimizer.name", ("adamw", ""))[0]:
                stands.pop("optimizer.lr", None)
            stands |= {key: (value, layer) for key, value in said.items()}
        return stands

    def ignored(self) -> set[str]:
        """The assignments to defaults that no stage takes."""
        taken = [self.expected(stage) for stage in self.said]
        layer = "command line, defaults"
        said = self.said["one"][layer]
        return {key for key in said if all(stage.get(key, (None, ""))[1] != layer for stage in taken)}

    def effective(self) -> list[str]:
        """The assignments without those that change nothing."""
        while ignored := self.ignored():
            for layers in self.said.values():
                layers[LAYERS[1]] = {key: value for key, value in layers[LAYERS[1]].items() if key not in ignored}
            said = tuple(f"defaults.{key}=" for key in ignored)
            self.assignments = [assignment for assignment in self.assignments if not assignment.startswith(said)]
        return self.assignments


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(draw)


@pytest.mark.capability("A stage inherits defaults, and the command line overrides both")
@settings(max_examples=120, deadline=None)
@given(cases())
def test_layers_resolve_as_the_plain_account_has_it(case):
    ignored = case.ignored()
    if ignored:
        with pytest.raises(ManifestError, match="no effect") as refused:
            load(case.text, "x.yaml", case.assignments)
        assert {problem.key for problem in refused.value.problems} == {f"defaults.{key}" for key in ignored}
        return
    resolved = load(case.text, "x.yaml", case.assignments)
    for stage in case.said:
        tree = resolved.tree["stages"][stage]
        for key, (value, layer) in case.expected(stage).items():
            here = tree
            for part in key.split("."):
                here = here[part]
            assert here == value, key
            origin = resolved.origin(f"stages.{stage}.{key}")
            assert origin.layer == ("command line" if layer.startswith("command line") else layer), key


@pytest.mark.capability("Every resolved value remembers where it came from")
@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_leaf_has_an_origin_that_says_its_value(case):
    resolved = load(case.text, "x.yaml", case.effective())
    lines = case.text.splitlines()
    for path, value in leaves(resolved.tree):
        setting = resolved.history(path)[0]
        assert setting.value == value
        if setting.origin.file and path[-1] != "name":  # a component's name may follow from its other keys
            written = lines[setting.origin.line - 1][setting.origin.column - 1 :]
            assert YAML(typ="safe", pure=True).load(written) == value
        elif setting.origin.assignment:
            assert json.loads(setting.origin.assignment.partition("=")[2]) == value


@settings(max_examples=40, deadline=None)
@given(cases())
def test_a_resolved_tree_is_a_manifest_that_resolves_to_itself(case):
    resolved = load(case.text, "x.yaml", case.effective())
    assert load(json.dumps(resolved.tree), "tree.json").tree == resolved.tree
    assert restore(json.loads(json.dumps(resolved.tree))) == resolved.manifest


def stage_of(example: str, name: str, *overrides: str) -> dict[str, Any]:
    return load(example, "x.yaml", overrides).tree["stages"][name]


def test_defaults_reach_only_the_stages_whose_recipe_has_the_key(example):
    assert "beta" not in stage_of(example, "first")
    assert stage_of(example, "second")["beta"] == 0.5


def test_a_component_of_another_name_inherits_nothing(example):
    assert stage_of(example, "second")["optimizer"] == {"name": "sgd", "lr": 0.02, "momentum": 0.0}
    bare = example.replace("{name: sgd, lr: 0.02}", "sgd")
    assert stage_of(bare, "second")["optimizer"] == {"name": "sgd", "lr": 0.01, "momentum": 0.0}


def test_a_component_of_the_same_name_or_none_inherits(example):
    for said in ("{name: adamw, betas: [0.5, 0.9]}", "{betas: [0.5, 0.9]}"):
        optimizer = stage_of(example.replace("{name: sgd, lr: 0.02}", said), "second")["optimizer"]
        assert optimizer == {"name": "adamw", "lr": 1e-5, "weight_decay": 0.1, "betas": [0.5, 0.9]}
    assert stage_of(example.replace("{name: sgd, lr: 0.02}", "adamw"), "second")["optimizer"]["lr"] == 1e-5


def test_a_component_without_a_name_is_the_schemas_default(example):
    assert stage_of(example, "first", "first.schedule.warmup_steps=5")["schedule"] == {
        "name": "cosine",
        "warmup_steps": 5,
    }
    assert stage_of(example, "second", "second.loss={scale: 2}")["loss"] == {"name": "square", "scale": 2.0}


def test_keys_that_exclude_each_other_replace_each_other(example):
    second = stage_of(example, "second")
    assert second["model"] == {"from": "first"}
    assert second["epochs"] == 2
    assert "steps" not in second
    assert stage_of(example, "first", "first.tokenizer={bytes: true}")["tokenizer"] == {"bytes": True}
    assert stage_of(example, "second", "second.model.path=other")["model"] == {"path": "other"}


def test_a_source_of_another_kind_replaces_the_source(example):
    data = load(example, "x.yaml", ["data.chats.source.hub=someone/chats"]).tree["data"]
    assert data["chats"]["source"] == {"name": "hub", "hub": "someone/chats", "split": "train"}
    data = load(example, "x.yaml", ["data.held.source.hub=someone/other"]).tree["data"]
    assert data["held"]["source"] == {"name": "hub", "hub": "someone/other", "split": "test"}


def test_a_mixture_is_inherited_whole_or_not_at_all(example):
    both = example.replace("  beta: 0.5", "  beta: 0.5\n  data: {chats: 1.0}").replace(
        "    data: {chats: 1.0}\n", "    data: {held: 2.0}\n"
    )
    assert stage_of(both, "second")["data"] == {"held": 2.0}
    assert stage_of(both, "second", "second.data.chats=0.5")["data"] == {"held": 2.0, "chats": 0.5}
    assert stage_of(both, "second", "second.data={chats: 0.5}")["data"] == {"chats": 0.5}
    said = ["second.data={chats: 0.5}", "second.data.more=1"]
    for order in (said, said[::-1]):
        data = stage_of(both, "second", *order, "data.more={source: {path: x}, format: chat}")["data"]
        assert data == {"chats": 0.5, "more": 1.0}


def test_null_takes_back_what_the_defaults_give(example):
    given_to_all = example.replace("  beta: 0.5", "  beta: 0.5\n  evaluate: {data: {held: 1.0}}")
    assert stage_of(given_to_all, "second")["evaluate"]["data"] == {"held": 1.0}
    assert stage_of(given_to_all, "second", "second.evaluate=null")["evaluate"] is None


def test_a_stage_may_be_nothing_but_its_recipe():
    text = (
        "name: x\ndata: {a: {source: {path: x}, format: chat}}\n"
        "defaults: {model: {path: x}, data: {a: 1.0}, steps: 1, recipe: pair}\nstages:\n  one: plain\n  two:\n"
    )
    stages = load(text, "x.yaml").tree["stages"]
    assert (stages["one"]["recipe"], stages["two"]["recipe"]) == ("plain", "pair")
    assert stages["one"]["steps"] == stages["two"]["steps"] == 1


def test_the_command_line_can_set_what_is_outside_the_stages(example):
    tree = load(
        example, "x.yaml", ["seed=3", "data.chats.limit=10", "compute.pools.train.workers=1", "data.held.format=chat"]
    ).tree
    assert (tree["seed"], tree["data"]["chats"]["limit"]) == (3, 10)
    assert tree["compute"]["pools"]["train"]["workers"] == 1
    assert tree["data"]["held"]["format"] == {"name": "chat", "field": "turns"}


def test_a_key_of_the_manifest_comes_before_a_stage_of_the_same_name(example):
    text = example.replace("  first:", "  data:").replace("from: first", "from: data")
    tree = load(text, "x.yaml", ["data.chats.limit=7", "stages.data.steps=9"]).tree
    assert (tree["data"]["chats"]["limit"], tree["stages"]["data"]["steps"]) == (7, 9)


def test_what_was_overridden_is_remembered(example):
    resolved = load(example, "x.yaml", ["first.optimizer.lr=1e-4", "second.epochs=5"])
    rate = resolved.history("stages.first.optimizer.lr")
    assert [setting.value for setting in rate] == [1e-4, 1e-5]
    assert [str(setting.origin) for setting in rate] == [
        "command line 'first.optimizer.lr=1e-4'",
        "defaults at x.yaml:6:32",
    ]
    length = resolved.history("stages.second.epochs")
    assert [(setting.key, setting.value) for setting in length] == [("epochs", 5), ("epochs", 2), ("steps", 40)]
    (start, before) = resolved.history("stages.second.model.from")
    assert (start.value, before.key, before.value) == ("first", "path", "base")
    assert str(resolved.origin("stages.first.precision")) == "schema default"


def test_what_nobody_said_and_is_null_is_not_in_the_tree(example):
    tree = load(example, "x.yaml", ["first.max_grad_norm=null"]).tree
    assert tree["stages"]["first"]["max_grad_norm"] is None
    assert not [path for path, value in leaves(tree) if value is None and path[-1] != "max_grad_norm"]


def test_an_unknown_key_has_no_history(example):
    resolved = load(example, "x.yaml")
    for key in ("nothing", "stages.first.nothing", "data.chats.filters.7"):
        with pytest.raises(KeyError, match="there is no"):
            resolved.history(key)
