"""Whether an artifact holds what its stage trained: its files against the last checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from postlude import storage
from postlude.model.adapters.stored import open_model
from postlude.model.checkpoint_reader import Reader, load
from postlude.model.places import LM_HEAD_FILE, is_adapter_part, quiet

PREFIX = "policy.model.causal."
"""Of the names of the policy's weights in a checkpoint."""


def differences_from_checkpoint(artifact: str, checkpoint: str) -> list[str]:
    """The names of the weights, as the model has them, that a checkpoint has and an artifact has not, or not these
    values in its dtype.

    The artifact is read by transformers, or of an adapter its file, and not by what reads models here.
    """
    trained = _weights_in(checkpoint)
    with open_model(artifact) as stored:
        if any(map(is_adapter_part, trained)):
            trained = {name: tensor for name, tensor in trained.items() if is_adapter_part(name)}
            written: Mapping[str, Tensor] = stored.adapters[-1].named_in_model() if stored.adapters else {}
        else:
            with quiet():
                causal = AutoModelForCausalLM.from_pretrained(stored.folder, dtype="auto")
            written = causal.state_dict()
            beside = Path(stored.folder, LM_HEAD_FILE)
            if beside.exists():
                written = {**written, **load_file(beside)}
    return sorted(name for name, tensor in trained.items() if not _same(tensor, written.get(name)))


def _weights_in(checkpoint: str) -> dict[str, Tensor]:
    """The policy's trained weights in a checkpoint, whole, by their names in transformers' model. CorruptError if it is
    not what was committed."""
    storage.verify(checkpoint)
    reader = Reader(checkpoint)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process alone
        load(checkpoint, state, alone=True)
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def _same(trained: Tensor, written: Tensor | None) -> bool:
    """But for the padding of the vocabulary, which an artifact has not."""
    if written is None or trained.shape[1:] != written.shape[1:] or len(trained) < len(written):
        return False
    return torch.equal(trained[: len(written)].to(written.dtype), written)
