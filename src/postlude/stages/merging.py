"""The work of the recipe ``merge``: tensor by tensor, so that no more than one tensor of each model is in memory,
and one file of the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelPlace
from postlude.model.language_model import LM_HEAD_FILE, SCALAR_FILE
from postlude.model.load import local_files, read_config
from postlude.recipes.merge import Merge
from postlude.stages.models import lineage_of
from postlude.stages.parts import Parts
from postlude.stages.work import Entry, Work

if TYPE_CHECKING:
    from rich.console import RenderableType

SHARD_BYTES = 4 * 2**30
"""A file of the artifact is closed before it grows beyond this."""
INDEX = "model.safetensors.index.json"
_SHAPE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        with ExitStack() as stack:
            models = [
                stack.enter_context(_opened(self.parts.place_of(start) or "", name))
                for name, start in self._starts().items()
            ]
            check_alike(models)
            combine = self._combination()
            tensors, size = _write_shards(models, combine, Path(folder))
            self._write_heads(models, combine, Path(folder))
            _write_config(models[0], Path(folder))
        parameters = sum(tensors.values())
        return {"method": self.config.method, "tensors": len(tensors), "parameters": parameters, "bytes": size}

    def _combination(self) -> Callable[[Sequence[Tensor]], Tensor]:
        """From the models' tensors of one name, the base's last, to the merged one, in fp32."""
        weights = list(self.config.weights_in_full.values())
        if self.config.method == "task_arithmetic":
            return lambda tensors: task_arithmetic(tensors[:-1], weights, tensors[-1])
        shares = [weight / sum(weights) for weight in weights]
        if self.config.method == "slerp":
            return lambda tensors: slerp(tensors[0], tensors[1], shares[1])
        return lambda tensors: average(tensors, shares)

    def _write_heads(
        self, models: Sequence[_Files], combine: Callable[[Sequence[Tensor]], Tensor], folder: Path
    ) -> None:
        """Those that stand in files of their own."""
        for file in models[0].beside:
            heads = [model.beside[file] for model in models]
            merged = {
                name: combine([head[name].float() for head in heads]).to(tensor.dtype).contiguous()
                for name, tensor in heads[0].items()
            }
            save_file(merged, folder / file)

    def parents(self) -> Mapping[str, Any]:
        weights = self.config.weights_in_full
        return {
            name: {**lineage_of(start), **({"weight": weights[name]} if name in weights else {})}
            for name, start in self._starts().items()
        }

    def counts(self) -> Mapping[str, Any]:
        there = {name: start for name, start in self._starts().items() if self.parts.is_there(start)}
        with ExitStack() as stack:
            check_alike(
                [stack.enter_context(_opened(self.parts.place_of(start) or "", name)) for name, start in there.items()]
            )
        return {"models": len(self._starts()), "compared": len(there)}

    def table(self, report: Mapping[str, Any]) -> RenderableType:
        from rich.text import Text

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


class _Files:
    """The tensors of one model, read one by one."""

    def __init__(self, name: str, folder: Path, place: str, stack: ExitStack) -> None:
        self.name, self.folder, self.place = name, folder, place
        self.config = read_config(str(folder), place)
        paths = self._paths()
        try:
            handles = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        except (OSError, SafetensorError) as error:
            raise ManifestError(f"The model '{name}' at '{place}' cannot be read: {error}.") from error
        self._handles = {tensor: handle for handle in handles for tensor in handle.keys()}  # noqa: SIM118
        self.beside = {
            name: load_file(folder / name) for name in (SCALAR_FILE, LM_HEAD_FILE) if (folder / name).exists()
        }
        """The heads that stand in files of their own, by file."""

    def _paths(self) -> list[Path]:
        index = self.folder / INDEX
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            raise ManifestError(
                f"The model '{self.name}' at '{self.place}' has no file {missing[0]}: its weights must be safetensors."
            )
        return [self.folder / name for name in names]

    @property
    def names(self) -> list[str]:
        return sorted(self._handles)

    def shape(self, tensor: str) -> list[int]:
        return list(self._handles[tensor].get_slice(tensor).get_shape())

    def dtype(self, tensor: str) -> torch.dtype | None:
        """The dtype of a tensor of floating-point numbers; None for another."""
        return _SHAPE_DTYPES.get(self._handles[tensor].get_slice(tensor).get_dtype())

    def read(self, tensor: str) -> Tensor:
        return self._handles[tensor].get_tensor(tensor)


@contextmanager
def _opened(place: str, name: str) -> Iterator[_Files]:
    with ExitStack() as stack:
        folder = stack.enter_context(local_files(place))
        if not Path(folder).exists():
            from huggingface_hub import snapshot_download

            folder = snapshot_download(
                folder, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        yield _Files(name, Path(folder), place, stack)


def check_alike(models: Sequence[_Files]) -> None:
    """ManifestError, naming models and tensor, where they are not of one architecture, shape and vocabulary."""
    if not models:
        return
    first = models[0]
    for other in models[1:]:
        both = f"The models '{first.name}' ({first.place}) and '{other.name}' ({other.place}) cannot be merged: "
        if first.config.model_type != other.config.model_type:
            raise ManifestError(f"{both}one is a '{first.config.model_type}', the other a '{other.config.model_type}'.")
        _check_vocabulary(first, other, both)
        if first.beside.keys() != other.beside.keys():
            scoring, plain = (first, other) if first.beside else (other, first)
            raise ManifestError(f"{both}'{scoring.name}' has a head that scores and '{plain.name}' has none.")
        only = sorted(set(first.names) ^ set(other.names))
        if only:
            whose = first.name if only[0] in first.names else other.name
            raise ManifestError(f"{both}only '{whose}' has the tensor '{only[0]}'. Merge models of one shape.")
        for tensor in first.names:
            shapes = first.shape(tensor), other.shape(tensor)
            if shapes[0] != shapes[1]:
                raise ManifestError(
                    f"{both}the tensor '{tensor}' is {shapes[0]} in the one and {shapes[1]} in the other."
                )


def _check_vocabulary(first: _Files, other: _Files, both: str) -> None:
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


def _write_shards(
    models: Sequence[_Files], combine: Callable[[Sequence[Tensor]], Tensor], folder: Path
) -> tuple[dict[str, int], int]:
    """Merge every tensor into files; how many elements each has, and the bytes of all."""
    shards: list[list[str]] = [[]]
    elements: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shard.clear()

    for name in models[0].names:
        dtype = models[0].dtype(name)
        if dtype is None:  # a buffer of whole numbers
            merged = models[0].read(name)
        else:
            merged = combine([model.read(name).float() for model in models]).to(dtype).contiguous()
        elements[name] = merged.numel()
        if shard and size + merged.nbytes > SHARD_BYTES:
            close()
            shards.append([])
            size = 0
        shard[name] = merged
        shards[-1].append(name)
        size, total = size + merged.nbytes, total + merged.nbytes
    close()
    _name_shards(shards, folder, total)
    return elements, total


def _name_shards(shards: Sequence[Sequence[str]], folder: Path, total: int) -> None:
    """Give the files the names that everybody looks for, with an index where they are several."""
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(first: _Files, folder: Path) -> None:
    """Everything of a model that is neither weights nor what this project adds to an artifact."""
    own = {"lineage.json", "report.json", INDEX}
    for path in sorted(first.folder.iterdir()):
        if path.name not in own and path.suffix in (".json", ".txt", ".model", ".jinja") and path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
