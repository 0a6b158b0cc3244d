"""The work of the recipe ``evaluate``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from postlude import storage
from postlude.data.dataset import Dataset
from postlude.data.encode import Encoded, Encoder
from postlude.data.encoded_dataset import UNUSABLE
from postlude.data.example import Conversation, Ranked, Text, Tokens
from postlude.data.masks import UnprintedError
from postlude.data.preview import Preview
from postlude.data.records import record_json
from postlude.errors import DataError
from postlude.model.language_model import LanguageModel
from postlude.recipes.evaluate import Evaluate
from postlude.rollout.prompts import PROMPTING
from postlude.rollout.reward import Reward
from postlude.rollout.scoring import passes
from postlude.stages.asking import Asking, score_of
from postlude.stages.boundaries import remark_on_asked
from postlude.stages.models import lineage_of
from postlude.stages.parts import Parts
from postlude.stages.prompts import PromptReader, Row, count_example, count_prompts, no_preview, preview_prompts
from postlude.stages.work import Entry, Tell, Work, read_rows
from postlude.telemetry.screen import Kind, Listing
from postlude.training.frozen import DocumentLikelihood, likelihoods

ROWS = 64
"""Records of a portion of ``choice`` and ``held_out``."""
DETAILS = "details.jsonl"
"""The file in the artifact with a line for each example and model."""


@dataclass(frozen=True)
class _Piece:
    """A portion: some rows of one data set, for one way of evaluating one model."""

    model: str
    kind: str
    dataset: str
    rows: Sequence[Row]


class Evaluation(Work):
    """Portions go model by model, so that one model is held at a time."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.config = config = parts.config_of(Evaluate)
        self.datasets: dict[tuple[str, str], Dataset] = {}
        for kind, way, accepts in (
            ("generation", config.generation, PROMPTING),
            ("choice", config.choice, (Ranked,)),
            ("held_out", config.held_out, (Conversation, Text, Tokens)),
        ):
            for name in way.data if way is not None else ():
                self.datasets[kind, name] = parts.dataset(name, accepts, way.limit if way is not None else None)
        self.reads = {f"{kind}.{name}": dataset.fingerprint for (kind, name), dataset in self.datasets.items()}
        self._rows = {key: self.rows({key[1]: dataset}) for key, dataset in self.datasets.items()}
        most = {"choice": ROWS, "held_out": ROWS}
        if config.generation is not None:
            most["generation"] = max(config.generation.concurrency // config.generation.samples, 1)
        self.pieces = [
            _Piece(model, kind, name, rows[first : first + most[kind]])
            for model in config.named_models
            for (kind, name), rows in self._rows.items()
            for first in range(0, len(rows), most[kind])
        ]
        self.portions = len(self.pieces)
        self._asking: tuple[str, Asking] | None = None
        self._model: tuple[str, LanguageModel, dict[str, Encoder]] | None = None
        if config.generation is not None:
            self.asking(self._first)  # tells what is wrong with a reward before the first model

    @property
    def _first(self) -> str:
        return next(iter(self.config.named_models))

    def do(self, portion: int, tell: Tell) -> list[Entry]:
        piece = self.pieces[portion]
        entries = self._generate(piece, tell) if piece.kind == "generation" else self._measure(piece)
        return [{"model": piece.model, "kind": piece.kind, "data": piece.dataset, **entry} for entry in entries]

    def close(self) -> None:
        if self._asking is not None:
            self._asking[1].close()
        self._asking = self._model = None

    # --- generation -----------------------------------------------------------------------------------------

    def asking(self, model: str) -> Asking:
        """The model as one that answers prompts; the one before it is let go."""
        generation = self.config.generation
        assert generation is not None
        if self._asking is None or self._asking[0] != model:
            self.close()
            self._asking = model, Asking(self.models, self.config.named_models[model], generation, generation.data)
        return self._asking[1]

    @cached_property
    def _reader(self) -> PromptReader:
        datasets = {name: dataset for (kind, name), dataset in self.datasets.items() if kind == "generation"}
        return PromptReader(datasets, self.config.generation.environment if self.config.generation else None)

    def _generate(self, piece: _Piece, tell: Tell) -> Iterator[Entry]:
        answered, unasked = self.asking(piece.model).answer(self._reader.read_all(piece.rows), tell)
        for example in unasked:
            yield {"id": example.example_id, "left": example.reason}
        for group in answered:
            scores, prompt = [score_of(sample) for sample in group], group[0].prompt
            yield {
                "id": prompt.example_id,
                "rewards": [score.total for score in scores],
                "parts": [dict(score.parts) for score in scores],
                "ended": [sample.ended for sample in group],
                "tokens": sum(sample.sampled_tokens for sample in group),
                "prompt": prompt.asked if isinstance(prompt.asked, str) else list(prompt.asked),
                "completions": [sample.text for sample in group],
            }

    # --- likelihood -----------------------------------------------------------------------------------------

    def _language_model(self, model: str, dataset: str) -> tuple[LanguageModel, Encoder]:
        if self._model is None or self._model[0] != model:
            self.close()
            loaded, tokenizer = self.models.language_model(self.config.named_models[model])
            longest = loaded.anatomy.longest_document
            block = self.config.block if longest is None else min(self.config.block, longest)
            self._model = model, loaded, {name: self._encoder(name, tokenizer, block) for _, name in self.datasets}
        return self._model[1], self._model[2][dataset]

    def _encoder(self, dataset: str, tokenizer: PreTrainedTokenizerBase, block: int) -> Encoder:
        config = self.parts.manifest.data[dataset]
        return Encoder(
            tokenizer,
            template=config.template,
            train_on=config.train_on,
            block=block,
            truncate="right" if config.truncate == "split" else config.truncate,
            today=self.parts.today,
            drop_unprinted=config.drop_unprinted or (),
            apart=config.tokenize == "apart",
        )

    def _measure(self, piece: _Piece) -> Iterator[Entry]:
        """What the likelihoods of each example's documents say: which answer is chosen, or the loss."""
        model, encoder = self._language_model(piece.model, piece.dataset)
        encoded = self._encoded(piece.kind, piece.dataset, piece.rows, encoder)
        documents = [document for _, encoding in encoded for document in encoding.documents]
        measured = iter(likelihoods(model, documents, self.config.block))
        for example_id, encoding in encoded:
            own = [next(measured) for _ in encoding.documents]
            if not own:
                why = encoding.dropped or ("nothing to measure" if encoding.error is None else UNUSABLE)
                yield {"id": example_id, "left": why}
                continue
            values = _choice(own) if piece.kind == "choice" else _loss(own)
            yield {"id": example_id, **values, "tokens": sum(map(len, encoding.documents))}

    def _encoded(self, kind: str, name: str, rows: Sequence[Row], encoder: Encoder) -> list[tuple[str, Encoded]]:
        """The examples in rows by their ids, encoded. DataError for one that cannot be used, unless those are left
        out."""
        read = read_rows({name: self.datasets[kind, name]}, rows)
        examples = [example for _, _, examples in read for example in examples]
        encoded = list(zip((example_id for example_id, _ in examples), encoder.encode(examples, name), strict=True))
        skips = self.parts.manifest.data[name].on_bad_record == "skip"
        for example_id, encoding in encoded:
            if encoding.error is not None and (isinstance(encoding.error, UnprintedError) or not skips):
                told = str(encoding.error).replace("data.NAME", f"data.{name}")
                raise DataError(f"The example '{example_id}' cannot be used: {told}") from encoding.error
        return encoded

    # --- the report -----------------------------------------------------------------------------------------

    def measure(self, entries: Sequence[Entry]) -> Mapping[str, float]:
        return {"tokens": sum(entry.get("tokens", 0) for entry in entries), "examples": len(entries)}

    def finish(self, portions: Iterable[Sequence[Entry]], folder: str) -> Mapping[str, Any]:
        gathered: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
        left: dict[str, dict[str, Any]] = {}
        with storage.open_file(storage.join(folder, DETAILS), "wb") as file:
            for entries in portions:
                for entry in entries:
                    file.write(record_json(entry).encode() + b"\n")
                    place = entry["model"], entry["kind"], entry["data"]
                    if "left" in entry:
                        count_example(left.setdefault("/".join(place), {}), entry["left"], entry["id"])
                    else:
                        slim = {k: v for k, v in entry.items() if k not in ("prompt", "completions")}
                        gathered[place].append(slim)
        models: dict[str, Any] = {model: {} for model in self.config.named_models}
        for model in models:
            for kind, name in self.datasets:
                entries = gathered[model, kind, name]
                if not entries:
                    reasons = ", ".join(left.get(f"{model}/{kind}/{name}", {})) or "there is no example"
                    raise DataError(
                        f"The stage '{self.parts.task.stage}' has nothing to evaluate '{kind}' with in the data set "
                        f"'{name}': {reasons}."
                    )
                models[model].setdefault(kind, {})[name] = self._summary(kind, entries)
        return {"models": models, "left_out": left}

    def _summary(self, kind: str, entries: Sequence[Entry]) -> dict[str, Any]:
        if kind == "generation":
            return self._generated(entries)
        if kind == "choice":
            accuracy, error = _mean([entry["right"] for entry in entries])
            per_token, error_per_token = _mean([entry["right_per_token"] for entry in entries])
            return {
                "examples": len(entries),
                "accuracy": accuracy,
                "accuracy_error": error,
                "accuracy_per_token": per_token,
                "accuracy_per_token_error": error_per_token,
            }
        weight = math.fsum(entry["weight"] for entry in entries)
        loss = math.fsum(entry["loss"] for entry in entries) / weight
        return {"examples": len(entries), "tokens": weight, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def _generated(self, entries: Sequence[Entry]) -> dict[str, Any]:
        generation = self.config.generation
        assert generation is not None
        # The samples of one prompt are no independent measurements: the error is that of the means of prompts.
        reward, error = _mean([math.fsum(entry["rewards"]) / len(entry["rewards"]) for entry in entries])
        completions = sum(len(entry["rewards"]) for entry in entries)
        stopped = sum(ended == "stop" for entry in entries for ended in entry["ended"])
        parts = {
            name: math.fsum(part[name] for entry in entries for part in entry["parts"]) / completions
            for name in entries[0]["parts"][0]
        }
        summary: dict[str, Any] = {
            "prompts": len(entries),
            "completions": completions,
            "reward": reward,
            "reward_error": error,
            "rewards": parts,
            "stopped": stopped / completions,
            "completion_tokens": sum(entry["tokens"] for entry in entries) / completions,
        }
        if generation.samples > 1:
            rewards = [entry["rewards"] for entry in entries]
            for k, chances in passes(rewards, generation.success, generation.samples).items():
                summary[f"pass_at_{k}"], summary[f"pass_at_{k}_error"] = _mean(chances)
        return summary

    def events(self, report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for model, kinds in report["models"].items():
            for kind, datasets in kinds.items():
                for name, summary in datasets.items():
                    values = {key: value for key, value in summary.items() if isinstance(value, int | float)}
                    yield "measured", {"name": f"{model}/{kind}/{name}", "values": values}

    def table(self, report: Mapping[str, Any]) -> Listing:
        heads: dict[str, Kind] = {"": "whole", **dict.fromkeys(report["models"], "number")}
        listing = Listing(f"{self.parts.task.stage}: evaluated", heads)
        first = next(iter(report["models"].values()))
        for kind, datasets in first.items():
            for name, summary in datasets.items():
                for key in (key for key in summary if key in _SHOWN or key.startswith("pass_at_")):
                    if not key.endswith("_error"):
                        values = [models[kind][name] for models in report["models"].values()]
                        shown = [_with_error(value[key], value.get(f"{key}_error")) for value in values]
                        listing.add_row(f"{name}: {key.replace('_', ' ')}", *shown)
        return listing

    @property
    def rewards(self) -> Sequence[Reward]:
        return () if self.config.generation is None else self.config.generation.reward

    def parents(self) -> Mapping[str, Any]:
        return {name: lineage_of(start) for name, start in self.config.named_models.items()}

    # --- before it runs -------------------------------------------------------------------------------------

    def preview(self, blocks: int, example: str | None = None) -> Preview:
        if self.config.generation is None:
            raise no_preview(self.parts)
        rows = chain.from_iterable(self._rows["generation", name] for name in self.config.generation.data)
        return preview_prompts(self._reader.read_all(rows), self.asking(self._first).encoders, blocks, example)

    def counts(self) -> Mapping[str, Any]:
        counts: dict[str, Any] = {}
        unprinted: dict[str, dict[str, Any]] = {}
        for (kind, name), dataset in self.datasets.items():
            if kind == "generation":
                prompts = self._reader.read_all(self._rows[kind, name])
                encoders = self.asking(self._first).encoders
                counts[f"{kind}.{name}"] = counted = count_prompts(self.parts.task.stage, prompts, encoders)
                unprinted |= counted.pop("unprinted", {})
                continue
            counts[f"{kind}.{name}"] = {"records": sum(dataset.groups)}
            encoder = self._encoder(
                name, self.parts.tokenizer_of(self.config.named_models[self._first]), self.config.block
            )
            for first in range(0, len(self._rows[kind, name]), ROWS):
                rows = self._rows[kind, name][first : first + ROWS]
                for example_id, encoding in self._encoded(kind, name, rows, encoder):
                    for what in sorted(encoding.unprinted):
                        count_example(unprinted.setdefault(name, {}), what, example_id)
        return {**counts, "unprinted": unprinted} if unprinted else counts

    def remarks(self) -> Sequence[str]:
        if self.config.generation is None:
            return ()
        rows = chain.from_iterable(self._rows["generation", name] for name in self.config.generation.data)
        return remark_on_asked(self.parts, self._reader.read_all(rows), self.asking(self._first).encoders)


_SHOWN = ("reward", "stopped", "accuracy", "accuracy_per_token", "loss", "perplexity")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:z.4f}" if error is None else f"{value:z.4f} ± {error:z.4f}"


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error where there are two values or more."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _choice(answers: Sequence[DocumentLikelihood]) -> dict[str, Any]:
    """Whether the first of several answers is the likeliest, as a whole and by token."""
    plain = [answer.log_probability for answer in answers]
    normalised = [answer.log_probability / max(answer.tokens, 1) for answer in answers]
    return {
        "log_probabilities": plain,
        "per_token": normalised,
        "right": _first_is_best(plain),
        "right_per_token": _first_is_best(normalised),
    }


def _loss(documents: Sequence[DocumentLikelihood]) -> dict[str, Any]:
    return {
        "loss": -sum(document.log_probability for document in documents),
        "weight": sum(document.weight for document in documents),
    }


def _first_is_best(values: Sequence[float]) -> float:
    """1 where the first value is the largest, a share of it where others are as large, 0 elsewhere."""
    best = max(values)
    return 1.0 / values.count(best) if values[0] == best else 0.0
