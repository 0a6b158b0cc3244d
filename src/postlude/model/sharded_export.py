"""The weights of a model that ranks hold together, written tensor by tensor: no more than one is whole at a time.

All ranks gather each tensor in turn; the leading one writes it to the end of a safetensors file whose header it wrote
beforehand, since names and sizes are known before there is a value. Files and names are those that transformers'
``save_pretrained`` would make.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from postlude.manifest.problem import ManifestError
from postlude.model import adapters
from postlude.model.anatomy import name_of
from postlude.model.language_model import LM_HEAD_FILE, SCALAR_FILE, LanguageModel, is_adapter_part

FILE_BYTES = 4 * 2**30
"""A file is closed before it grows beyond this."""
INDEX = "model.safetensors.index.json"
SCALAR = "scalar"
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def shapes(model: LanguageModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the model inside by name, without values, as they are to be written: tied ones are one tensor."""
    made: dict[int, Tensor] = {}
    state = model.causal.state_dict(keep_vars=True)
    for name, tensor in state.items():
        shape = (min(len(tensor), _rows(model, name)), *tensor.shape[1:]) if tensor.ndim else ()
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        made.setdefault(id(tensor), torch.empty(shape, dtype=kind, device="meta"))
    return {name: made[id(tensor)] for name, tensor in state.items()}


def gathered(model: LanguageModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model inside, and last the head ``scalar``, whole and on the CPU, tied ones once. All ranks
    run through it together."""
    yield from gathered_causal(model, dtype)
    if model.scalar is not None:
        yield SCALAR, _as_written(_whole(model.scalar.weight), dtype)


def gathered_causal(model: LanguageModel, dtype: torch.dtype, merge: bool = True) -> Iterator[tuple[str, Tensor]]:
    """As :func:`gathered`, without a head ``scalar``; of a model with an adapter the base, with that merged into it or
    without it."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.causal.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor))
    state = dict(once.values())
    whole: Iterator[tuple[str, Tensor]] = ((name, _whole(tensor)) for name, tensor in state.items())
    if model.attached is not None:
        whole = adapters.base_state(state, model.attached.config, merge, _whole)
    for name, tensor in whole:
        yield name, _as_written(tensor[: _rows(model, name)] if tensor.ndim else tensor, dtype)


def gathered_adapter(model: LanguageModel) -> tuple[dict[str, Tensor], Tensor | None]:
    """The tensors of a model's adapter by name, and its head ``scalar``, whole and on the CPU. All ranks call it."""
    named = model.causal.named_parameters()
    tensors = {name: _whole(tensor).to("cpu") for name, tensor in named if is_adapter_part(name)}
    return tensors, None if model.scalar is None else _whole(model.scalar.weight).to("cpu")


def write(
    written: PreTrainedModel, model: LanguageModel, beside: Mapping[str, Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Write the weights of ``written``, a model without values, out of those that are gathered from all ranks.

    Those named in ``beside`` have no place in it and go into a file of their own.
    """
    files = WeightFiles(written, folder)
    kept: dict[str, Tensor] = {}
    scores = [name for name in written.state_dict() if name not in model.causal.state_dict()]
    for name, tensor in gathered(model, dtype):
        target = scores[0] if name == SCALAR and scores else name
        if target in files.names:
            files.add(target, tensor)
        elif target in beside:
            kept[target] = tensor
        if name == SCALAR:
            save_file({"weight": tensor}, folder / SCALAR_FILE)
    files.close()
    if kept:
        save_file(kept, folder / LM_HEAD_FILE)


class WeightFiles:
    """The safetensors files of a model, filled tensor by tensor in the order of :attr:`names`.

    ``written`` is the model without values; it says how tensors are named in files and which are tied. ManifestError if
    the architecture's files hold tensors that are made of several.
    """

    def __init__(self, written: PreTrainedModel, folder: Path) -> None:
        self._written = written
        state = written.state_dict(keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(list(state.items()))}
        self.names = [name for name, tensor in state.items() if first[id(tensor)] == name]
        """What is to be given, tied tensors once."""
        whole = {name: state[name].detach() for name in self.names}
        plans = {name: self._renamed(name, tensor) for name, tensor in whole.items()}
        if {name for plan in plans.values() for name in plan} != set(revert_weight_conversion(written, whole)):
            raise ManifestError(
                f"The files of the architecture '{name_of(written)}' join tensors that the model has apart, which "
                "cannot be written in parts. Set parallel.shard to false."
            )
        self._files = _Files(folder, plans)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        self._files.add(self._renamed(name, tensor))

    def close(self) -> None:
        """Finish the last file, and write the index where there are several."""
        self._files.close()

    def _renamed(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors of a file that one of the model becomes."""
        return revert_weight_conversion(self._written, {name: tensor})


class _Files:
    """Safetensors files that are filled in order."""

    def __init__(self, folder: Path, plans: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.folder = folder
        self.contents: list[dict[str, Tensor]] = [{}]
        size = 0
        for plan in plans.values():
            bytes_of_plan = sum(tensor.nbytes for tensor in plan.values())
            if size and size + bytes_of_plan > FILE_BYTES:
                self.contents.append({})
                size = 0
            self.contents[-1] |= plan
            size += bytes_of_plan
        count = len(self.contents)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        self.names = names if count > 1 else ["model.safetensors"]
        self.expected = [name for content in self.contents for name in content]
        self.open: BinaryIO | None = None
        self.written = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, which have to come in the order of the plan."""
        for name, tensor in tensors.items():
            assert self.expected[self.written] == name, f"{name} comes before {self.expected[self.written]}"
            number = next(number for number, content in enumerate(self.contents) if name in content)
            if name == next(iter(self.contents[number])):
                self._begin(number)
            assert self.open is not None
            self.open.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self.written += 1

    def _begin(self, number: int) -> None:
        if self.open is not None:
            self.open.close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, tensor in self.contents[number].items():
            end = start + tensor.nbytes
            header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.open = (self.folder / self.names[number]).open("wb")
        self.open.write(struct.pack("<Q", len(text)) + text)

    def close(self) -> None:
        assert self.written == len(self.expected), "not every tensor was given"
        if self.open is not None:
            self.open.close()
        if len(self.names) > 1:
            total = sum(tensor.nbytes for content in self.contents for tensor in content.values())
            where = {name: file for file, content in zip(self.names, self.contents, strict=True) for name in content}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_written(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


def _rows(model: LanguageModel, name: str) -> int:
    """How many rows of a tensor are real: the vocabulary is padded inside."""
    embeddings = (model.causal.get_input_embeddings(), model.causal.get_output_embeddings())
    path, _, _ = name.rpartition(".")
    padded = any(model.causal.get_submodule(path) is module for module in embeddings)
    return model.vocabulary if padded else 2**62
