"""The work of the recipe ``merge``: tensor by tensor, so that no more than one tensor of each model is in memory, and
one of the result."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelPlace
from postlude.model.adapters.stored import open_model
from postlude.model.causal import weightless
from postlude.model.fit import has_own_head, head_and_embedding, is_tied, untie
from postlude.model.places import LINEAGE_FILE, LM_HEAD_FILE, SCALAR_FILE, local_folder, read_config
from postlude.model.sharded import names_in_model
from postlude.model.weights import (
    INDEX_FILE,
    InFile,
    WeightWriter,
    read_whole,
    tensors_in,
    weight_files,
)
from postlude.recipes.merge import Merge
from postlude.stages.models import lineage_of
from postlude.stages.parts import Parts
from postlude.stages.work import Entry, Work

Combine = Callable[[Sequence[Tensor]], Tensor]
"""From the models' tensors of one name, the base's last, to the merged one, in fp32."""


class Merging(Work):
    """All of it is done by the leading rank, at once; what a kill leaves is made anew."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.config = parts.config_of(Merge)
        for start in self._starts().values():
            parts.root(start)  # tells what is wrong with a stage that makes no model

    def _starts(self) -> Mapping[str, ModelPlace]:
        """The models by name, the base last."""
        base = {} if self.config.base is None else {"base of the task arithmetic": self.config.base}
        return {**self.config.models, **base}

    def finish(self, portions: Iterable[Sequence[Entry]], folder: str) -> Mapping[str, Any]:
        with self._opened(self._starts()) as models:
            merged, combine = models[0].tensors, self._combination()
            _write(models, combine, Path(folder))
            for file, head in models[0].beside.items():
                heads = {name: _merged([model.beside[file][name] for model in models], combine) for name in head}
                save_file(heads, Path(folder) / file)
            _copy_rest(models[0].folder, Path(folder))
            if is_tied(read_config(folder, folder)) and not is_tied(models[0].config):
                models[0].config.save_pretrained(folder)
        return {
            "method": self.config.method,
            "tensors": len(merged),
            "parameters": sum(math.prod(tensor.shape) for tensor in merged.values()),
            "bytes": sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in merged.values()),
        }

    @contextmanager
    def _opened(self, starts: Mapping[str, ModelPlace]) -> Iterator[list[_Model]]:
        """The models of one shape. ManifestError where they are not."""
        with ExitStack() as stack:
            places = {name: self.parts.place_of(start) or "" for name, start in starts.items()}
            models = with_heads([stack.enter_context(_opened(place, name)) for name, place in places.items()])
            check_alike(models)
            yield models

    def _combination(self) -> Combine:
        weights = list(self.config.weights_in_full.values())
        if self.config.method == "task_arithmetic":
            return lambda tensors: task_arithmetic(tensors[:-1], weights, tensors[-1])
        shares = [weight / sum(weights) for weight in weights]
        if self.config.method == "slerp":
            return lambda tensors: slerp(tensors[0], tensors[1], shares[1])
        return lambda tensors: average(tensors, shares)

    def parents(self) -> Mapping[str, Any]:
        weights = self.config.weights_in_full
        return {
            name: {**lineage_of(start), **({"weight": weights[name]} if name in weights else {})}
            for name, start in self._starts().items()
        }

    def counts(self) -> Mapping[str, Any]:
        there = {name: start for name, start in self._starts().items() if self.parts.is_there(start)}
        with self._opened(there) as models:
            return {"models": len(self._starts()), "compared": len(models)}

    def table(self, report: Mapping[str, Any]) -> Text:
        return Text(
            f"{self.parts.task.stage}: {len(self.config.models)} models merged by {report['method']}, "
            f"{report['parameters']:,} parameters in {report['tensors']:,} tensors"
        )


# --- the arithmetic -----------------------------------------------------------------------------------------


def average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """``sum(share * tensor)``."""
    merged = tensors[0] * shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        merged += share * tensor
    return merged


