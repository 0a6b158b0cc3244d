"""Models of which no process ever holds the whole.

The model is made without weights, divided by tensor parallelism, sharded by FSDP, and only then does each rank read
out of the files the parts that are its own. What of a rank's memory this takes is its shard, on the host too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from postlude.data.tokenizer import NewTokens
from postlude.manifest.problem import ManifestError
from postlude.model import tensor_parallel
from postlude.model.adapters.merge import merged_sources
from postlude.model.adapters.start import Start, start_of
from postlude.model.adapters.stored import StoredModel
from postlude.model.added_tokens import WithTokens, config_with_tokens
from postlude.model.anatomy import Anatomy, UnsupportedModel, name_of
from postlude.model.attached import AdapterRequest
from postlude.model.causal import from_config, weightless
from postlude.model.fit import check_complete, check_nothing_else, has_own_head, is_tied, untie
from postlude.model.language_model import LanguageModel, draw_scalar
from postlude.model.mesh import Mesh
from postlude.model.places import local_folder
from postlude.model.weights import (
    Extended,
    InMemory,
    Joined,
    LazyTensor,
    Sources,
    Stacked,
    Transposed,
    dtype_in_files,
    open_checkpoint,
    read_scalar,
    weight_files,
)

# The hidden states that a model returns may be a view of what it computed; nothing here writes into them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

SCALAR = "scalar.weight"
"""The name of the head ``scalar`` in a :class:`LanguageModel`."""


def load_sharded(
    stored: StoredModel,
    config: PreTrainedConfig,
    mesh: Mesh,
    device: torch.device,
    scalar_head: bool,
    adapter: AdapterRequest | None = None,
    new_tokens: NewTokens | None = None,
) -> LanguageModel:
    """The model in files, its weights fp32 and divided among the ranks of a mesh. All ranks call it.

    It has a head ``scalar`` if one is stored, or if ``scalar_head`` asks for one.

    ManifestError, on every rank alike, for files that are missing, broken or incomplete, and for an architecture that
    cannot be divided.
    """
    base, start = (stored, None) if adapter is None else start_of(stored, adapter)
    causal, sources = open_whole(base, config)
    config = causal.config
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else dtype_in_files(sources)
    if new_tokens is not None:
        sources = _with_rows_for(new_tokens, sources, causal)
        causal = on_meta(config_with_tokens(config, new_tokens))
    causal.generation_config = stored.generation_config() or causal.generation_config
    if (scalar := read_scalar(stored.folder, stored.place)) is not None:
        sources[SCALAR] = InMemory(scalar)
    elif scalar_head:
        sources[SCALAR] = InMemory(draw_scalar(config.get_text_config().hidden_size))
    return _divide(causal, sources, mesh, device, dtype, start)


def shard_new(
    causal: PreTrainedModel, mesh: Mesh, device: torch.device, scalar_head: bool, adapter: AdapterRequest | None = None
) -> LanguageModel:
    """A model with weights of its own, equal on every rank, divided among the ranks of a mesh."""
    sources: dict[str, LazyTensor] = {name: InMemory(tensor.detach()) for name, tensor in causal.state_dict().items()}
    if scalar_head:
        sources[SCALAR] = InMemory(draw_scalar(causal.config.get_text_config().hidden_size))
    start = None if adapter is None else Start(adapter, f"new {causal.config.model_type}")
    return _divide(on_meta(causal.config), sources, mesh, device, None, start)


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights, whose buffers are computed.

    :class:`UnsupportedModel` for an architecture that does not say how its buffers follow from its configuration.
    """
    causal = weightless(config)
    for path, module in causal.named_modules():
        if next(module.buffers(recurse=False), None) is None:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                empty = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
                module._buffers[name] = empty.fill_(torch.nan) if empty.is_floating_point() else empty.fill_(0)
        causal._init_weights(module)  # of parameters on the meta device it only makes others
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.isnan().any():
                raise UnsupportedModel(
                    f"The architecture '{name_of(causal)}' has a buffer '{path}.{name}' that is not computed from its "
                    "configuration, so that its models cannot be loaded in shards. Set parallel.shard to false."
                )
    return causal


# --- files --------------------------------------------------------------------------------------------------


def open_whole(stored: StoredModel, config: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, LazyTensor]]:
    """A model without weights and where they are: all of them and no others, ManifestError otherwise. Where the files
    have a head that differs from the embedding, the model's configuration says so."""
    causal = on_meta(config)
    sources = open_sources(stored, causal)
    if is_tied(config) and has_own_head(sources, causal):
        config = copy.deepcopy(config)
        untie(config)
        causal = on_meta(config)
    _check_complete(sources, causal, stored.place)
    check_nothing_else(set(sources) - set(causal.state_dict()), causal, stored.whole_place, stored.whole_folder)
    return causal, sources


