"""What ``explain`` tells of a key."""

from __future__ import annotations

import pytest

from postlude.manifest.explain import explain
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError


@pytest.mark.capability("explain tells a value, where it came from, what it overrode and what the key means")
def test_a_key_is_told_with_its_history_and_its_documentation(example):
    resolved = load(example, "x.yaml", ["first.optimizer.lr=1e-4"])
    assert str(explain(resolved, "first.optimizer.lr")).splitlines() == [
        "stages.first.optimizer.lr: 0.0001",
        "  from      command line 'first.optimizer.lr=1e-4'",
        "  overrode  1e-05 (defaults at x.yaml:6:32)",
        "  default   1e-05",
        "",
        "The peak learning rate.",
        "",
        "It may be amended while the stage runs, from the next step on: it rises.",
    ]
    assert explain(resolved, "stages.first.optimizer.lr") == explain(resolved, "first.optimizer.lr")


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("seed", ["seed: 17", "manifest at x.yaml:2:7", "What every random choice of the run follows from."]),
        ("second.model.from", ["first", "stage at x.yaml:", "overrode  path: base (defaults at x.yaml:4:17)"]),
        ("second.epochs", ["overrode  steps: 40 (defaults at x.yaml:8:10)"]),
        ("second.optimizer.name", ["sgd", "overrode  adamw", "choices   adamw, sgd", "Plain descent."]),
        ("first.precision", ["auto", "schema default", "choices  auto, fp32, bf16, fp16", "master weights"]),
        ("first.max_grad_norm", ["1.0", "schema default", "null for no limit"]),
        ("second.evaluate", ["null", "schema default", "Loss on held-out data"]),
        ("second.evaluate.every", ["null", "Optimiser steps between evaluations"]),
        ("first.evaluate.limit", ["null", "schema default"]),
        ("first.schedule.name", ["cosine", "schema default", "choices  cosine"]),
        ("data.chats.filters.1.most", ["30", "manifest at x.yaml:14:", "The longest that stays.", "required"]),
        ("data.chats.source.name", ["path", "manifest at x.yaml:12:", "choices  hub, path", "Files."]),
        ("first.optimizer", ["name: adamw", "lr: 1e-05", "betas: [0.9, 0.999]", "Adaptive moments."]),
        ("second", ["model.from: first", "optimizer.momentum: 0.0", "Trains beside a reference."]),
        ("data", ["chats.limit: 1000", "held.source.split: test", "The data sets by name."]),
        ("second.judges", ["[]", "schema default"]),
    ],
)
def test_other_kinds_of_keys(example, key, parts):
    text = str(explain(load(example, "x.yaml"), key))
    assert [part for part in parts if part not in text] == [], text


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("frist.steps", "x.yaml has no key 'frist'. Did you mean 'first'?"),
        ("first.stpes", "x.yaml has no key 'stpes' in 'stages.first'. Did you mean 'steps'?"),
        ("first.optimizer.lrr", "x.yaml has no key 'lrr' in 'stages.first.optimizer'. Did you mean 'lr'?"),
        ("seed.more", "x.yaml has no key 'more' in 'seed'."),
        ("data.chats.filters.7", "x.yaml has no key '7' in 'data.chats.filters'."),
        ("defaults.batch", "Ask for the key of a stage, such as first.batch."),
    ],
)
def test_a_key_that_is_not_there_is_refused_with_the_nearest(example, key, what):
    with pytest.raises(ManifestError) as refused:
        explain(load(example, "x.yaml"), key)
    assert str(refused.value).endswith(what)


def test_every_key_of_the_schema_is_documented():
    """Fields of our own; a component's first key is described by the component."""
    from postlude.manifest.compute import Compute, Pool
    from postlude.manifest.schema import (
        Batch,
        Checkpoint,
        DatasetConfig,
        Evaluate,
        Manifest,
        ModelFrom,
        NewModel,
        TokenizerFrom,
        TrainingStage,
        TrainTokenizer,
    )

    configs = (Batch, Checkpoint, Compute, DatasetConfig, Evaluate, Manifest, ModelFrom, NewModel, Pool)
    for config in (*configs, TokenizerFrom, TrainingStage, TrainTokenizer):
        undocumented = [name for name, field in config.model_fields.items() if not field.description]
        assert undocumented == [], config
