"""Models of which no process ever holds the whole.

The model is made without weights, divided by tensor parallelism, sharded by FSDP, and only then does each rank read
out of the files the parts that are its own. What of a rank's memory this takes is its shard, on the host too.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
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
from postlude.model import adapters, tensor_parallel
from postlude.model.adapted import Start, sources_with_adapter, start_of
from postlude.model.adapters import Asked
from postlude.model.added_tokens import Grown, grown_config
from postlude.model.anatomy import Anatomy, UnsupportedModel, name_of
from postlude.model.language_model import LM_HEAD_FILE, SCALAR_FILE, LanguageModel, drawn_scalar
from postlude.model.mesh import Mesh
from postlude.model.weights import Extended, InFile, InMemory, Joined, LazyTensor, Stacked, Transposed, tensors_in

# The hidden states that a model returns may be a view of what it computed; nothing here writes into them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

INDEX = "model.safetensors.index.json"
SCALAR = "scalar.weight"
"""The name of the head ``scalar`` in a :class:`LanguageModel`."""
Sources = Mapping[str, LazyTensor]
"""Where the weights of a model come from, by the names that they have in it."""


def load_sharded(
    folder: str,
    place: str,
    config: PreTrainedConfig,
    mesh: Mesh,
    device: torch.device,
    scalar_head: bool,
    adapter: Asked | None = None,
    new_tokens: NewTokens | None = None,
) -> LanguageModel:
    """The model in a local folder, its weights fp32 and divided among the ranks of a mesh. All ranks call it.

    It has a head ``scalar`` if one is stored, or if ``scalar_head`` asks for one.

    ManifestError, on every rank alike, for files that are missing, broken or incomplete, and for an architecture that
    cannot be divided.
    """
    causal = on_meta(config)
    with ExitStack() as stack:
        start = stack.enter_context(start_of(folder, place, adapter)) if adapter else Start(folder, place, None)
        found = stack.enter_context(open_sources(start.folder, start.place, causal))
        _check_complete(found, causal, start.place)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else dtype_in_files(found)
        if new_tokens is not None:
            found = _with_rows_for(new_tokens, found, causal)
            causal = on_meta(grown_config(config, new_tokens))
        scalar = Path(folder, SCALAR_FILE)
        if scalar.exists():
            found[SCALAR] = InMemory(load_file(scalar)["weight"])
        elif scalar_head:
            found[SCALAR] = InMemory(drawn_scalar(config.get_text_config().hidden_size))
        return _divided(causal, found, mesh, device, stored, start, adapter)


def shard_new(
    causal: PreTrainedModel, mesh: Mesh, device: torch.device, scalar_head: bool, adapter: Asked | None = None
) -> LanguageModel:
    """A model with weights of its own, equal on every rank, divided among the ranks of a mesh."""
    found: dict[str, LazyTensor] = {name: InMemory(tensor.detach()) for name, tensor in causal.state_dict().items()}
    if scalar_head:
        found[SCALAR] = InMemory(drawn_scalar(causal.config.get_text_config().hidden_size))
    start = Start("", f"new {causal.config.model_type}", None)
    return _divided(on_meta(causal.config), found, mesh, device, None, start, adapter)


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights, whose buffers are computed.

    :class:`UnsupportedModel` for an architecture that does not say how its buffers follow from its configuration.
    """
    with torch.device("meta"):
        # A copy, since transformers notes there which dtype it was made in.
        causal = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
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


def open_checkpoint(folder: str, place: str) -> dict[str, LazyTensor]:
    """The tensors of a local folder's safetensors files, by the names that they have there. ManifestError if a file is
    missing or broken."""
    index = Path(folder, INDEX)
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    if Path(folder, LM_HEAD_FILE).exists():
        names.append(LM_HEAD_FILE)
    tensors: dict[str, LazyTensor] = {}
    for name in names:
        try:
            tensors |= tensors_in(Path(folder, name))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ManifestError(
                f"The model at '{place}' cannot be loaded: its file {name} cannot be read ({error}). Weights that "
                "are sharded are read from safetensors files; fetch or write the model anew."
            ) from error
    return tensors


@contextmanager
def open_sources(folder: str, place: str, causal: PreTrainedModel) -> Iterator[dict[str, LazyTensor]]:
    """The weights of a model out of its files, by its own names for them; of an adapter those that it is merged to."""
    if adapters.is_adapter(folder):
        stored = adapters.StoredAdapter(folder, place)
        with stored.base_folder() as base, open_sources(base, stored.base.place, causal) as found:
            yield adapters.merged_sources(found, stored)
    else:
        yield named_as_in_the_model(open_checkpoint(folder, place), causal)


def dtype_in_files(found: Sources) -> torch.dtype:
    """The dtype of a checkpoint whose configuration does not say it."""
    return next((tensor.dtype for tensor in found.values() if isinstance(tensor, InFile)), torch.float32)


