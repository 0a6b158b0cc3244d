"""The work of the recipe ``evaluate``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from postlude import storage
from postlude.data.dataset import Dataset
from postlude.data.document import Document
from postlude.data.encode import Encoded, Encoder
from postlude.data.example import Conversation, Ranked, Text, Tokens
from postlude.data.records import record_json
from postlude.errors import DataError
from postlude.recipes.evaluate import Evaluate
from postlude.rollout.likelihood import Likelihood, likelihoods
from postlude.rollout.scoring import pass_at_k
from postlude.stages.generation import counted
from postlude.stages.models import ASKING
from postlude.stages.prompts import Asking, Left, PromptSource, count_left, said
from postlude.stages.work import Entry, Work

if TYPE_CHECKING:
    from rich.console import RenderableType

    from postlude.model.language_model import LanguageModel
    from postlude.stages.workbench import Workbench

ROWS = 64
"""Records of a portion of ``choice`` and ``held_out``."""
DETAILS = "details.jsonl"
"""The file in the artifact with a line for each example and model."""


@dataclass(frozen=True)
class _Part:
    """A portion: some rows of one data set, for one way of evaluating one model."""

    model: str
    kind: str
    dataset: str
    number: int
    """Which portion of the data set it is."""


class Evaluation(Work):
    """Portions go model by model, so that one model is held at a time."""

    def __init__(self, config: Evaluate, bench: Workbench) -> None:
        self.config, self.bench = config, bench
        self.datasets: dict[tuple[str, str], Dataset] = {}
        self._prompts: dict[str, PromptSource] = {}
        for kind, asked, accepts in (
            ("generation", config.generation, ASKING),
            ("choice", config.choice, (Ranked,)),
            ("held_out", config.held_out, (Conversation, Text, Tokens)),
        ):
            for name in asked.data if asked is not None else ():
                limit = asked.limit if asked is not None else None
                self.datasets[kind, name] = bench.dataset_of(name, accepts, limit)
        self.reads = {f"{kind}.{name}": dataset.fingerprint for (kind, name), dataset in self.datasets.items()}
        self.parts = [
            _Part(model, kind, name, number)
            for model in config.named_models
            for (kind, name), dataset in self.datasets.items()
            for number in range(self._portions(kind, name, dataset))
        ]
        self.portions = len(self.parts)
        self._asking: tuple[str, Asking] | None = None
        self._model: tuple[str, LanguageModel, dict[str, Encoder]] | None = None
        if config.generation is not None:
            self.asking(next(iter(config.named_models)))  # tells what is wrong with a reward before the first model

    def _portions(self, kind: str, name: str, dataset: Dataset) -> int:
        if kind == "generation":
            assert self.config.generation is not None
            rows = self.config.generation.concurrency // self.config.generation.samples
            self._prompts[name] = PromptSource(self.bench, {name: dataset}, rows)
            return self._prompts[name].portions
        return -(-len(self.bench.rows(dataset)) // ROWS)

    def do(self, portion: int) -> list[Entry]:
        part = self.parts[portion]
        if part.kind == "generation":
            found = self._generate(part)
        elif part.kind == "choice":
            found = self._choose(part)
        else:
            found = self._lose(part)
        return [{"model": part.model, "kind": part.kind, "data": part.dataset, **entry} for entry in found]

    # --- generation -----------------------------------------------------------------------------------------

    def asking(self, model: str) -> Asking:
        """The model as one that answers prompts; the one before it is let go."""
        generation = self.config.generation
        assert generation is not None
        if self._asking is None or self._asking[0] != model:
            self._model = None
            asking = Asking(
                self.bench,
                self.config.named_models[model],
                samples=generation.samples,
                max_tokens=generation.max_tokens,
                temperature=generation.temperature,
                top_p=generation.top_p,
                seed=self.bench.seed if generation.seed is None else generation.seed,
                batch=generation.concurrency,
                rewards=generation.reward,
            )
            self._asking = model, asking
        return self._asking[1]

    def _generate(self, part: _Part) -> Iterator[Entry]:
        answered, left = self.asking(part.model).answer(self._prompts[part.dataset].portion(part.number))
        for one in left:
            yield {"id": one.example_id, "left": one.reason}
        for prompt, completions in answered:
            yield {
                "id": prompt.example_id,
                "rewards": [score.total for _, _, score in completions],
                "parts": [dict(score.parts) for _, _, score in completions],
                "ended": [completion.ended for completion, _, _ in completions],
                "tokens": sum(len(completion.tokens) for completion, _, _ in completions),
                "prompt": said(prompt, "")["prompt"],
                "completions": [text for _, text, _ in completions],
            }

    # --- likelihood -----------------------------------------------------------------------------------------

    def _language_model(self, model: str, dataset: str) -> tuple[LanguageModel, Encoder]:
        if self._model is None or self._model[0] != model:
            self._asking, self._model = None, None
            loaded, tokenizer = self.bench.language_model(self.config.named_models[model])
            longest = loaded.anatomy.longest_document
            block = self.config.block if longest is None else min(self.config.block, longest)
            encoders = {}
            for _, name in self.datasets:
                config = self.bench.manifest.data[name]
                encoders[name] = Encoder(
                    tokenizer,
                    template=config.template,
                    train_on=config.train_on,
                    block=block,
                    truncate="right" if config.truncate == "split" else config.truncate,
                    today=self.bench.begun,
                )
            self._model = model, loaded, encoders
        return self._model[1], self._model[2][dataset]

    def _encoded(self, part: _Part) -> list[tuple[str, Encoded]]:
        """The examples of a portion as documents."""
        dataset = self.datasets[part.kind, part.dataset]
        rows = self.bench.rows(dataset)[part.number * ROWS : (part.number + 1) * ROWS]
        read = self.bench.records({part.dataset: dataset}, [(part.dataset, *row) for row in rows])
        examples = [one for _, _, examples in read for one in examples]
        _, encoder = self._language_model(part.model, part.dataset)
        encoded = encoder.encode(examples, part.dataset)
        for (example_id, _), one in zip(examples, encoded, strict=True):
            if one.error is not None:
                raise DataError(f"The example '{example_id}' cannot be used: {one.error}") from one.error
        return [(example_id, one) for (example_id, _), one in zip(examples, encoded, strict=True)]

    def _likelihoods(self, part: _Part) -> Iterator[tuple[str, Encoded, list[Likelihood]]]:
        encoded = self._encoded(part)
        model, _ = self._language_model(part.model, part.dataset)
        documents = [document for _, one in encoded for document in one.documents]
        measured = iter(likelihoods(model, documents, self.config.block))
        for example_id, one in encoded:
            yield example_id, one, [next(measured) for _ in one.documents]

    def _choose(self, part: _Part) -> Iterator[Entry]:
        for example_id, one, found in self._likelihoods(part):
            if not found:
                yield {"id": example_id, "left": one.dropped or "nothing to measure"}
                continue
            plain = [likelihood.log_probability for likelihood in found]
            normalised = [likelihood.log_probability / max(likelihood.tokens, 1) for likelihood in found]
            yield {
                "id": example_id,
                "log_probabilities": plain,
                "per_token": normalised,
                "right": _first_is_best(plain),
                "right_per_token": _first_is_best(normalised),
                "tokens": sum(map(len, one.documents)),
            }

    def _lose(self, part: _Part) -> Iterator[Entry]:
        for example_id, one, found in self._likelihoods(part):
            if not found:
                yield {"id": example_id, "left": one.dropped or "nothing to measure"}
                continue
            yield {
                "id": example_id,
                "loss": -sum(likelihood.log_probability for likelihood in found),
                "weight": sum(likelihood.weight for likelihood in found),
                "tokens": sum(map(len, one.documents)),
            }

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
                        count_left(left.setdefault("/".join(place), {}), entry["left"], entry["id"])
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
                        f"The stage '{self.bench.task.stage}' has nothing to evaluate '{kind}' with in the data set "
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
        passed = [sum(reward >= generation.success for reward in entry["rewards"]) for entry in entries]
        k = 1
        while generation.samples > 1 and k <= generation.samples:
            found, error = _mean([pass_at_k(generation.samples, count, k) for count in passed])
            summary |= {f"pass_at_{k}": found, f"pass_at_{k}_error": error}
            k *= 2
        return summary

    def events(self, report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for model, kinds in report["models"].items():
            for kind, datasets in kinds.items():
                for name, summary in datasets.items():
                    values = {key: value for key, value in summary.items() if isinstance(value, int | float)}
                    yield "measured", {"name": f"{model}/{kind}/{name}", "values": values}

    def table(self, report: Mapping[str, Any]) -> RenderableType:
        from rich.table import Table

        table = Table(title=f"{self.bench.task.stage}: evaluated", title_justify="left")
        table.add_column("what")
        for model in report["models"]:
            table.add_column(model, justify="right")
        first = next(iter(report["models"].values()))
        for kind, datasets in first.items():
            for name, summary in datasets.items():
                for key in (key for key in summary if key in _SHOWN or key.startswith("pass_at_")):
                    if not key.endswith("_error"):
                        values = [models[kind][name] for models in report["models"].values()]
                        shown = [_with_error(value[key], value.get(f"{key}_error")) for value in values]
                        table.add_row(f"{name}: {key.replace('_', ' ')}", *shown)
        return table

    def parents(self) -> Mapping[str, Any]:
        return {name: self.bench.lineage(start) for name, start in self.config.named_models.items()}

    # --- before it runs -------------------------------------------------------------------------------------

    def prompts(self) -> Iterator[Document]:
        if self.config.generation is None:
            return
        asking = self.asking(next(iter(self.config.named_models)))
        for source in self._prompts.values():
            for prompt in source:
                document = asking.document(prompt)
                if not isinstance(document, Left):
                    yield document

    def counts(self) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for (kind, name), dataset in self.datasets.items():
            if kind == "generation":
                found[f"{kind}.{name}"] = counted(
                    self._prompts[name], self.asking(next(iter(self.config.named_models)))
                )
            else:
                found[f"{kind}.{name}"] = {"records": sum(dataset.groups)}
        return found


_SHOWN = ("reward", "stopped", "accuracy", "accuracy_per_token", "loss", "perplexity")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error where there are two values or more."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _first_is_best(values: Sequence[float]) -> float:
    """1 where the first value is the largest, a share of it where others are as large, 0 elsewhere."""
    best = max(values)
    return 1.0 / values.count(best) if values[0] == best else 0.0
