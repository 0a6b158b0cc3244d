"""The work of the recipe ``generate``: prompts are answered, and what is kept of the answers becomes a data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from postlude import storage
from postlude.data.preview import Preview
from postlude.data.records import record_json
from postlude.data.sources.stage import RECORDS
from postlude.errors import DataError
from postlude.recipes.generate import Generate, KeepSome
from postlude.rollout.answers import Group
from postlude.rollout.prompts import PROMPTING, Prompt
from postlude.rollout.reward import REFERENCE, Reward
from postlude.rollout.trajectory import Trajectory
from postlude.stages.asking import Asking, columns_of, score_of
from postlude.stages.boundaries import remark_on_asked
from postlude.stages.models import lineage_of, lineage_of_judges
from postlude.stages.parts import Parts
from postlude.stages.prompts import (
    PromptReader,
    count_example,
    count_prompts,
    dropped_by_filters,
    list_reasons,
    nothing_asked,
    preview_prompts,
)
from postlude.stages.work import Entry, Tell, Work
from postlude.telemetry.screen import Fields

SAME_REWARD = "all completions have the same reward"
SAME_TEXT = "the best completion says the same as the worst"
NOT_ABOVE = "no completion has a reward above the threshold"


class Generation(Work):
    """A portion is what a batch of completions is made for."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.config = config = parts.config_of(Generate)
        self.datasets = {name: parts.dataset(name, PROMPTING) for name in config.data}
        self.reads = {name: dataset.fingerprint for name, dataset in self.datasets.items()}
        self.reader = PromptReader(self.datasets, config.environment)
        self._rows = self.rows(self.datasets)
        self._portion_rows = max(config.concurrency // config.samples, 1)
        self.portions = -(-len(self._rows) // self._portion_rows)
        self.asking = Asking(self.models, config.model, config, config.data)

    def do(self, portion: int, tell: Tell) -> list[Entry]:
        rows = self._rows[portion * self._portion_rows : (portion + 1) * self._portion_rows]
        answered, unasked = self.asking.answer(self.reader.read_all(rows), tell)
        entries: list[Entry] = [{"left": example.reason, "id": example.example_id} for example in unasked]
        for group in answered:
            kept, reason = self._kept(group)
            scores = [score_of(sample) for sample in group]
            entries.append(
                {
                    "id": group[0].prompt.example_id,
                    "rewards": [score.total for score in scores],
                    "parts": [dict(score.parts) for score in scores],
                    "tokens": [sample.sampled_tokens for sample in group],
                    "ended": [sample.ended for sample in group],
                    "records": self._records(group, kept),
                    **({"none": reason} if reason else {}),
                }
            )
        return entries

    def _kept(self, group: Group) -> tuple[list[int], str | None]:
        """Which answers are kept, the best first where that matters; and why none is."""
        keep, is_small = self.config.keep, self.parts.mode.small
        totals = [score_of(sample).total for sample in group]
        best = sorted(range(len(totals)), key=lambda i: (-totals[i], i))
        if keep == "all" or (is_small and keep != "pairs"):
            return list(range(len(totals))), None
        if keep == "best":
            return best[:1], None
        if isinstance(keep, KeepSome):
            if keep.top is not None:
                return best[: keep.top], None
            kept = [i for i, total in enumerate(totals) if total > (keep.above or 0.0)]
            return kept, None if kept else NOT_ABOVE
        if is_small:
            return [best[0], best[-1]], None
        if totals[best[0]] == totals[best[-1]]:
            return [], SAME_REWARD
        if _said(group[best[0]]) == _said(group[best[-1]]):  # two token sequences may decode to one text
            return [], SAME_TEXT
        return [best[0], best[-1]], None

    def _records(self, group: Group, kept: Sequence[int]) -> list[dict[str, Any]]:
        if self.config.keep == "pairs":
            return [_pair(group[kept[0]], group[kept[1]])] if kept else []
        return [self._record(group[i]) for i in kept]

    def _record(self, sample: Trajectory) -> dict[str, Any]:
        prompt, score = sample.prompt, score_of(sample)
        columns = {
            "id": f"{prompt.example_id}#{sample.sample}",
            "prompt_id": prompt.example_id,
            "sample": sample.sample,
            **columns_of(sample),
            "ended": sample.ended,
            "completion_tokens": sample.sampled_tokens,
            **({"reward": score.total, "rewards": dict(score.parts)} if self.config.is_rewarded else {}),
        }
        return {**_carried(prompt, columns), **columns}

    def measure(self, entries: Sequence[Entry]) -> Mapping[str, float]:
        answered = [entry for entry in entries if "left" not in entry]
        rewards = [reward for entry in answered for reward in entry["rewards"]]
        tokens = sum(sum(entry["tokens"]) for entry in answered)
        line: dict[str, float] = {
            "tokens": tokens,
            "prompts": len(answered),
            "completions": len(rewards),
            "records": sum(len(entry["records"]) for entry in answered),
        }
        if rewards:
            stopped = sum(ended == "stop" for entry in answered for ended in entry["ended"])
            line |= {"completion_tokens": tokens / len(rewards), "stopped": stopped / len(rewards)}
        if rewards and self.config.is_rewarded:
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
                        count_example(left, reason, entry["id"])
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
        stage = self.parts.task.stage
        if not counts["prompts"]:
            raise nothing_asked(stage, left)
        if not counts["records"]:
            raise DataError(
                f"The stage '{stage}' made no record of {counts['prompts']} prompts: {list_reasons(left)}. "
                "Loosen 'keep', raise 'samples' or 'temperature', or look at the reward."
            )
        report: dict[str, Any] = {name: counts[name] for name in ("prompts", "completions", "records", "tokens")}
        report["stopped"] = counts["stopped"] / counts["completions"]
        if self.config.is_rewarded:
            report["reward"] = rewards / counts["completions"]
        return {**report, "nothing_of": left, "dropped_by_filters": dropped_by_filters(self.datasets)}

    @property
    def rewards(self) -> Sequence[Reward]:
        return self.config.reward

    def parents(self) -> Mapping[str, Any]:
        return {"model": lineage_of(self.config.model), **lineage_of_judges(self.config.reward)}

    def table(self, report: Mapping[str, Any]) -> Fields:
        rows = [(name, f"{report[name]:,}") for name in ("prompts", "completions", "records", "tokens")]
        rows.append(("ended with a stop token", f"{report['stopped']:.0%}"))
        if "reward" in report:
            rows.append(("mean reward", f"{report['reward']:z.4f}"))
        rows += [(f"nothing: {reason}", f"{counted['count']:,}") for reason, counted in report["nothing_of"].items()]
        return Fields(f"{self.parts.task.stage}: generated", rows)

    def close(self) -> None:
        self.asking.close()

    # --- before it runs -------------------------------------------------------------------------------------

    def preview(self, blocks: int, example: str | None = None) -> Preview:
        return preview_prompts(self.reader.read_all(self._rows), self.asking.encoders, blocks, example)

    def remarks(self) -> Sequence[str]:
        return remark_on_asked(self.parts, self.reader.read_all(self._rows), self.asking.encoders)

    def counts(self) -> Mapping[str, Any]:
        return count_prompts(self.parts.task.stage, self.reader.read_all(self._rows), self.asking.encoders)


def _pair(chosen: Trajectory, rejected: Trajectory) -> dict[str, Any]:
    """Two answers to one prompt as a record of the format ``preference``."""
    prompt, (high, low) = chosen.prompt, (score_of(chosen), score_of(rejected))
    columns = {
        "id": prompt.example_id,
        "prompt_id": prompt.example_id,
        "prompt": prompt.asked if isinstance(prompt.asked, str) else list(prompt.asked),
        "chosen": _said(chosen),
        "rejected": _said(rejected),
        "margin": high.total - low.total,
        "chosen_rewards": dict(high.parts),
        "rejected_rewards": dict(low.parts),
        **({} if prompt.tools is None else {"tools": list(prompt.tools)}),
    }
    return {**_carried(prompt, columns), **columns}


def _said(sample: Trajectory) -> Any:
    """What was answered: a text, or messages."""
    return columns_of(sample)["completion"]


def _carried(prompt: Prompt, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the prompt's record that the new record has room for, and what the data answer."""
    record = {name: value for name, value in prompt.record.items() if name not in columns and name not in _ANSWERED}
    if prompt.reference is not None:
        record.setdefault(REFERENCE, prompt.reference)
    return json.loads(record_json(record))


_ANSWERED = ("messages", "conversations", "text", "prompt", "completion", "chosen", "rejected")
"""Columns that hold what was said in the data, which a record of another answer must not."""
