"""The weights of a model that ranks hold together, written tensor by tensor: no more than one is whole at a time.

All ranks gather each tensor in turn; the leading one writes it to the end of a safetensors file whose header it wrote
beforehand, since names and sizes are known before there is a value. Files and names are those that transformers'
``save_pretrained`` would make.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from postlude.manifest.problem import ManifestError
from postlude.model.adapters.merge import base_state
from postlude.model.anatomy import name_of
from postlude.model.language_model import LanguageModel
from postlude.model.places import LM_HEAD_FILE, SCALAR_FILE, is_adapter_part
from postlude.model.weights import WeightWriter

SCALAR = "scalar"
"""What :func:`gather_weights` calls the head so named."""


def gather_weights(
    model: LanguageModel, dtype: torch.dtype, merge: bool = True, scalar: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model inside, and last the head ``scalar`` where it is asked for, whole and on the CPU, tied
    ones once; of a model with an adapter the base, with that merged into it or without it. All ranks run through it
    together."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.causal.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor))
    state = dict(once.values())
    whole: Iterator[tuple[str, Tensor]] = ((name, _whole(tensor)) for name, tensor in state.items())
    if model.attached is not None:
        whole = base_state(state, model.attached.config, merge, _whole)
    for name, tensor in whole:
        yield name, _as_written(tensor[: _rows(model, name)] if tensor.ndim else tensor, dtype)
    if scalar and model.scalar is not None:
        yield SCALAR, _as_written(_whole(model.scalar.weight), dtype)


def gather_adapter(model: LanguageModel) -> tuple[dict[str, Tensor], Tensor | None]:
    """The tensors of a model's adapter by name, and its head ``scalar``, whole and on the CPU. All ranks call it."""
    named = model.causal.named_parameters()
    tensors = {name: _whole(tensor).to("cpu") for name, tensor in named if is_adapter_part(name)}
    return tensors, None if model.scalar is None else _whole(model.scalar.weight).to("cpu")


class DividedWeights:
    """What is written of a model that ranks hold together: without values, until :meth:`write` gathers them, in which
    the ranks that do not write take part by running through :func:`gather_weights`."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype, merge: bool, scalar: bool) -> None:
        self._model, self._dtype, self._merge = model, dtype, merge
        self.state = self._shapes()
        if model.attached is not None:
            self.state = dict(base_state(self.state, model.attached.config, False, lambda tensor: tensor))
        self.scalar: Tensor | None = None
        if scalar and model.scalar is not None:
            self.scalar = torch.empty(model.scalar.weight.shape, dtype=dtype, device="meta")

    def _shapes(self) -> dict[str, Tensor]:
        """The tensors of the model inside by name, as they are to be written: tied ones are one tensor."""
        shapes: dict[int, Tensor] = {}
        state = self._model.causal.state_dict(keep_vars=True)
        for name, tensor in state.items():
            shape = (min(len(tensor), _rows(self._model, name)), *tensor.shape[1:]) if tensor.ndim else ()
            dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
            shapes.setdefault(id(tensor), torch.empty(shape, dtype=dtype, device="meta"))
        return {name: shapes[id(tensor)] for name, tensor in state.items()}

    def write(self, written: PreTrainedModel, beside: Mapping[str, Tensor], folder: Path) -> None:
        """Write the configuration and the weights of ``written``, a model without values that has them.

        Those named in ``beside`` have no place in it and go into a file of their own, as the head ``scalar`` does.
        """
        write_config(written, folder)
        files = WeightFiles(written, folder)
        kept: dict[str, Tensor] = {}
        scores = [name for name in written.state_dict() if name not in self.state]
        for name, tensor in gather_weights(self._model, self._dtype, self._merge, self.scalar is not None):
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


def write_config(written: PreTrainedModel, folder: Path) -> None:
    """The configuration files that ``save_pretrained`` would write."""
    written.config.architectures = [type(written).__name__]
    written.config.save_pretrained(folder)
    written.generation_config.save_pretrained(folder)


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
        self._files = WeightWriter(folder, list(plans.values()))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        self._files.add(self._renamed(name, tensor))

    def close(self) -> None:
        """Finish the last file, and write the index where there are several."""
        self._files.close()

    def _renamed(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors of a file that one of the model becomes."""
        return revert_weight_conversion(self._written, {name: tensor})


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
