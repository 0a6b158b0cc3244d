"""What is wrong with a manifest is told all at once, each thing with its place, key and nearest known name."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from ruamel.yaml import YAML

from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError


def refused(text: str | bytes, *overrides: str) -> list[str]:
    """The problems, without the file's name."""
    with pytest.raises(ManifestError) as error:
        load(text, "x.yaml", overrides)
    assert error.value.exit_code == 2
    assert all(str(problem) in str(error.value) for problem in error.value.problems)
    return [str(problem).removeprefix("x.yaml:") for problem in error.value.problems]


def changed(example: str, old: str, new: str) -> str:
    assert example.count(old) == 1, old
    return example.replace(old, new)


@pytest.mark.capability("Unknown, unused and mistyped manifest keys are errors with place and nearest name")
@pytest.mark.parametrize(
    ("old", "new", "place", "problem"),
    [
        ("seed: 17", "sede: 17", "sede", "sede: unknown key. Did you mean 'seed'?"),
        ("defaults:", "default:", "default", "default: unknown key. Did you mean 'defaults'?"),
        ("block: 1024", "blok: 1024", "blok", "defaults.batch.blok: unknown key. Did you mean 'block'?"),
        ("weight_decay: 0.1", "dcy: 1", "dcy", "defaults.optimizer.dcy: unknown key. Known: betas, lr, name, weight_"),
        ("  beta: 0.5", "  bta: 0.5", "bta", "defaults.bta: no stage has this key. Did you mean 'beta'?"),
        ("most: 30", "msot: 30", "msot", "data.chats.filters.1.msot: unknown key. Did you mean 'most'?"),
        ("most: 30", "least: 30", "{name: length", "data.chats.filters.1.most: this key is missing"),
        ("limit: 1000", "limits: 1000", "limits", "data.chats.limits: unknown key. Did you mean 'limit'?"),
        ("field: turns", "feild: turns", "feild", "data.held.format.feild: unknown key. Did you mean 'field'?"),
        ("workers: 2", "wokers: 2", "wokers", "compute.pools.train.wokers: unknown key. Did you mean 'workers'?"),
        ("epochs: 2", "epoch: 2", "epoch", "stages.second.epoch: unknown key. Did you mean 'epochs'?"),
        ("lr: 0.02", "lrr: 0.02", "lrr", "stages.second.optimizer.lrr: unknown key. Did you mean 'lr'?"),
        ("name: adamw", "name: adam", "name: adam", "defaults.optimizer.name: 'adam' is not among the optimizers. Did"),
        ("recipe: plain", "recipe: plian", "recipe: plian", "stages.first.recipe: 'plian' is not among the recipes. D"),
        (
            "    recipe: plain\n",
            "",
            "first:",
            "stages.first: which of the recipes? Give its name as 'recipe'. Known: p",
        ),
        ("{path: chats.jsonl}", "{pth: x}", "source: {pth", "data.chats.source: which of the sources? Give its name"),
        (
            "format: chat",
            "format: 3",
            "format: 3",
            "data.chats.format: must be a name or a mapping with the key 'name'",
        ),
        ("seed: 17", "seed: many", "seed", "seed: must be a whole number, found 'many'"),
        ("seed: 17", "seed: 1.0", "seed", "seed: must be a whole number, found 1.0"),
        ("name: demo", "name: a/b", "name", "name: must match pattern"),
        ("tokens: 4096", "tokens: 4095", "batch", "defaults.batch: tokens (4095) must be a multiple of block (1024)"),
        ("tokens: 4096", "tokens: -1", "tokens", "defaults.batch.tokens: must be greater than 0, found -1"),
        ("tokens: 4096", "tokens: yes", "tokens", "defaults.batch.tokens: must be a whole number, found 'yes'"),
        ("lr: 1.0e-5", "lr: .inf", "lr: .inf", "defaults.optimizer.lr: must be a finite number, found inf"),
        ("{every: 100}", "often", "checkpoint", "defaults.checkpoint: must be a mapping, found 'often'"),
        (
            "limit: 1000",
            "train_on: al",
            "train_on",
            "data.chats.train_on: must be 'assistant', 'last' or 'all', found 'al'",
        ),
        (
            "limit: 1000",
            "train_on: 3",
            "train_on",
            "data.chats.train_on: must be 'assistant', 'last' or 'all', or a li",
        ),
        (
            '"len(messages) >= 2"',
            "7",
            "7, {",
            "data.chats.filters.0: must be text, or a name or a mapping with the key",
        ),
        ("data: {chats: 1}", "data: {}", "data: {}", "stages.first.data: must not be empty"),
        ("data: {chats: 1}", "data: {chats: 0}", "chats: 0", "stages.first.data.chats: must be greater than 0, found"),
        ("    data: {chats: 1}\n", "", "first:", "stages.first.data: this key is missing"),
        (
            "model: {from: first}",
            "model: {from: first, path: x}",
            "model: {from",
            "stages.second.model: exactly one of",
        ),
        ("  steps: 40\n", "", "first:", "stages.first: exactly one of 'steps' and 'epochs' is needed, found none"),
        ("epochs: 2", "epochs: 2\n    steps: 3", "second", "stages.second: exactly one of 'steps' and 'epochs' is nee"),
        (
            "{path: base}\n  batch",
            "{}\n  batch",
            "model: {}",
            "defaults.model: exactly one of 'path', 'from' and 'new'",
        ),
        ("  first:", "  a.b:", "a.b", "stages.a.b: must match pattern"),
        ("  held:\n", "  he/ld:\n", "he/ld", "data.he/ld: must match pattern"),
        (
            "data: {chats: 1}",
            "data: {chat: 1}",
            "chat: 1",
            "stages.first.data.chat: there is no data set 'chat'. Did y",
        ),
        (
            "held: 1.0",
            "hold: 1.0",
            "hold: 1",
            "stages.first.evaluate.data.hold: there is no data set 'hold'. Did you m",
        ),
        ("  held:\n", "  hold:\n", "hold:", "data.hold: no stage uses this data set"),
        ("    train:", "    trian:", "trian", "compute.pools.trian: no stage runs on this pool. Did you mean 'train'?"),
        (
            "from: first",
            "from: frist",
            "from: frist",
            "stages.second.model.from: there is no stage 'frist'. Did you mea",
        ),
        ("from: first", "from: second", "from: second", "stages.second.model.from: a stage cannot start from itself"),
        (
            "reference: {path: base}",
            "reference: {from: no}",
            "from: no",
            "stages.second.reference.from: there is no st",
        ),
        (
            "reference: {path: base}",
            "judges: [{path: a}, {from: no}]",
            "from: no",
            "stages.second.judges.1.from: there",
        ),
        (
            "model: {path: base}",
            "model: {from: second}",
            "from: second",
            "defaults.model.from: the stages wait for each",
        ),
        ("stages:\n", "stages: 3\nx:\n", "stages: 3", "stages: must be a mapping, found 3"),
        ("  first:\n", "  first: []\n  third:\n", "first:", "stages.first: must be a name or a mapping with the key '"),
        ("defaults:\n", "defaults: []\nx:\n", "defaults:", "defaults: must be a mapping of keys that stages inherit"),
        ("seed: 17", "plugins: [no.such]", "no.such", "plugins.0: the plugin 'no.such' cannot be imported; it must"),
    ],
)
def test_a_mistake_is_told_where_it_is(example, old, new, place, problem):
    text = changed(example, old, new)
    before = text[: text.index(place)]
    expected = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}: {problem}"
    found = refused(text)
    assert any(line.startswith(expected) for line in found), "\n".join([expected, *found])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("first.stesp=3", "stages.first.stesp: unknown key. Did you mean 'steps'?"),
        ("frist.steps=3", "frist: unknown key. Did you mean 'first'?"),
        ("sed=3", "sed: unknown key. Did you mean 'seed'?"),
        ("defaults.bta=3", "defaults.bta: no stage has this key. Did you mean 'beta'?"),
        ("defaults.epochs=3", "defaults.epochs: no effect: the stages set this key themselves"),
        ("data.chat.limit=3", "data.chat.source: this key is missing"),
        ("steps", "an assignment is KEY=VALUE"),
        ("=3", "an assignment is KEY=VALUE"),
        ("first..steps=3", "an assignment is KEY=VALUE"),
        ("seed=[", "seed: not YAML"),
        ("seed=x", "seed: must be a whole number, found 'x'"),
        ("first.tokenizer.bytes=maybe", "stages.first.tokenizer.bytes: must be True, found 'maybe'"),
    ],
)
def test_a_wrong_assignment_is_told_as_it_was_typed(example, override, problem):
    if override == "defaults.epochs=3":
        example = changed(example, "    tokenizer:", "    steps: 4\n    tokenizer:")
    assert any(line.startswith(f"command line '{override}': {problem}") for line in refused(example, override))


