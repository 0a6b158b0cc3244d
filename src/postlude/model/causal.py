"""Transformers' causal language models: out of their files, every weight of them, or with random weights."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from postlude.data.remote_code import is_trusted
from postlude.manifest.problem import ManifestError
from postlude.model.fit import check_complete, check_nothing_else, is_tied, untie
from postlude.model.places import LM_HEAD_FILE, config_errors, one_line, quiet

Model = TypeVar("Model", bound=torch.nn.Module)


def read_causal(
    folder: str, place: str, config: PreTrainedConfig, dtype: torch.dtype | Literal["auto"]
) -> PreTrainedModel:
    """A transformers model from its files, every weight of it. A head that differs from the embedding is kept, and the
    model's configuration says so. ManifestError if files are broken or incomplete, or hold other weights."""
    try:
        with quiet() if Path(folder).exists() else nullcontext():  # a download shows how far it is
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=is_trusted(folder),
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ManifestError(f"The model at '{place}' cannot be loaded: {one_line(error)}") from error
    causal, report = loaded
    beside = Path(folder) / LM_HEAD_FILE
    head = load_file(beside) if beside.exists() else {}
    causal.load_state_dict(head, strict=False)
    check_complete(set(report["missing_keys"]) - set(head), place, config.model_type)
    check_nothing_else(report["unexpected_keys"], causal, place, folder)
    output: Any = causal.get_output_embeddings()
    if is_tied(causal.config) and output is not None and output.weight is not causal.get_input_embeddings().weight:
        untie(causal.config)  # what is made of it has a head of its own, too
    return causal


def random_causal(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model whose random fp32 weights follow from a seed. ManifestError as :func:`construct_causal`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return construct_causal(config)


def construct_causal(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a configuration in fp32, as torch draws it. ManifestError if none can be made."""
    with config_errors(f"model.new: no '{config.model_type}' can be made of this configuration"):
        return from_config(AutoModelForCausalLM, config, dtype=torch.float32)


def from_config(kind: Any, config: PreTrainedConfig, **options: Any) -> Any:
    """A model of a configuration, of a kind as transformers' ``AutoModelForCausalLM``; with code of its own only where
    that may be run."""
    return kind.from_config(config, trust_remote_code=is_trusted(config._name_or_path), **options)


def weightless(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a configuration whose parameters and buffers have shapes and no values."""
    with torch.device("meta"):
        # A copy, since transformers notes there which dtype it was made in.
        causal: PreTrainedModel = from_config(AutoModelForCausalLM, copy.deepcopy(config), dtype=torch.float32)
    return causal


def with_weights_in(model: Model, dtype: torch.dtype) -> Model:
    """The model with its weights in another dtype. Buffers keep theirs: of rotary frequencies in bf16 come wrong
    positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