def open_sources(stored: StoredModel, causal: PreTrainedModel) -> dict[str, LazyTensor]:
    """The weights of a model out of its files, by its own names for them, with the adapters on it merged into it.
    ManifestError for files that are missing or broken, and for a conversion that is not known here."""
    files = open_checkpoint(local_folder(stored.whole_folder), stored.whole_place)
    return merged_sources(rename_as_in_model(files, causal), stored, causal.config)


def check_names(stored: StoredModel) -> bool:
    """ManifestError if the files of a local folder, of which only the heads are read, hold tensors that the
    architecture has no place for. False if it has no such files to look at; what is not there is told when the model is
    loaded."""
    folder = Path(stored.whole_folder)
    if not all((folder / name).exists() for name in weight_files(folder)):
        return False
    causal = weightless(stored.base_config())
    names = names_in_model(open_checkpoint(folder, stored.whole_place), causal)
    surplus = set(names.values()) - causal.state_dict().keys()
    check_nothing_else(surplus, causal, stored.whole_place, stored.whole_folder)
    return True


def rename_as_in_model(files: Mapping[str, LazyTensor], causal: PreTrainedModel) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint as the model has them: renamed, and joined where it has one for several that are all
    there; what it has no place for keeps its name.

    :class:`NotInParts` for a conversion that is not known here.
    """
    sources: dict[str, LazyTensor] = {}
    collected: dict[str, tuple[WeightConverter, dict[str, list[LazyTensor]]]] = {}
    for name, (target, converter, pattern) in _places_in_model(files, causal).items():
        if converter is None:
            sources[target] = files[name]
        else:
            collected.setdefault(target, (converter, {}))[1].setdefault(pattern, []).append(files[name])
    for target, (converter, parts) in collected.items():
        ordered = [parts.get(pattern, []) for pattern in converter.source_patterns]
        if len(set(map(len, ordered))) == 1:
            sources[target] = _convert(ordered, converter.operations, target)
    return sources


def names_in_model(files: Iterable[str], causal: PreTrainedModel) -> dict[str, str]:
    """By the names of tensors in files what each is in the model, or a part of; its own name if it has no place."""
    return {name: target for name, (target, _, _) in _places_in_model(files, causal).items()}


def _places_in_model(
    files: Iterable[str], causal: PreTrainedModel
) -> dict[str, tuple[str, WeightConverter | None, str]]:
    """By the names of tensors in files, sorted: the model's name for it, or for what it is a part of, and then the
    converter that makes that and the pattern of it that fits. A tensor without a place keeps its name."""
    conversions = get_model_conversion_mapping(causal)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = causal.state_dict()
    places: dict[str, tuple[str, WeightConverter | None, str]] = {}
    for name in sorted(files, key=_natural):
        target, pattern = rename_source_key(name, renamings, converters, causal.base_model_prefix, wanted)
        if target not in wanted:
            places[name] = (name, None, "")
        else:
            places[name] = (target, by_pattern[pattern] if pattern is not None else None, pattern or "")
    return places


class NotInParts(ManifestError):
    """A model whose files are not read here but by transformers alone."""


def _convert(parts: list[list[LazyTensor]], operations: list[Any], target: str) -> LazyTensor:
    """What transformers' operations make of the tensors that each of a converter's patterns matched."""
    for operation in operations:
        if isinstance(operation, MergeModulelist):
            parts = [[Stacked(matched, operation.dim)] for matched in parts]
        elif isinstance(operation, Concatenate):
            parts = [[Joined([tensor for matched in parts for tensor in matched], operation.dim)]]
        elif isinstance(operation, Transpose) and not operation.check_dims:
            parts = [[Transposed(tensor, operation.dim0, operation.dim1) for tensor in matched] for matched in parts]
        else:
            raise NotInParts(
                f"The tensor '{target}' is made of those in the files in a way that cannot be done in parts "
                f"({type(operation).__name__}). Set parallel.shard to false, or write the model anew with "
                "save_pretrained of transformers."
            )
    if len(parts) != 1 or len(parts[0]) != 1:
        raise ManifestError(f"The tensors that '{target}' is made of are not all in the files of the model.")
    return parts[0][0]


def _natural(name: str) -> list[Any]:
    """For an order in which expert 10 comes after expert 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _check_complete(sources: Sources, causal: PreTrainedModel, place: str) -> None:
    tied = set(getattr(causal, "all_tied_weights_keys", None) or ())
    missing = {name for name, _ in causal.named_parameters()} - set(sources) - tied
    check_complete(missing, place, name_of(causal))
    for name, parameter in causal.named_parameters():
        if name in sources and tuple(sources[name].shape) != tuple(parameter.shape):
            raise ManifestError(
                f"The model at '{place}' does not fit its configuration: '{name}' is {list(sources[name].shape)} in "
                f"its files, and {list(parameter.shape)} by config.json."
            )


