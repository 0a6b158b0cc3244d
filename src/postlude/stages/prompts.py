"""Prompts of several data sets, portion by portion, and completions of them with their rewards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from postlude.data.dataset import BAD_RECORD, Dataset
from postlude.data.document import WEIGHT, Document
from postlude.errors import DataError
from postlude.manifest.schema import ModelPlace
from postlude.rollout.engine import Completion, Request, Sampling
from postlude.rollout.native import NativeEngine
from postlude.rollout.prompts import NoPrompt, Prompt, PromptEncoder, prompt_of
from postlude.rollout.reward import Reward
from postlude.rollout.scoring import Score, Scorer
from postlude.stages.models import stop_ids_of
from postlude.stages.workbench import Workbench


@dataclass(frozen=True)
class Left:
    """An example without a prompt that can be used, and why."""

    example_id: str
    source: str
    reason: str


class PromptSource:
    """The prompts of data sets, whose rows are cut into portions of ``rows``."""

    def __init__(self, bench: Workbench, datasets: Mapping[str, Dataset], rows: int) -> None:
        self._bench, self._datasets, self._rows = bench, datasets, max(rows, 1)
        self._index = [(name, *row) for name, dataset in datasets.items() for row in bench.rows(dataset)]

    @property
    def portions(self) -> int:
        return -(-len(self._index) // self._rows)

    def portion(self, number: int) -> list[Prompt | Left]:
        """The prompts of a portion, in order; for an example that has none, why."""
        rows = self._index[number * self._rows : (number + 1) * self._rows]
        found: list[Prompt | Left] = []
        read = self._bench.records(self._datasets, rows)
        for (name, group, position), (_, record, examples) in zip(rows, read, strict=True):
            found += [_prompt(example, example_id, name, record) for example_id, example in examples]
            if not examples:
                found.append(Left(f"{name}, group {group}, row {position}", name, BAD_RECORD))
        return found

    def __iter__(self) -> Iterator[Prompt | Left]:
        for portion in range(self.portions):
            yield from self.portion(portion)


def _prompt(example: Any, example_id: str, source: str, record: Mapping[str, Any]) -> Prompt | Left:
    try:
        return prompt_of(example, example_id, source, record)
    except NoPrompt as error:
        return Left(example_id, source, str(error))


class Asking:
    """A model that answers prompts, with the reward of what it answers. The model is loaded when it is first asked."""

    def __init__(
        self,
        bench: Workbench,
        model: ModelPlace,
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        batch: int,
        rewards: Sequence[Reward],
    ) -> None:
        self.stage = bench.task.stage
        self._bench, self._model = bench, model
        self._samples, self._batch = samples, batch
        self._max_tokens, self._temperature, self._top_p, self._seed = max_tokens, temperature, top_p, seed
        self.scorer = Scorer(rewards, bench.judge)
        self._encoders: dict[str, PromptEncoder] = {}

    @cached_property
    def _engine(self) -> NativeEngine:
        return self._bench.engine(self._model, self._batch)

    def encoder(self, dataset: str) -> PromptEncoder:
        if dataset not in self._encoders:
            self._encoders[dataset] = self._bench.prompt_encoder(self._model, dataset)
        return self._encoders[dataset]

    def document(self, prompt: Prompt | Left) -> Document | Left:
        """The prompt as a document in which nothing is trained, or why it cannot be put to the model."""
        if isinstance(prompt, Left):
            return prompt
        ids = self._tokens(prompt)
        if isinstance(ids, Left):
            return ids
        tokens = np.array(ids, dtype=np.int64)
        return Document(prompt.example_id, prompt.source, tokens, {WEIGHT.name: np.zeros(len(tokens), np.float32)})

    def _tokens(self, prompt: Prompt) -> tuple[int, ...] | Left:
        """The prompt's token ids, or why there are none. DataError where its template refuses it."""
        try:
            tokens = self.encoder(prompt.source).tokens(prompt)
        except DataError as error:
            if self._bench.manifest.data[prompt.source].on_bad_record == "skip":
                return Left(prompt.example_id, prompt.source, "cannot be rendered")
            raise DataError(
                f"The prompt '{prompt.example_id}' cannot be put to the model: {error} To leave such records out and "
                f"count them, set data.{prompt.source}.on_bad_record to skip."
            ) from error
        return tokens or Left(prompt.example_id, prompt.source, "the prompt is empty")

    def answer(
        self, prompts: Iterable[Prompt | Left]
    ) -> tuple[list[tuple[Prompt, list[tuple[Completion, str, Score]]]], list[Left]]:
        """Each prompt with its completions, their texts and scores; and the examples that nothing was made for."""
        usable: list[tuple[Prompt, tuple[int, ...]]] = []
        left: list[Left] = []
        for prompt in prompts:
            if isinstance(prompt, Left):
                left.append(prompt)
                continue
            tokens = self._tokens(prompt)
            context = self._engine.context
            if isinstance(tokens, Left):
                left.append(tokens)
            elif context is not None and len(tokens) >= context:
                left.append(Left(prompt.example_id, prompt.source, f"longer than the model's {context} positions"))
            else:
                usable.append((prompt, tokens))
        completions = self._complete(usable)
        texts = [
            (prompt, self.encoder(prompt.source).text(completion.tokens))
            for (prompt, _), row in zip(usable, completions, strict=True)
            for completion in row
        ]
        scores = iter(self.scorer.score(texts))
        said = iter(texts)
        return [
            (prompt, [(completion, next(said)[1], next(scores)) for completion in row])
            for (prompt, _), row in zip(usable, completions, strict=True)
        ], left

    def _complete(self, usable: Sequence[tuple[Prompt, tuple[int, ...]]]) -> list[list[Completion]]:
        by_source: dict[str, list[int]] = {}
        for place, (prompt, _) in enumerate(usable):
            by_source.setdefault(prompt.source, []).append(place)
        found: dict[int, list[Completion]] = {}
        for source, places in by_source.items():
            sampling = Sampling(
                max_tokens=self._max_tokens,
                stop_ids=stop_ids_of(self._engine.causal, self.encoder(source)),
                temperature=self._temperature,
                top_p=self._top_p,
                seed=self._seed,
            )
            requests = [
                Request(usable[place][0].example_id, usable[place][1], sample)
                for place in places
                for sample in range(self._samples)
            ]
            made = iter(self._engine.generate(requests, sampling))
            found |= {place: list(islice(made, self._samples)) for place in places}
        return [found[place] for place in range(len(usable))]


