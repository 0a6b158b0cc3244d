"""A registry of its own for these tests, so that they hold whatever is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from postlude.manifest import component
from postlude.manifest.change import Change, from_step
from postlude.manifest.component import Component, Named, register
from postlude.manifest.compute import ProviderConfig
from postlude.manifest.schema import ModelFrom, TrainingStage


class Path(Component):
    """Files."""

    path: str
    columns: list[str] = []


class Hub(Component):
    """A data set of a hub."""

    hub: str
    split: str = "train"


class Chat(Component):
    """Conversations."""

    field: str = "messages"
    """The column that holds them."""


class Length(Component):
    """Drops what is too long."""

    most: Annotated[int, Field(gt=0)]
    """The longest that stays."""


class Adam(Component):
    """Adaptive moments."""

    changes: ClassVar[Mapping[str, Change]] = {"lr": from_step("it rises"), "weight_decay": from_step("it shrinks")}

    lr: Annotated[float, Field(gt=0)] = 1e-5
    """The peak learning rate."""
    weight_decay: float = 0.0
    betas: list[float] = [0.9, 0.999]


class Sgd(Component):
    """Plain descent."""

    lr: Annotated[float, Field(gt=0)] = 1e-2
    momentum: float = 0.0


class Cosine(Component):
    """Half a cosine."""

    warmup_steps: int = 0


class Plain(TrainingStage):
    """Trains on one data set."""

    recipe: Literal["plain"]


class Pair(TrainingStage):
    """Trains beside a reference."""

    recipe: Literal["pair"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How near to the reference it stays."""
    reference: ModelFrom | None = None
    judges: list[ModelFrom] = []
    loss: Annotated[Component, Named("objectives", default="square"), Field(validate_default=True)] = "square"  # type: ignore


class Square(Component):
    """The square of it."""

    scale: float = 1.0


class Local(ProviderConfig):
    """This machine."""


@pytest.fixture(scope="module", autouse=True)
def registry() -> Iterator[None]:
    """Only the components above are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component, "_registered", {})
        patch.setattr(component, "_entry_points", lambda kind: {})
        for kind, name, one in (
            ("sources", "path", Path),
            ("sources", "hub", Hub),
            ("formats", "chat", Chat),
            ("filters", "length", Length),
            ("optimizers", "adamw", Adam),
            ("optimizers", "sgd", Sgd),
            ("schedules", "cosine", Cosine),
            ("objectives", "square", Square),
            ("providers", "local", Local),
            ("recipes", "plain", Plain),
            ("recipes", "pair", Pair),
        ):
            register(kind, name)(one)
        yield


MANIFEST = """\
name: demo
seed: 17
defaults:
  model: {path: base}
  batch: {tokens: 4096, block: 1024}
  optimizer: {name: adamw, lr: 1.0e-5, weight_decay: 0.1}
  checkpoint: {every: 100}
  steps: 40
  beta: 0.5
data:
  chats:
    source: {path: chats.jsonl}
    format: chat
    filters: ["len(messages) >= 2", {name: length, most: 30}]
    limit: 1000
  held:
    source: {hub: someone/held, split: test}
    format: {name: chat, field: turns}
compute:
  pools:
    train: {workers: 2}
stages:
  first:
    recipe: plain
    data: {chats: 1}
    tokenizer: {train: {vocabulary: 300}}
    evaluate: {data: {held: 1.0}, every: 10}
  second:
    recipe: pair
    model: {from: first}
    data: {chats: 1.0}
    epochs: 2
    optimizer: {name: sgd, lr: 0.02}
    reference: {path: base}
"""


@pytest.fixture(scope="session")
def example() -> str:
    """A manifest with two stages that uses most of what there is."""
    return MANIFEST