# --- parts --------------------------------------------------------------------------------------------------


def _with_rows_for(tokens: NewTokens, sources: Sources, causal: PreTrainedModel) -> dict[str, LazyTensor]:
    """The weights with rows for new tokens in the embedding and in the head."""
    extended = dict(sources)
    for module in (causal.get_input_embeddings(), causal.get_output_embeddings()):
        path = next(path for path, candidate in causal.named_modules() if candidate is module)
        for name in (f"{path}.weight", f"{path}.bias"):
            if name in sources:
                extended[name] = WithTokens(sources[name], tokens)
    return extended


def _divide(
    causal: PreTrainedModel,
    sources: Sources,
    mesh: Mesh,
    device: torch.device,
    stored: torch.dtype | None,
    start: Start | None,
) -> LanguageModel:
    """A model without weights, divided among the ranks and given their parts, with an adapter if one is asked for."""
    attached, frozen = None, torch.float32
    if start is not None:
        sources, attached = start.sources(causal, sources)
        frozen = start.request.frozen_dtype(stored or torch.float32)

    def divide(model: LanguageModel) -> None:
        model.attached = attached
        if SCALAR in sources:
            model.add_scalar_head()
        if mesh.shape.tensor > 1:
            tensor_parallel.divide(causal, mesh)
            if model.scalar is not None:
                tensor_parallel.Divided(model.scalar, mesh).place()
        _shard(model, mesh)
        named = {name if name == SCALAR else f"causal.{name}": tensor for name, tensor in sources.items()}
        _fill(model, named, device, frozen)

    return LanguageModel(causal, stored, mesh, divide, _examine(causal.config))


def _examine(config: PreTrainedConfig) -> Anatomy:
    """What there is to know of an architecture, found out on a model with fewer layers, one of each kind at least, and
    a small vocabulary: without weights from elsewhere and without other ranks."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    count = text.num_hidden_layers
    by_layer = {key: value for key, value in vars(text).items() if isinstance(value, list) and len(value) == count}
    kinds = list(zip(*by_layer.values(), strict=True)) if by_layer else [()] * count
    depth = min(count, max(2, 1 + max(kinds.index(kind) for kind in kinds)))
    text.num_hidden_layers, text.vocab_size = depth, min(text.vocab_size, 1024)
    for key, value in by_layer.items():
        setattr(text, key, value[:depth])
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, key, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        examined = LanguageModel(from_config(AutoModelForCausalLM, small, dtype=torch.float32)).anatomy
    each = len(examined.layers) // depth
    firsts = [kinds.index(kind) * each for kind in kinds]
    return replace(examined, layers=tuple(layer for first in firsts for layer in examined.layers[first : first + each]))


def _shard(model: LanguageModel, mesh: Mesh) -> None:
    """Shard the weights layer by layer; what is in no layer (embedding, last norm, heads) is gathered with the whole.

    Gradients are summed, not averaged: an objective's normalisers are those of the step already.
    """
    if mesh.shape.data == 1:
        return
    layers = model.layers()
    for module in (*layers, model):
        fully_shard(module, mesh=mesh.weights, reshard_after_forward=module is not model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _fill(model: nn.Module, sources: Sources, device: torch.device, frozen: torch.dtype) -> None:
    """Give every parameter this rank's part of its source, on a device; what is one parameter stays one."""
    empty = dict(model.named_parameters(remove_duplicate=False))
    filled = {
        id(parameter): _part(parameter, sources[name], device, torch.float32 if parameter.requires_grad else frozen)
        for name, parameter in empty.items()
        if name in sources
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = filled[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _part(parameter: nn.Parameter, source: LazyTensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    if parameter.ndim and source.shape[0] < parameter.shape[0]:
        source = Extended(source, parameter.shape[0])  # the padding of the vocabulary
    if not isinstance(parameter, DTensor):
        whole = source.read(tuple(slice(0, size) for size in parameter.shape))
        return nn.Parameter(_place(whole, device, dtype), requires_grad=parameter.requires_grad)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    own = source.read(tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True)))
    divided = DTensor.from_local(
        _place(own, device, dtype),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(divided, requires_grad=parameter.requires_grad)


def _place(part: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy that does not keep the file's memory."""
    return part.to(device, dtype, copy=True).contiguous()
