"""The work of the recipe ``generate``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from postlude import storage
from postlude.data.document import Document
from postlude.data.records import record_json
from postlude.data.sources.stage import RECORDS
from postlude.errors import DataError
from postlude.recipes.generate import Generate, KeepSome
from postlude.rollout.engine import Completion
from postlude.rollout.prompts import Prompt
from postlude.rollout.reward import REFERENCE
from postlude.rollout.scoring import Score
from postlude.stages.models import ASKING
from postlude.stages.prompts import (
    Asking,
    Left,
    PromptSource,
    count_left,
    dropped_by_filters,
    nothing_asked,
    said,
)
from postlude.stages.work import Entry, Work

if TYPE_CHECKING:
    from rich.console import RenderableType

    from postlude.stages.workbench import Workbench

Answered = tuple[Completion, str, Score]

SAME_REWARD = "all completions have the same reward"
SAME_TEXT = "the best completion says the same as the worst"
NOT_ABOVE = "no completion has a reward above the threshold"


class Generation(Work):
    """Prompts are answered portion by portion: a portion is what a batch of completions is made for."""

    def __init__(self, config: Generate, bench: Workbench) -> None:
        self.config, self.bench = config, bench
        datasets = {name: bench.dataset_of(name, ASKING) for name in config.data}
        self.reads = {name: dataset.fingerprint for name, dataset in datasets.items()}
        self._filtered = dropped_by_filters(datasets)
        self.source = PromptSource(bench, datasets, config.concurrency // config.samples)
        self.portions = self.source.portions
        self.asking = Asking(
            bench,
            config.model,
            samples=config.samples,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=bench.seed if config.seed is None else config.seed,
            batch=config.concurrency,
            rewards=config.reward,
        )

    def do(self, portion: int) -> list[Entry]:
        answered, left = self.asking.answer(self.source.portion(portion))
        entries: list[Entry] = [{"left": one.reason, "id": one.example_id} for one in left]
        for prompt, completions in answered:
            kept, reason = self._kept(completions)
            records = self._records(prompt, completions, kept)
            entries.append(
                {
                    "id": prompt.example_id,
                    "rewards": [score.total for _, _, score in completions],
                    "parts": [dict(score.parts) for _, _, score in completions],
                    "tokens": [len(completion.tokens) for completion, _, _ in completions],
                    "ended": [completion.ended for completion, _, _ in completions],
                    "records": records,
                    **({"none": reason} if reason else {}),
                }
            )
        return entries

    def _kept(self, completions: Sequence[Answered]) -> tuple[list[int], str | None]:
        """Which completions are kept, the best first where that matters; and why none is."""
        keep = self.config.keep
        totals = [score.total for _, _, score in completions]
        best = sorted(range(len(totals)), key=lambda i: (-totals[i], i))
        if keep == "all" or (self.bench.rehearses and keep != "pairs"):
            return list(range(len(totals))), None
        if keep == "best":
            return best[:1], None
        if isinstance(keep, KeepSome):
            if keep.top is not None:
                return best[: keep.top], None
            kept = [i for i, total in enumerate(totals) if total > (keep.above or 0.0)]
            return kept, None if kept else NOT_ABOVE
        if self.bench.rehearses:
            return [best[0], best[-1]], None
        if totals[best[0]] == totals[best[-1]]:
            return [], SAME_REWARD
        if completions[best[0]][1] == completions[best[-1]][1]:  # two token sequences may decode to one text
            return [], SAME_TEXT
        return [best[0], best[-1]], None

    def _records(self, prompt: Prompt, completions: Sequence[Answered], kept: Sequence[int]) -> list[dict[str, Any]]:
        if self.config.keep == "pairs":
            return [self._pair(prompt, completions, *kept)] if kept else []
        return [self._record(prompt, completions[i]) for i in kept]

    def _record(self, prompt: Prompt, answered: Answered) -> dict[str, Any]:
        completion, text, score = answered
        made = {
            "id": f"{prompt.example_id}#{completion.request.sample}",
            "prompt_id": prompt.example_id,
            "sample": completion.request.sample,
            **said(prompt, text),
            "ended": completion.ended,
            "completion_tokens": len(completion.tokens),
            **({"reward": score.total, "rewards": dict(score.parts)} if len(self.asking.scorer) else {}),
        }
        return {**_carried(prompt, made), **made}

    def _pair(self, prompt: Prompt, completions: Sequence[Answered], best: int, worst: int) -> dict[str, Any]:
        (_, chosen, high), (_, rejected, low) = completions[best], completions[worst]
        plain = isinstance(prompt.asked, str)
        made = {
            "id": prompt.example_id,
            "prompt_id": prompt.example_id,
            "prompt": prompt.asked if plain else list(prompt.asked),
            "chosen": chosen if plain else [{"role": "assistant", "content": chosen}],
            "rejected": rejected if plain else [{"role": "assistant", "content": rejected}],
            "margin": high.total - low.total,
            "chosen_rewards": dict(high.parts),
            "rejected_rewards": dict(low.parts),
            **({} if prompt.tools is None else {"tools": list(prompt.tools)}),
        }
        return {**_carried(prompt, made), **made}

    def measure(self, entries: Sequence[Entry]) -> Mapping[str, float]:
        asked = [entry for entry in entries if "left" not in entry]
        rewards = [reward for entry in asked for reward in entry["rewards"]]
        tokens = sum(sum(entry["tokens"]) for entry in asked)
        line: dict[str, float] = {
            "tokens": tokens,
            "prompts": len(asked),
            "completions": len(rewards),
            "records": sum(len(entry["records"]) for entry in asked),
        }
        if rewards:
            stopped = sum(ended == "stop" for entry in asked for ended in entry["ended"])
            line |= {"completion_tokens": tokens / len(rewards), "stopped": stopped / len(rewards)}
        if rewards and len(self.asking.scorer):
            line["reward"] = sum(rewards) / len(rewards)
        return line

    def finish(self, portions: Iterable[Sequence[Entry]], folder: str) -> Mapping[str, Any]:
        counts: Counter[str] = Counter()
        left: dict[str, Any] = {}
        rewards = 0.0
        with storage.open_file(storage.join(folder, RECORDS), "wb") as file:
            for entries in portions:
                for entry in entries:
                    reason = entry.get("left") or entry.get("none")
                    if reason:
                        count_left(left, reason, entry["id"])
                    if "left" in entry:
                        continue
                    counts["prompts"] += 1
                    counts["completions"] += len(entry["rewards"])
                    counts["tokens"] += sum(entry["tokens"])
                    counts["stopped"] += sum(ended == "stop" for ended in entry["ended"])
                    counts["records"] += len(entry["records"])
                    rewards += sum(entry["rewards"])
                    for record in entry["records"]:
                        file.write(record_json(record).encode() + b"\n")
        stage = self.bench.task.stage
        if not counts["prompts"]:
            raise nothing_asked(stage, left)
        if not counts["records"]:
            why = ", ".join(f"{one['count']} because {reason}" for reason, one in left.items())
            raise DataError(
                f"The stage '{stage}' made no record of {counts['prompts']} prompts: {why}. Loosen 'keep', raise "
                "'samples' or 'temperature', or look at the reward."
            )
        report: dict[str, Any] = {name: counts[name] for name in ("prompts", "completions", "records", "tokens")}
        report["stopped"] = counts["stopped"] / counts["completions"]
        if len(self.asking.scorer):
            report["reward"] = rewards / counts["completions"]
        return {**report, "nothing_of": left, "dropped_by_filters": self._filtered}

    def parents(self) -> Mapping[str, Any]:
        judges = [reward.model for reward in self.config.reward if reward.model is not None]
        return {
            "model": self.bench.lineage(self.config.model),
            **({"rewards": [self.bench.lineage(judge) for judge in judges]} if judges else {}),
        }

    def table(self, report: Mapping[str, Any]) -> RenderableType:
        from rich.table import Table

        table = Table(title=f"{self.bench.task.stage}: generated", title_justify="left", show_header=False)
        for name in ("prompts", "completions", "records", "tokens"):
            table.add_row(name, f"{report[name]:,}")
        table.add_row("ended with a stop token", f"{report['stopped']:.0%}")
        if "reward" in report:
            table.add_row("mean reward", f"{report['reward']:.4f}")
        for reason, one in report["nothing_of"].items():
            table.add_row(f"nothing: {reason}", f"{one['count']:,}")
        return table

    # --- before it runs -------------------------------------------------------------------------------------

    def prompts(self) -> Iterator[Document]:
        for prompt in self.source:
            document = self.asking.document(prompt)
            if not isinstance(document, Left):
                yield document

    def counts(self) -> Mapping[str, Any]:
        return counted(self.source, self.asking)


def counted(source: PromptSource, asking: Asking) -> dict[str, Any]:
    """How many prompts there are, how long, and how many examples have none, over all the data."""
    left: dict[str, Any] = {}
    lengths: list[int] = []
    for prompt in source:
        document = asking.document(prompt)
        if isinstance(document, Left):
            count_left(left, document.reason, document.example_id)
        else:
            lengths.append(len(document))
    if not lengths:
        raise nothing_asked(asking.stage, left)
    return {
        "prompts": len(lengths),
        "prompt_tokens": {"least": min(lengths), "mean": sum(lengths) / len(lengths), "most": max(lengths)},
        "nothing_of": left,
    }


def _carried(prompt: Prompt, made: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the prompt's record that the new record has room for, and what the data answer."""
    record = {name: value for name, value in prompt.record.items() if name not in made and name not in _SAID}
    if prompt.reference is not None:
        record.setdefault(REFERENCE, prompt.reference)
    return json.loads(record_json(record))


_SAID = ("messages", "conversations", "text", "prompt", "completion", "chosen", "rejected")
"""Columns that hold what was said in the data, which a record of another answer must not."""