def test_a_key_given_twice_on_the_command_line_is_refused(example):
    (problem,) = refused(example, "first.steps=3", "stages.first.steps=4")
    assert problem.startswith("command line 'stages.first.steps=4': stages.first.steps: this key is given twice")
    (problem,) = refused(example, "first.batch={tokens: 1024}", "first.batch.tokens=2048")
    assert "stages.first.batch.tokens: this key is given twice" in problem


def test_every_problem_is_told_at_once_in_the_order_of_the_file(example):
    text = example.replace("seed: 17", "sede: 17").replace("beta: 0.5", "bta: 0.5").replace("from: first", "from: x")
    text = text.replace("limit: 1000", "limit: none").replace("  held:\n", "  hold:\n")
    found = refused(text, "second.epoch=3")
    assert [line.split(": ")[1] for line in found] == [
        "sede",
        "defaults.bta",
        "data.chats.limit",
        "data.hold",
        "stages.first.evaluate.data.held",
        "stages.second.model.from",
        "stages.second.epoch",
    ]


def test_what_stages_inherit_is_told_once(example):
    (problem,) = refused(changed(example, "tokens: 4096", "tokens: 0"))
    assert "defaults.batch.tokens" in problem


def test_separate_circles_are_each_told(example):
    text = example + "  third: {recipe: pair, data: {chats: 1.0}, model: {from: fourth}}\n"
    text += "  fourth: {recipe: pair, data: {chats: 1.0}, reference: {from: third}}\n"
    found = [line for line in refused(text.replace("model: {path: base}", "model: {from: second}")) if "wait" in line]
    assert [set(line.partition("each other: ")[2].split(" -> ")) for line in found] == [
        {"first", "second"},
        {"third", "fourth"},
    ]


