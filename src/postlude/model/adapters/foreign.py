"""Adapters that are more than products beside linear layers: PEFT merges them, in fp32, and what comes of it is
compared with what PEFT computes before."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from postlude.manifest.problem import ManifestError
from postlude.model.adapters.stored import PREFIX, StoredAdapter
from postlude.model.attached import ADAPTER_NAME
from postlude.model.causal import weightless, with_weights_in
from postlude.model.places import one_line

_PROBED = 64
"""Tokens for which a merged model is compared."""
_TOLERANCE = 1e-4
"""Of the largest logit."""


def config_with(adapter: StoredAdapter, config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model with an adapter merged into it: an adapter may bring a vocabulary of another size,
    and may change one of an embedding and a head that are one in its base.

    ManifestError for rows that the adapter has of one of them only.
    """
    text = config.get_text_config()
    if adapter.is_plain and not text.tie_word_embeddings:
        return config
    causal = weightless(config)
    paths = _vocabulary_paths(causal)
    rows = {path: size for path in paths if (size := _rows(adapter, path)) is not None}
    is_tied = bool(text.tie_word_embeddings)
    sizes = set(rows.values())
    if sizes <= {text.vocab_size}:
        size = text.vocab_size
    elif len(sizes) == 1 and (is_tied or set(rows) == set(paths)):
        size = sizes.pop()
    else:
        raise ManifestError(
            f"The adapter at '{adapter.place}' has {' and '.join(f'{n} rows for {p!r}' for p, n in rows.items())}, "
            f"where its base has {text.vocab_size}, and not the rows of both the embedding and the head. Merge it "
            "into its base with the program that made it, and give the merged model."
        )
    untied = is_tied and any(_is_changed_alone(adapter, path) for path in paths)
    if size == text.vocab_size and not untied:
        return config
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "vocab_size"):
            part.vocab_size = size
        if untied:
            part.tie_word_embeddings = False
    return config


def merge_by_peft(causal: PreTrainedModel, adapter: StoredAdapter) -> PreTrainedModel:
    """A model with an adapter merged into it, each weight rounded once to the dtype that it had. The model itself is
    used up.

    ManifestError if tensors are of no use or missing, or the merged model computes something else than the adapted.
    """
    config = config_with(adapter, causal.config)
    dtypes = {parameter.dtype for parameter in causal.parameters()}
    dtype = causal.dtype if len(dtypes) > 1 else dtypes.pop()
    causal = with_weights_in(causal, torch.float32).eval()
    size = config.get_text_config().vocab_size
    tokens = torch.linspace(0, size - 1, min(_PROBED, size)).long()[None]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if size != causal.config.get_text_config().vocab_size:
            causal.resize_token_embeddings(size, mean_resizing=False)
        try:
            adapted = PeftModel(causal, copy.deepcopy(adapter.config), ADAPTER_NAME)
            loaded = set_peft_model_state_dict(adapted, adapter.tensors, ADAPTER_NAME)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
            ImportError,
        ) as error:
            raise _unmergeable(adapter, f"PEFT cannot load it: {one_line(error)}") from error
        _check_all_used(adapter, adapted, loaded)
        adapted.eval()
        expected = adapted(input_ids=tokens).logits
        _separate_head(causal)
        try:
            merged: Any = adapted.merge_and_unload(safe_merge=True)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise _unmergeable(adapter, f"PEFT cannot merge it: {one_line(error)}") from error
        _tie_or_untie(merged, bool(config.get_text_config().tie_word_embeddings))
        distance = float((merged(input_ids=tokens).logits - expected).abs().max())
    if not distance <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise _unmergeable(adapter, f"merged it gives logits that differ by {distance:.2g} from those it gives beside")
    return with_weights_in(merged, dtype).requires_grad_(True)


def _check_all_used(adapter: StoredAdapter, adapted: PeftModel, result: Any) -> None:
    """ManifestError for a tensor of the file that PEFT has no place for, or one that it lacks."""
    if result.unexpected_keys:
        first = sorted(result.unexpected_keys)[0]
        raise _unmergeable(adapter, f"its tensor '{first}' has no place in the model at '{adapter.base.place}'")
    state = adapted.state_dict(keep_vars=True)
    missing = set(result.missing_keys)
    there = {state[name].data_ptr() for name in state if name not in missing}
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[adapter.config.peft_type]
    for name in sorted(missing):
        own = f".{ADAPTER_NAME}" in name and any(part in name for part in (prefix, "modules_to_save", "trainable_tok"))
        if own and state[name].data_ptr() not in there:
            raise _unmergeable(adapter, f"its files lack the tensor '{name}'")


def _unmergeable(adapter: StoredAdapter, why: str) -> ManifestError:
    kind = str(getattr(adapter.config.peft_type, "value", adapter.config.peft_type))
    return ManifestError(
        f"The adapter at '{adapter.place}' (of PEFT's kind {kind}) cannot be used: {why.rstrip('.')}. Merge it into "
        "its base with the program that made it, and give the merged model."
    )


def _vocabulary_paths(causal: PreTrainedModel) -> list[str]:
    """Of the embedding and of the head."""
    modules = (causal.get_input_embeddings(), causal.get_output_embeddings())
    return [path for path, module in causal.named_modules() if any(module is one for one in modules)]


def _rows(adapter: StoredAdapter, path: str) -> int | None:
    """How many rows an adapter has for an embedding or head, where it has all of them."""
    for name in (f"{path}.weight", f"{path}.base_layer.weight"):
        if (tensor := adapter.tensors.get(PREFIX + name)) is not None:
            return len(tensor)
    return None


def _is_changed_alone(adapter: StoredAdapter, path: str) -> bool:
    """Whether an adapter changes an embedding or a head without what is one with it. What PEFT saves beside, and single
    rows, it changes in both."""
    if getattr(adapter.config, "ensure_weight_tying", False):
        return False
    saved = any(f".{path}".endswith(f".{name}") for name in getattr(adapter.config, "modules_to_save", None) or ())
    beside = {f"{PREFIX}{path}.base_layer.weight", *(() if saved else (f"{PREFIX}{path}.weight",))}
    return any(
        name.startswith(f"{PREFIX}{path}.") and name not in beside and ".token_adapter." not in name
        for name in adapter.tensors
    )


def _separate_head(causal: PreTrainedModel) -> None:
    """Give a head that is one with its embedding weights of its own, so that what is merged into one of them leaves the
    other as it is."""
    embedding, head = (_innermost(module) for module in (causal.get_input_embeddings(), causal.get_output_embeddings()))
    if head is not None and embedding is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _innermost(module: Any) -> Any:
    """The layer itself, of one that PEFT has wrapped."""
    while module is not None:
        inner = next((part for name in ("base_layer", "original_module") if (part := _child(module, name))), None)
        if inner is None:
            break
        module = inner
    return module


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return module._modules.get(name)


def _tie_or_untie(causal: Any, is_tied: bool) -> None:
    """Let a model know whether its head is one with its embedding."""
    for part in (causal.config, causal.config.get_text_config()):
        part.tie_word_embeddings = is_tied
    causal.all_tied_weights_keys = causal.get_expanded_tied_weights_keys(all_submodels=True)
    if is_tied:
        causal.tie_weights()
