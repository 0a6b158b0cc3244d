"""The prompts of a stage's data sets: reading them, counting them, and showing them, whoever asks them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from postlude.data import preview as packed
from postlude.data.dataset import BAD_RECORD, Dataset
from postlude.data.document import WEIGHT, Document, Unit
from postlude.data.example import Example, Record
from postlude.data.loader import StepBlocks
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.rollout.environment import Environment
from postlude.rollout.prompts import NoPrompt, NotAsked, Prompt, PromptEncoders, prompt_of
from postlude.stages.parts import Parts
from postlude.stages.report import StageReport

Row = tuple[str, int, int]
"""Data set, group and position of a record."""
SHOWN = 8
"""Prompts that stand for a block in a preview."""
_READ_ROWS = 256


class PromptReader:
    """Reads the prompts in records of data sets; with an environment, prompts tell of its tools too."""

    def __init__(self, datasets: Mapping[str, Dataset], environment: Environment | None = None) -> None:
        self.datasets = datasets
        self._tools: list[dict[str, Any]] | None = None
        if environment is not None:
            environment.check()
            self._tools = environment.tools()

    def read(self, rows: Sequence[Row]) -> list[list[Prompt | NotAsked]]:
        """The prompts in each record, or why an example of it has none; nothing of a bad record that is skipped."""
        places: dict[tuple[str, int], list[int]] = {}
        for place, (name, group, _) in enumerate(rows):
            places.setdefault((name, group), []).append(place)
        prompts: dict[int, list[Prompt | NotAsked]] = {}
        for (name, group), own in places.items():
            records = self.datasets[name].read(group, [rows[place][2] for place in own])
            for place, (record, examples) in zip(own, records, strict=True):
                prompts[place] = [self._prompt(example, example_id, name, record) for example_id, example in examples]
        return [prompts[place] for place in range(len(rows))]

    def read_all(self, rows: Iterable[Row]) -> Iterator[Prompt | NotAsked]:
        """Every prompt in records, in order; for a bad record, that it is one."""
        remaining = iter(rows)
        while chunk := list(islice(remaining, _READ_ROWS)):
            for (name, group, position), prompts in zip(chunk, self.read(chunk), strict=True):
                yield from prompts or [NotAsked(f"{name}, group {group}, row {position}", name, BAD_RECORD)]

    def _prompt(self, example: Example, example_id: str, source: str, record: Record) -> Prompt | NotAsked:
        try:
            prompt = prompt_of(example, example_id, source, record)
        except NoPrompt as error:
            return NotAsked(example_id, source, str(error))
        return prompt if self._tools is None else replace(prompt, tools=[*(prompt.tools or ()), *self._tools])


def rows_of(datasets: Mapping[str, Dataset]) -> Iterator[Row]:
    """Every record of data sets, in the order they stand there."""
    for name, dataset in datasets.items():
        for group, count in enumerate(dataset.groups):
            yield from ((name, group, position) for position in range(count))


def encoders_of(parts: Parts, tokenizer: Any, datasets: Iterable[str]) -> PromptEncoders:
    """How the prompts of a stage's data sets are put to a model with this tokenizer."""
    configs = {name: parts.manifest.data[name] for name in datasets}
    return PromptEncoders(
        tokenizer,
        {name: config.template for name, config in configs.items()},
        {name for name, config in configs.items() if config.on_bad_record == "skip"},
        parts.today,
    )


def count_prompts(
    stage: str, prompts: Iterable[Prompt | NotAsked], encoders: PromptEncoders, longest: int | None = None
) -> dict[str, Any]:
    """How many prompts there are, how long, how many examples have none that can be asked, and of how many a template
    leaves something out (``unprinted``, by data set). DataError for data that ask nothing."""
    reasons: dict[str, Any] = {}
    unprinted: dict[str, dict[str, Any]] = {}
    lengths: list[int] = []
    for prompt, tokens, kinds in encoders.look_at(prompts, longest):
        if isinstance(tokens, NotAsked):
            count_example(reasons, tokens.reason, tokens.example_id)
        else:
            lengths.append(len(tokens))
            for kind in sorted(kinds):
                count_example(unprinted.setdefault(prompt.source, {}), kind, prompt.example_id)
    if not lengths:
        raise nothing_asked(stage, reasons)
    return {
        "prompts": len(lengths),
        "prompt_tokens": {"least": min(lengths), "mean": sum(lengths) / len(lengths), "most": max(lengths)},
        "nothing_of": reasons,
        **({"unprinted": unprinted} if unprinted else {}),
    }


def tell_unprinted(report: StageReport, parts: Parts, counts: Mapping[str, Any]) -> None:
    """Tell of what :func:`count_prompts` found that templates leave out."""
    for name, kinds in counts.get("unprinted", {}).items():
        numbers = {kind: counted["count"] for kind, counted in kinds.items()}
        report.leave_out(name, numbers, parts.manifest.data[name].drop_unprinted)


def preview_prompts(
    prompts: Iterable[Prompt | NotAsked], encoders: PromptEncoders, blocks: int, example: str | None = None
) -> packed.Preview:
    """Prompts as documents in which nothing is trained, :data:`SHOWN` for each block, or those of one example."""
    wanted = (prompt for prompt in prompts if example in (None, prompt.example_id))
    documents = list(islice(_documents(wanted, encoders), blocks * SHOWN))
    steps = []
    for first in range(0, len(documents), SHOWN):
        shown = documents[first : first + SHOWN]
        block = tuple(Unit((document,)) for document in shown)
        steps.append(StepBlocks([block], 0, 0.0, len(shown), sum(map(len, shown))))
    return packed.preview(steps, encoders.tokenizer, blocks)


def _documents(prompts: Iterable[Prompt | NotAsked], encoders: PromptEncoders) -> Iterator[Document]:
    for prompt in prompts:
        tokens = prompt if isinstance(prompt, NotAsked) else encoders.tokens(prompt)
        if isinstance(prompt, Prompt) and not isinstance(tokens, NotAsked):
            streams = {WEIGHT.name: np.zeros(len(tokens), np.float32)}
            yield Document(prompt.example_id, prompt.source, np.array(tokens, np.int64), streams)


def no_preview(parts: Parts) -> ManifestError:
    """The error of a stage that has nothing to be seen."""
    return ManifestError(
        f"stages.{parts.task.stage}: the recipe '{parts.config.recipe}' puts no prompts to a model, so there is "
        "nothing to preview. Name another stage with --stage."
    )


def nothing_asked(stage: str, reasons: Mapping[str, Any]) -> DataError:
    """The error of a stage whose data ask nothing."""
    return DataError(
        f"The data of the stage '{stage}' hold no prompt that can be asked: "
        f"{list_reasons(reasons) or 'there is no example'}. A prompt is a conversation up to the assistant's last "
        "turn, or the prompt of a completion."
    )


def list_reasons(reasons: Mapping[str, Any]) -> str:
    """What :func:`count_example` counted, as a text."""
    return ", ".join(f"{counted['count']} because {reason}" for reason, counted in reasons.items())


def count_example(reasons: dict[str, Any], reason: str, example_id: str) -> None:
    """Count an example that nothing came of, by reason, with the ids of the first five."""
    counted = reasons.setdefault(reason, {"count": 0, "examples": []})
    counted["count"] += 1
    if len(counted["examples"]) < 5:
        counted["examples"].append(example_id)


def dropped_by_filters(datasets: Mapping[str, Dataset]) -> dict[str, dict[str, int]]:
    """How many records the filters of each data set left out, by reason."""
    return {name: dataset.dropped_by_filters for name, dataset in datasets.items() if dataset.dropped_by_filters}