def named_as_in_the_model(files: Mapping[str, LazyTensor], causal: PreTrainedModel) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint as the model has them: renamed, and joined where it has one for several.

    ManifestError for a conversion that is not known here.
    """
    conversions = get_model_conversion_mapping(causal)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = causal.state_dict()
    found: dict[str, LazyTensor] = {}
    collected: dict[str, dict[str, list[LazyTensor]]] = {}
    for name in sorted(files, key=_natural):
        target, pattern = rename_source_key(name, renamings, converters, causal.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if pattern is None:
            found[target] = files[name]
        elif target in wanted:
            collected.setdefault(target, {}).setdefault(pattern, []).append(files[name])
    for target, parts in collected.items():
        converter = by_pattern[next(iter(parts))]
        ordered = [parts.get(pattern, []) for pattern in converter.source_patterns]
        found[target] = _converted(ordered, converter.operations, target)
    return found


def _converted(parts: list[list[LazyTensor]], operations: list[Any], target: str) -> LazyTensor:
    """What transformers' operations make of the tensors that each of a converter's patterns matched."""
    for operation in operations:
        if isinstance(operation, MergeModulelist):
            parts = [[Stacked(each, operation.dim)] for each in parts]
        elif isinstance(operation, Concatenate):
            parts = [[Joined([one for each in parts for one in each], operation.dim)]]
        elif isinstance(operation, Transpose) and not operation.check_dims:
            parts = [[Transposed(one, operation.dim0, operation.dim1) for one in each] for each in parts]
        else:
            raise ManifestError(
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


def _check_complete(found: Sources, causal: PreTrainedModel, place: str) -> None:
    tied = set(getattr(causal, "all_tied_weights_keys", None) or ())
    missing = sorted({name for name, _ in causal.named_parameters()} - set(found) - tied)
    if missing:
        raise ManifestError(
            f"The model at '{place}' is incomplete: {len(missing)} weights of the architecture '{name_of(causal)}' "
            f"are not in its files, the first being '{missing[0]}'. Give a complete causal language model."
        )
    for name, parameter in causal.named_parameters():
        if name in found and tuple(found[name].shape) != tuple(parameter.shape):
            raise ManifestError(
                f"The model at '{place}' does not fit its configuration: '{name}' is {list(found[name].shape)} in its "
                f"files, and {list(parameter.shape)} by config.json."
            )


# --- parts --------------------------------------------------------------------------------------------------


def _with_rows_for(tokens: NewTokens, found: Sources, causal: PreTrainedModel) -> dict[str, LazyTensor]:
    """The weights with rows for new tokens in the embedding and in the head."""
    grown = dict(found)
    for module in (causal.get_input_embeddings(), causal.get_output_embeddings()):
        path = next(path for path, candidate in causal.named_modules() if candidate is module)
        for name in (f"{path}.weight", f"{path}.bias"):
            if name in found:
                grown[name] = Grown(found[name], tokens)
    return grown


def _divided(
    causal: PreTrainedModel,
    found: Sources,
    mesh: Mesh,
    device: torch.device,
    stored: torch.dtype | None,
    start: Start,
    adapter: Asked | None,
) -> LanguageModel:
    """A model without weights, divided among the ranks and given their parts, with an adapter if one is asked for."""
    attached, frozen = None, torch.float32
    if adapter is not None:
        found, attached = sources_with_adapter(start, causal, found, adapter)
        frozen = adapter.hold(stored or torch.float32)

    def divide(model: LanguageModel) -> None:
        model.attached = attached
        if SCALAR in found:
            model.add_scalar_head()
        if mesh.shape.tensor > 1:
            tensor_parallel.divide(causal, mesh)
            if model.scalar is not None:
                tensor_parallel.Divided(model.scalar, mesh).place()
        _shard(model, mesh)
        sources = {name if name == SCALAR else f"causal.{name}": tensor for name, tensor in found.items()}
        _fill(model, sources, device, frozen)

    return LanguageModel(causal, stored, mesh, divide, _examined(causal.config))


def _examined(config: PreTrainedConfig) -> Anatomy:
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
        found = LanguageModel(AutoModelForCausalLM.from_config(small, dtype=torch.float32)).anatomy
    each = len(found.layers) // depth
    firsts = [kinds.index(kind) * each for kind in kinds]
    return replace(found, layers=tuple(layer for first in firsts for layer in found.layers[first : first + each]))


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
        return nn.Parameter(_placed(whole, device, dtype), requires_grad=parameter.requires_grad)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    own = source.read(tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True)))
    divided = DTensor.from_local(
        _placed(own, device, dtype),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(divided, requires_grad=parameter.requires_grad)


def _placed(part: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy that does not keep the file's memory."""
    return part.to(device, dtype, copy=True).contiguous()
