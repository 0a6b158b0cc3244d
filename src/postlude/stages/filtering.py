"""The work of the recipe ``filter``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from postlude import storage
from postlude.data.dataset import BAD_RECORD
from postlude.data.example import Conversation, Example, Judged, Ranked, Record, Text, Tokens, answers_of
from postlude.data.records import record_json
from postlude.data.sources.stage import RECORDS
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.recipes.filter import Filter
from postlude.rollout.prompts import NoPrompt, Prompt, prompt_of
from postlude.rollout.reward import REFERENCE
from postlude.rollout.reward_pool import RewardPool
from postlude.rollout.scoring import Scorer
from postlude.stages.asking import require_scores
from postlude.stages.models import lineage_of_judges
from postlude.stages.parts import Parts
from postlude.stages.prompts import dropped_by_filters
from postlude.stages.work import Entry, Tell, Work, read_rows
from postlude.telemetry.screen import Fields

_ANY = (Conversation, Text, Tokens, Ranked, Judged)


class Filtering(Work):
    """Rows are judged portion by portion; which share is the top one is told at the end."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.config = config = parts.config_of(Filter)
        formats = {parts.manifest.data[name].format.model_dump_json() for name in config.data}
        kinds = {parts.manifest.data[name].format.component_name for name in config.data}
        if len(formats) > 1 or len(kinds) > 1:
            raise ManifestError(
                f"stages.{parts.task.stage}.data: the data sets have different formats ({', '.join(sorted(kinds))}), "
                "and what is kept is one data set with one format. Filter each in a stage of its own."
            )
        accepts = (Conversation, Text) if config.reward else _ANY
        self.datasets = {name: parts.dataset(name, accepts) for name in config.data}
        self.reads = {name: dataset.fingerprint for name, dataset in self.datasets.items()}
        pool = RewardPool(config.reward_workers, float(config.reward_seconds))
        self.scorer = Scorer(config.reward, self.models.reward_model, pool)
        self._rows = self.rows(self.datasets)
        self.portions = -(-len(self._rows) // config.portion)

    def do(self, portion: int, tell: Tell) -> list[Entry]:
        rows = self._rows[portion * self.config.portion : (portion + 1) * self.config.portion]
        read = list(read_rows(self.datasets, rows))
        bad: list[Entry] = [{"left": BAD_RECORD} for _, _, examples in read if not examples]
        if not self.config.reward:
            return [*bad, *({"record": _plain(record)} for _, record, examples in read if examples)]
        judged = [
            [_judged(example, example_id, name, record) for example_id, example in examples]
            for name, record, examples in read
        ]
        scores = iter(require_scores(self.scorer.score([pair for row in judged for pair in row])))
        entries = bad
        for (_, record, _), row in zip(read, judged, strict=True):
            own = [next(scores) for _ in row]
            if not own:
                continue
            reward = sum(score.total for score in own) / len(own)
            parts = {name: sum(score.parts[name] for score in own) / len(own) for name in own[0].parts}
            entries.append({"reward": reward, "record": {**_plain(record), "reward": reward, "rewards": parts}})
        return entries

    def measure(self, entries: Sequence[Entry]) -> Mapping[str, float]:
        rewards = [entry["reward"] for entry in entries if "reward" in entry]
        mean = {"reward": sum(rewards) / len(rewards)} if rewards else {}
        return {"tokens": 0, "records": sum("record" in entry for entry in entries), **mean}

    def finish(self, portions: Iterable[Sequence[Entry]], folder: str) -> Mapping[str, Any]:
        keep = self.config.keep
        read = kept = bad = 0
        total = 0.0
        chosen: set[int] | None = None
        if keep is not None and keep.share is not None:
            portions = [list(entries) for entries in portions]  # which are the best is known when all are
            chosen = self._chosen(portions, keep.share)
        with storage.open_file(storage.join(folder, RECORDS), "wb") as file:
            for entry in chain.from_iterable(portions):
                if "left" in entry:
                    bad += 1
                    continue
                place, read = read, read + 1
                total += entry.get("reward", 0.0)
                if chosen is not None:
                    is_kept = place in chosen
                else:
                    is_kept = keep is None or self.parts.mode.small or entry["reward"] > (keep.above or 0.0)
                if is_kept:
                    kept += 1
                    file.write(record_json(entry["record"]).encode() + b"\n")
        report = {
            "read": read,
            "records": kept,
            "bad_records": bad,
            "dropped_by_filters": dropped_by_filters(self.datasets),
        }
        if not kept:
            mean = f" (their mean reward is {total / read:z.4f})" if read and self.config.reward else ""
            raise DataError(
                f"The stage '{self.parts.task.stage}' kept none of {read} records{mean}. Lower the threshold of "
                "'keep', or look at the reward."
            )
        return {**report, **({"reward": total / read} if self.config.reward else {})}

    def _chosen(self, portions: Iterable[Sequence[Entry]], share: float) -> set[int]:
        """The places of the records with the highest rewards; of equal ones the first."""
        rewards = [entry["reward"] for entries in portions for entry in entries if "left" not in entry]
        best = sorted(range(len(rewards)), key=lambda place: (-rewards[place], place))
        return set(best[: max(1, round(share * len(rewards)))])

    def parents(self) -> Mapping[str, Any]:
        return lineage_of_judges(self.config.reward)

    def table(self, report: Mapping[str, Any]) -> Fields:
        rows = [("read", f"{report['read']:,}"), ("kept", f"{report['records']:,}")]
        if "reward" in report:
            rows.append(("mean reward of what was read", f"{report['reward']:z.4f}"))
        for name, reasons in report["dropped_by_filters"].items():
            rows += [(f"{name}: dropped by {reason}", f"{count:,}") for reason, count in reasons.items()]
        return Fields(f"{self.parts.task.stage}: filtered", rows)

    def close(self) -> None:
        self.scorer.pool.close()

    def counts(self) -> Mapping[str, Any]:
        return {"records": len(self._rows)}


def _judged(example: Example, example_id: str, source: str, record: Record) -> tuple[Prompt, str]:
    """What was asked, and the answer that is judged. DataError if there is none."""
    try:
        prompt = prompt_of(example, example_id, source, record)
    except NoPrompt as error:
        raise DataError(f"The record '{example_id}' cannot be judged: {error}.") from error
    if prompt.reference is None and not isinstance(answers_of(example)[0], Text):
        raise DataError(
            f"The record '{example_id}' cannot be judged: its conversation does not end with a turn of the assistant. "
            "Leave such records out with a filter."
        )
    answer = prompt.reference or ""
    if isinstance(prompt.asked, str) and prompt.reference is None:  # plain text is judged as a whole
        answer = prompt.asked
        prompt = replace(prompt, asked="")
    return replace(prompt, reference=record.get(REFERENCE)), answer


def _plain(record: Record) -> dict[str, Any]:
    return json.loads(record_json(record))
