"""The optimiser steps of rounds: what a round gives is divided into a few, and those that are left are kept."""

from __future__ import annotations

import base64
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from postlude.data.document import Block, Document, Unit
from postlude.data.packing import best_fit
from postlude.objectives.policy import ADVANTAGE
from postlude.rollout.answers import Group
from postlude.rollout.ledger import Issue
from postlude.training.workers import Workers


@dataclass(frozen=True)
class RoundRules:
    """How rounds are made."""

    prompts: int
    """Of a round."""
    group: int
    """Samples of each prompt."""
    updates: int
    """Optimiser steps of one pass over a round, at least."""
    passes: int
    """Over a round."""
    block: int
    tokens: int
    """Of an optimiser step, about at most: a round that has more is divided into more steps."""
    steps: int | None
    """Optimiser steps of the stage; None if the ledger's epochs end it."""
    oversample: float = 1.0
    """So many times the prompts of a round are answered at a time; what is not complete when the round is goes on with
    the next."""
    ahead: int = 0
    """Rounds that are being answered while one is trained."""
    resample: bool = False
    """Whether prompts whose samples are all rewarded alike are dropped, and others issued in their place."""


@dataclass(frozen=True)
class PlannedStep:
    """What one optimiser step trains on."""

    documents: Sequence[int]
    """Which of the round's documents."""
    epoch: int
    issues: Sequence[Issue] = ()
    """The prompts that count as trained with it."""
    lines: Sequence[Mapping[str, Any]] = ()
    """What the rollouts of the stage are told with it."""
    metrics: Mapping[str, float] = field(default_factory=dict)


class StepQueue:
    """The steps of the round in progress that are left, and the documents of that round."""

    def __init__(self) -> None:
        self._steps: deque[PlannedStep] = deque()
        self._documents: Sequence[Document] = ()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[PlannedStep]:
        return iter(self._steps)

    def fill(
        self, rules: RoundRules, groups: Sequence[Group], documents: Sequence[Document], metrics: Mapping[str, float]
    ) -> None:
        """Divide a round into steps: in each pass every document once, prompts left whole. ``documents`` has one for
        each sample of the groups, in order."""
        places: dict[Issue, list[int]] = {}
        lines: dict[Issue, list[Mapping[str, Any]]] = {}
        samples = [sample for group in groups for sample in group]
        for place, (sample, document) in enumerate(zip(samples, documents, strict=True)):
            line = sample.line()
            if ADVANTAGE.name in document.streams:
                line["advantage"] = float(document.streams[ADVANTAGE.name][document.trained].mean())
            places.setdefault(sample.issue, []).append(place)
            lines.setdefault(sample.issue, []).append({**line, "outcome": "trained"})
        tokens = sum(len(document) for document in documents)
        count = max(min(rules.updates, len(places)), -(-tokens // rules.tokens)) if places else 0
        shares = [share for part in range(count) if (share := list(places)[part::count])]
        for turn in range(rules.passes):
            for issues in shares:
                self._steps.append(
                    PlannedStep(
                        documents=[place for issue in issues for place in places[issue]],
                        epoch=issues[0].epoch,
                        issues=issues if turn == 0 else (),
                        lines=[line for issue in issues for line in lines[issue]] if turn == 0 else (),
                        metrics=metrics,
                    )
                )
        self._documents = documents

    def take(self) -> tuple[PlannedStep, list[Document]]:
        """The next step, and its documents."""
        step = self._steps.popleft()
        return step, [self._documents[place] for place in step.documents]

    def state(self) -> dict[str, Any]:
        """The steps that are left, with their documents, as JSON."""
        if not self._steps:
            return {}
        numbers = sorted({place for step in self._steps for place in step.documents})
        index = {number: place for place, number in enumerate(numbers)}
        return {
            "documents": base64.b64encode(dump_documents([self._documents[number] for number in numbers])).decode(),
            "planned": [
                {
                    **vars(step),
                    "documents": [index[number] for number in step.documents],
                    "issues": [issue.number for issue in step.issues],
                }
                for step in self._steps
            ],
        }

    def load(self, state: Mapping[str, Any], issues: Mapping[int, Issue]) -> None:
        """The steps of a state, given the prompts that were open by their numbers."""
        self._documents = load_documents(base64.b64decode(state["documents"])) if "planned" in state else ()
        self._steps = deque(
            PlannedStep(**{**step, "issues": [issues[number] for number in step["issues"]]})
            for step in state.get("planned", [])
        )


def own_blocks(documents: Sequence[Document], block: int, workers: Workers) -> list[Block]:
    """This rank's share of documents packed into blocks: as many as any other's, the last empty where they do not
    divide."""
    packs = best_fit([len(document) for document in documents], block)
    packed: list[Block] = [tuple(Unit((documents[place],)) for place in pack) for pack in packs]
    share = packed[workers.data_rank :: workers.data_world]
    empty: Block = ()
    return share + [empty] * (-(-len(packed) // workers.data_world) - len(share))


def dump_documents(documents: Sequence[Document]) -> bytes:
    """Documents as bytes, all bits of their streams kept."""
    arrays: dict[str, np.ndarray] = {"lengths": np.array([len(document) for document in documents], np.int64)}
    names = sorted({name for document in documents for name in document.streams})
    arrays["tokens"] = np.concatenate([document.tokens for document in documents])
    arrays["groups"] = np.array([document.group for document in documents], np.int64)
    for name in names:
        arrays[f"stream {name}"] = np.concatenate([document.streams[name] for document in documents])
    ids = json.dumps([[document.source, document.example_id] for document in documents])
    arrays["ids"] = np.frombuffer(ids.encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def load_documents(data: bytes) -> list[Document]:
    """What :func:`dump_documents` was given."""
    with np.load(io.BytesIO(data)) as arrays:
        ends = arrays["lengths"].cumsum()[:-1]
        tokens = np.split(arrays["tokens"], ends)
        streams = {
            name.removeprefix("stream "): np.split(arrays[name], ends)
            for name in arrays.files
            if name.startswith("stream ")
        }
        ids = json.loads(arrays["ids"].tobytes())
        groups = arrays["groups"].tolist()
    return [
        Document(example_id, source, tokens[place], {n: s[place] for n, s in streams.items()}, group=groups[place])
        for place, (source, example_id) in enumerate(ids)
    ]
