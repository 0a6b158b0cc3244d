"""The published JSON Schema agrees with the loader."""

from __future__ import annotations

import pytest
from ruamel.yaml import YAML

from postlude.manifest.json_schema import schema
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError

jsonschema = pytest.importorskip("jsonschema", reason="the JSON Schema is checked by the package jsonschema")


@pytest.fixture(scope="module")
def validator(registry):
    described = schema()
    jsonschema.Draft202012Validator.check_schema(described)
    return jsonschema.Draft202012Validator(described)


def accepts(validator, text: str) -> bool:
    return validator.is_valid(YAML(typ="safe", pure=True).load(text))


@pytest.mark.capability("A JSON Schema of the manifest for completion in editors")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("{name: sgd, lr: 0.02}", "sgd"),
        ("{name: sgd, lr: 0.02}", "{lr: 0.02}"),
        ("recipe: plain", "recipe: pair"),
        ("{path: base}\n  batch", "{new: {architecture: qwen3, config: {hidden_size: 8}}}\n  batch"),
        ("limit: 1000", "train_on: [user, assistant]"),
        ("compute:\n  pools:\n    train: {workers: 2}\n", ""),
    ],
)
def test_what_loads_is_accepted(validator, example, old, new):
    text = example.replace(old, new, 1)
    load(text, "x.yaml")
    assert accepts(validator, text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed: 17", "sede: 17"),
        ("seed: 17", "seed: x"),
        ("name: demo\n", ""),
        ("block: 1024", "blok: 1024"),
        ("beta: 0.5", "bta: 0.5"),
        ("most: 30", "msot: 30"),
        ("name: length, ", ""),
        ("lr: 0.02", "lrr: 0.02"),
        ("lr: 0.02", "lr: -1"),
        ("epochs: 2", "epochs: 0"),
        ("recipe: plain", "recipe: plian"),
        ("{path: chats.jsonl}", "{pth: chats.jsonl}"),
        ("format: chat", "format: chta"),
        ("  first:", "  a.b:"),
        ("workers: 2", "wokers: 2"),
        ("reference: {path: base}", "reference: {pth: base}"),
        ("    recipe: plain\n", "    recipe: plain\n    beta: 0.3\n"),
    ],
)
def test_what_the_schema_refuses_does_not_load_either(validator, example, old, new):
    assert old in example
    text = example.replace(old, new, 1)
    assert not accepts(validator, text)
    with pytest.raises(ManifestError):
        load(text, "x.yaml")


def test_documentation_reaches_the_editor(registry):
    properties = schema()["properties"]
    assert properties["seed"]["description"] == "What every random choice of the run follows from."
    assert properties["defaults"]["anyOf"][1]["properties"]["beta"]["description"].startswith("How near")


def test_every_reference_has_its_definition_and_every_definition_its_use(registry):
    described = schema()
    used = set()

    def walk(node):
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                used.add(node["$ref"].removeprefix("#/$defs/"))
            for below in node.values():
                walk(below)
        elif isinstance(node, list):
            for below in node:
                walk(below)

    walk(described)
    assert used == set(described["$defs"])