def said(prompt: Prompt, completion: str) -> dict[str, Any]:
    """A prompt and a completion as the columns of a record, which the formats ``messages`` and ``prompt_completion``
    read."""
    if isinstance(prompt.asked, str):
        return {"prompt": prompt.asked, "completion": completion}
    answer = [{"role": "assistant", "content": completion}]
    columns: dict[str, Any] = {"messages": [*prompt.asked, *answer], "prompt": list(prompt.asked), "completion": answer}
    return columns if prompt.tools is None else {**columns, "tools": list(prompt.tools)}


def nothing_asked(stage: str, left: Mapping[str, Any]) -> DataError:
    """The error of a stage whose data ask nothing."""
    reasons = ", ".join(f"{one['count']} because {reason}" for reason, one in left.items())
    return DataError(
        f"The data of the stage '{stage}' hold no prompt: {reasons or 'there is no example'}. A prompt is a "
        "conversation up to the assistant's last turn, or the prompt of a completion."
    )


def dropped_by_filters(datasets: Mapping[str, Dataset]) -> dict[str, dict[str, int]]:
    """How many records the filters of each data set left out, by reason."""
    return {
        name: {reason: dropped.count for reason, dropped in dataset.dropped.items() if reason != BAD_RECORD}
        for name, dataset in datasets.items()
        if dataset.dropped
    }


def count_left(counts: dict[str, Any], reason: str, example_id: str) -> None:
    """Count an example that nothing came of, by reason, with the ids of the first five."""
    one = counts.setdefault(reason, {"count": 0, "examples": []})
    one["count"] += 1
    if len(one["examples"]) < 5:
        one["examples"].append(example_id)