def task_arithmetic(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
    """``base + sum(weight * (tensor - base))``."""
    merged = base.clone()
    for tensor, weight in zip(tensors, weights, strict=True):
        merged += weight * (tensor - base)
    return merged


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """From ``first`` (share 0) to ``second`` (share 1) with even steps of the angle between them, taken as vectors.

    ``sin((1 - t) a) / sin(a) * first + sin(t a) / sin(a) * second``; a straight line where they point the same way,
    or opposite ones.
    """
    norms = first.norm() * second.norm()
    cosine = float(((first * second).sum() / norms).clamp(-1, 1)) if norms else 1.0
    if abs(cosine) > 0.9995:
        return average([first, second], [1 - share, share])
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    factors = [float(torch.sin(part * angle) / torch.sin(angle)) for part in (1 - share, share)]
    return average([first, second], factors)


# --- files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """The files of one model."""

    name: str
    place: str
    folder: Path
    config: PreTrainedConfig
    tensors: Mapping[str, InFile]
    beside: Mapping[str, Mapping[str, InFile]]
    """The heads that stand in files of their own, by file."""


@contextmanager
def _opened(place: str, name: str) -> Iterator[_Model]:
    with open_model(place) as stored:
        if stored.adapters:
            raise ManifestError(
                f"The model '{name}' at '{place}' is an adapter, and merging takes whole models. Make it one with "
                "`postlude export --merge`."
            )
        folder = local_folder(stored.folder, ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"))
        config = stored.base_config()
        tensors: dict[str, InFile] = {}
        for file in weight_files(folder):
            if file.endswith(".bin") or not (folder / file).exists():
                raise ManifestError(
                    f"The model '{name}' at '{place}' has no file {file}: its weights must be safetensors."
                )
            try:
                tensors |= tensors_in(folder / file)
            except (OSError, SafetensorError) as error:
                raise ManifestError(f"The model '{name}' at '{place}' cannot be read: {error}.") from error
        beside = {file: tensors_in(folder / file) for file in (SCALAR_FILE, LM_HEAD_FILE) if (folder / file).exists()}
        yield _Model(name, place, folder, config, tensors, beside)


class _Head(NamedTuple):
    """The head of a model that predicts tokens."""

    name: str
    """In the model's files; empty if it is not there."""
    is_own: bool
    """Whether it has weights of its own."""
    is_beside: bool
    """Whether it stands in a file of its own."""
    tied: InFile | None
    """The embedding, where that is the head."""


def with_heads(models: Sequence[_Model]) -> list[_Model]:
    """The models with a head each where one of them has a head of its own, which for a tied one is its embedding; or
    without, where all are tied."""
    heads = [_head_of(model) for model in models]
    own = next((head for head in heads if head.is_own), None)
    same = []
    for model, head in zip(models, heads, strict=True):
        config, tensors = copy.deepcopy(model.config), dict(model.tensors)
        beside = {file: dict(held) for file, held in model.beside.items()}
        if not head.is_own:
            tensors.pop(head.name, None)
            beside.pop(LM_HEAD_FILE, None)
        if own is not None:
            untie(config)
            if head.tied is not None:
                (beside.setdefault(LM_HEAD_FILE, {}) if own.is_beside else tensors)[own.name] = head.tied
        same.append(replace(model, config=config, tensors=tensors, beside=beside))
    return same


def _head_of(model: _Model) -> _Head:
    files = {**model.tensors, **model.beside.get(LM_HEAD_FILE, {})}
    causal = weightless(model.config)
    names = {name: stored for stored, name in names_in_model(files, causal).items()}
    head, embedding = head_and_embedding(causal) or ("", "")
    is_own = head in names and (
        not is_tied(model.config) or has_own_head({name: files[names[name]] for name in (head, embedding)}, causal)
    )
    tied = files.get(names.get(embedding, "")) if is_tied(model.config) and not is_own else None
    name = names.get(head, "")
    return _Head(name, is_own, name not in model.tensors, tied)


def check_alike(models: Sequence[_Model]) -> None:
    """ManifestError, naming models and tensor, where they are not of one architecture, shape and vocabulary."""
    for other in models[1:]:
        first = models[0]
        both = f"The models '{first.name}' ({first.place}) and '{other.name}' ({other.place}) cannot be merged: "
        if first.config.model_type != other.config.model_type:
            raise ManifestError(f"{both}one is a '{first.config.model_type}', the other a '{other.config.model_type}'.")
        _check_vocabulary(first, other, both)
        if (SCALAR_FILE in first.beside) != (SCALAR_FILE in other.beside):
            scoring, plain = (first, other) if SCALAR_FILE in first.beside else (other, first)
            raise ManifestError(f"{both}'{scoring.name}' has a head that scores and '{plain.name}' has none.")
        only = sorted(first.tensors.keys() ^ other.tensors.keys())
        if only:
            whose = first.name if only[0] in first.tensors else other.name
            raise ManifestError(f"{both}only '{whose}' has the tensor '{only[0]}'. Merge models of one shape.")
        for name in sorted(first.tensors):
            shapes = [list(model.tensors[name].shape) for model in (first, other)]
            if shapes[0] != shapes[1]:
                raise ManifestError(
                    f"{both}the tensor '{name}' is {shapes[0]} in the one and {shapes[1]} in the other."
                )


def _check_vocabulary(first: _Model, other: _Model, both: str) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (first, other)]
    if sizes[0] != sizes[1]:
        raise ManifestError(f"{both}their vocabularies have {sizes[0]} and {sizes[1]} tokens.")
    has_tokenizer = [(model.folder / "tokenizer_config.json").exists() for model in (first, other)]
    if not all(has_tokenizer):
        return
    ours, theirs = (load_tokenizer(str(model.folder)).get_vocab() for model in (first, other))
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            raise ManifestError(
                f"{both}the token {token!r} is {number} in the vocabulary of the one and "
                f"{theirs.get(token, 'missing')} in that of the other."
            )


def _write(models: Sequence[_Model], combine: Combine, folder: Path) -> None:
    """Merge every tensor into files, with an index where they are several."""
    first = dict(sorted(models[0].tensors.items()))
    plan = [{name: torch.empty(of.shape, dtype=of.dtype, device="meta")} for name, of in first.items()]
    writer = WeightWriter(folder, plan)
    for name in first:
        writer.add({name: _merged([model.tensors[name] for model in models], combine)})
    writer.close()


def _merged(tensors: Sequence[InFile], combine: Combine) -> Tensor:
    """In the dtype of the first model; of whole numbers, as in a buffer, those of the first."""
    if not tensors[0].dtype.is_floating_point:
        return read_whole(tensors[0])
    return combine([read_whole(tensor).float() for tensor in tensors]).to(tensors[0].dtype).contiguous()


def _copy_rest(source: Path, folder: Path) -> None:
    """Everything of a model that is neither weights nor what this project adds to an artifact."""
    own = {LINEAGE_FILE, "report.json", INDEX_FILE}
    for path in sorted(source.iterdir()):
        if path.name not in own and path.suffix in (".json", ".txt", ".model", ".jinja") and path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