def test_nothing_is_called_unused_while_a_recipe_is_not_known(example):
    (problem,) = refused(changed(example, "recipe: plain", "recipe: plian"))
    assert "stages.first.recipe" in problem
    (problem,) = refused(changed(example, "recipe: pair", "recipe: pari"))
    assert "stages.second.recipe" in problem


def test_what_an_assignment_adds_to_keeps_its_place_in_the_file(example):
    found = refused(changed(example, "  held:\n", "  hold:\n"), "data.hold.limit=3")
    assert any(line.startswith("16:3: data.hold: no stage uses") for line in found), found


# --- every key of a whole manifest, one at a time -----------------------------------------------------------


def _document() -> dict[str, Any]:
    return {
        "name": "whole",
        "seed": 1,
        "defaults": {"batch": {"tokens": 2048, "block": 1024, "window": 4}, "schedule": {"name": "cosine"}},
        "data": {
            "a": {
                "source": {"path": "x", "columns": ["b"]},
                "format": {"name": "chat", "field": "m"},
                "filters": ["x > 1", {"name": "length", "most": 3}],
                "train_on": ["user"],
            }
        },
        "compute": {"provider": "local", "pools": {"train": {"workers": 1, "gpus_per_worker": 0}}},
        "stages": {
            "s": {
                "recipe": "pair",
                "model": {"new": {"architecture": "qwen3", "config": {"hidden_size": 8}}},
                "tokenizer": {"train": {"kind": "bpe", "vocabulary": 300}},
                "data": {"a": 1.0},
                "steps": 3,
                "optimizer": {"name": "adamw", "lr": 0.1, "betas": [0.9, 0.95]},
                "checkpoint": {"every": 2, "keep": 1, "on_full_disk": "stop"},
                "evaluate": {"data": {"a": 1.0}, "every": 2},
                "judges": [{"path": "x"}],
                "precision": "fp32",
                "compile": False,
                "beta": 0.1,
            }
        },
    }


def _places(tree: Any, path: tuple = ()):
    yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*path, key))


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _written(tree: Any) -> str:
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(tree, text)
    return text.getvalue()


_OPEN = {("data",), ("stages",), ("compute", "pools"), ("stages", "s", "model", "new", "config")}
_MAPPINGS = [path for path, value in _places(_document()) if isinstance(value, dict)]
_FREE = ("stages", "s", "model", "new", "config")
_VALUES = [path for path, _ in _places(_document()) if path and path[: len(_FREE)] != _FREE]


def test_the_whole_document_is_right():
    load(_written(_document()), "x.yaml")


@pytest.mark.parametrize("path", [path for path in _MAPPINGS if path not in _OPEN], ids=_dotted)
def test_a_key_that_nobody_knows_is_refused_wherever_it_stands(path):
    document = _document()
    here: Any = document
    for part in path:
        here = here[part]
    here["zzz"] = 1
    mixture = path[-1:] == ("data",)
    keys = {problem.split(": ")[1] for problem in refused(_written(document))}
    assert _dotted((*path, "zzz")) in keys
    assert len(keys) == 1 or mixture


@pytest.mark.parametrize("path", _VALUES, ids=_dotted)
def test_a_value_of_a_wrong_type_is_refused_wherever_it_stands(path):
    document = copy.deepcopy(_document())
    here: Any = document
    for part in path[:-1]:
        here = here[part]
    here[path[-1]] = {"zzz": [1]} if not isinstance(here[path[-1]], dict) else [1]
    assert any(problem.split(": ")[1].startswith(_dotted(path)) for problem in refused(_written(document)))
