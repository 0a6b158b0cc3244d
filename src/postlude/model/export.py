"""The artifact: a Hugging Face directory that anything can load, with the lineage of what is in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from postlude import storage
from postlude.model import adapters, sharded, sharded_export, vocabulary
from postlude.model.adapters import Attached
from postlude.model.anatomy import decoder_of
from postlude.model.language_model import LM_HEAD_FILE, SCALAR_FILE, LanguageModel
from postlude.model.load import quiet, read_config


def write_model(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    lineage: dict[str, Any],
    dtype: torch.dtype | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Write a model into a local folder: config, safetensors, generation config, tokenizer and ``lineage.json``.

    ``dtype`` is that of the files: by default the one of the checkpoint that training began with, fp32 for a model
    that began with none. Generation stops at ``stop_ids``, too. The vocabulary has its real size. The live model is
    not touched. Where ranks hold the model together, the leading one calls this and the others :func:`send_model`.

    Of a model with an adapter only that is written, as PEFT does it, and the lineage names its base with the hash of
    its files.

    A model with a scalar head is written as transformers' sequence classification with one label, where the
    architecture has that; what is missing there stands beside it, so that it is still a language model here.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model.attached is not None:
        _write_adapter(model, model.attached, folder, lineage)
        tokenizer.save_pretrained(folder)
        return
    dtype = dtype or model.stored_dtype or torch.float32
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    if model.mesh is None:
        state = _cast(vocabulary.unpadded(model.causal, model.vocabulary), dtype)
    else:
        state = sharded_export.shapes(model, dtype)
    written, beside = None, dict[str, Tensor]()
    if model.scalar is not None:
        scalar = model.scalar.weight.detach()
        if isinstance(scalar, DTensor):
            scalar = torch.empty(scalar.shape, dtype=dtype, device="meta")
        config.pad_token_id = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        written, beside = _classifier(model, config, dtype, state, scalar.to(dtype=dtype))
    if written is None:
        written = _on_meta(AutoModelForCausalLM, model, config, dtype)
        written.load_state_dict(state, strict=True, assign=True)
        written.tie_weights()
    written.generation_config = _generation_config(model.causal.generation_config, tokenizer, stop_ids)
    if model.mesh is not None:
        _write_config(written, folder)
        sharded_export.write(written, model, beside, folder, dtype)
    else:
        with quiet():
            written.save_pretrained(folder)
        if model.scalar is not None:
            save_file(_cast(model.scalar.state_dict(), dtype), folder / SCALAR_FILE)
        if beside:
            save_file(beside, folder / LM_HEAD_FILE)
    tokenizer.save_pretrained(folder)
    (folder / "lineage.json").write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")


def write_weights(model: LanguageModel, folder: str | Path, dtype: torch.dtype, merge: bool = True) -> None:
    """Write what an engine needs to run a model: config and safetensors, as :func:`write_model` does; of one with an
    adapter the base, with that merged into it or without it.

    Where ranks hold the model together several may write, and the others call :func:`send_weights`.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    written = _on_meta(AutoModelForCausalLM, model, config, dtype)
    if model.mesh is not None:
        written.tie_weights()
        _write_config(written, Path(folder))
        files = sharded_export.WeightFiles(written, Path(folder))
        for name, tensor in sharded_export.gathered_causal(model, dtype, merge):
            files.add(name, tensor)
        files.close()
        return
    state = vocabulary.unpadded(model.causal, model.vocabulary)
    if model.attached is not None:
        state = dict(adapters.base_state(state, model.attached.config, merge))
    written.load_state_dict(_cast(state, dtype), strict=True, assign=True)
    written.tie_weights()
    # Where ranks train together transformers would write on the first alone; each of them may have its own engine.
    written.should_save_on_this_rank = lambda is_main_process: True
    with quiet():
        written.save_pretrained(folder)


def send_weights(model: LanguageModel, dtype: torch.dtype, merge: bool = True) -> None:
    """Take part in :func:`write_weights` on a rank that does not write, of those that hold the model together."""
    for _ in sharded_export.gathered_causal(model, dtype, merge):
        pass


def write_adapter(model: LanguageModel, folder: str | Path | None) -> None:
    """Write the adapter of a model as PEFT does. Where ranks hold it together all call this, without a folder those
    that do not write."""
    assert model.attached is not None
    tensors, _ = sharded_export.gathered_adapter(model)
    if folder is not None:
        Path(folder).mkdir()
        adapters.write(tensors, model.attached, Path(folder))


def send_model(model: LanguageModel, dtype: torch.dtype | None = None) -> None:
    """Take part in the writing of a model that ranks hold together, on a rank that does not write it."""
    if model.attached is not None:
        sharded_export.gathered_adapter(model)
    elif model.mesh is not None:
        for _ in sharded_export.gathered(model, dtype or model.stored_dtype or torch.float32):
            pass


def _write_adapter(model: LanguageModel, attached: Attached, folder: Path, lineage: dict[str, Any]) -> None:
    tensors, scalar = sharded_export.gathered_adapter(model)
    adapters.write(tensors, attached, folder)
    if scalar is not None:
        save_file({"weight": scalar}, folder / SCALAR_FILE)
    base = {"place": attached.base.place, "sha256": adapters.digest_of(attached.base.place)}
    (folder / "lineage.json").write_text(json.dumps({**lineage, "base": base}, indent=2) + "\n", encoding="utf-8")


def _write_config(written: PreTrainedModel, folder: Path) -> None:
    """The configuration files that ``save_pretrained`` would write."""
    written.config.architectures = [type(written).__name__]
    written.config.save_pretrained(folder)
    written.generation_config.save_pretrained(folder)


def write_merged(folder: str, place: str, out: Path) -> None:
    """Write the model that an adapter in a local folder makes of its base, tensor by tensor, in the dtype of the base.

    What else the artifact has beside its weights is copied.
    """
    config = read_config(folder, place)
    causal = sharded.on_meta(config)
    with sharded.open_sources(folder, place, causal) as found:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else sharded.dtype_in_files(found)
        config.dtype = dtype
        written: Any = causal.to(dtype)  # type: ignore[arg-type]
        files = sharded_export.WeightFiles(written, out)
        for name in files.names:
            whole = found[name].read(tuple(slice(0, size) for size in found[name].shape))
            files.add(name, whole.to(dtype) if whole.is_floating_point() else whole)
        files.close()
    _write_config(written, out)
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.name not in (adapters.CONFIG, adapters.WEIGHTS, storage.MARKER):
            (out / path.name).write_bytes(path.read_bytes())


def _on_meta(kind: Any, model: LanguageModel, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A second model without weights. It takes them as they shall be written, so that transformers' own code decides
    what is tied and how its layers are named in a file.
    """
    with torch.device("meta"):
        return kind.from_config(config, dtype=dtype, attn_implementation=model.plain_implementation)


def _classifier(
    model: LanguageModel,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    state: dict[str, Tensor],
    scalar: Tensor,
) -> tuple[PreTrainedModel | None, dict[str, Tensor]]:
    """The sequence classification of the architecture with the weights of decoder and scalar head; None if it has none.

    The language head has no place in it: where it is not the embedding it is returned beside it.
    """
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None, {}
    config.num_labels = 1
    written = _on_meta(AutoModelForSequenceClassification, model, config, dtype)
    heads = [name for name, parameter in written.named_parameters() if tuple(parameter.shape) == tuple(scalar.shape)]
    decoder = _prefix(model.causal, decoder_of(model.causal))
    kept = {name: tensor for name, tensor in state.items() if name.startswith(decoder)}
    if len(heads) != 1 or set(written.state_dict()) != {*kept, *heads}:
        return None, {}
    rest = {name: tensor for name, tensor in state.items() if name not in kept}
    written.load_state_dict({**kept, heads[0]: scalar}, strict=True, assign=True)
    return written, {} if model.config.get_text_config().tie_word_embeddings else rest


def _prefix(whole: torch.nn.Module, part: torch.nn.Module) -> str:
    return next(name for name, module in whole.named_modules() if module is part) + "."


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state in the dtype of a file, on the CPU; what is one tensor stays one."""
    cast: dict[int, Tensor] = {}
    for tensor in state.values():
        key = tensor.data_ptr()
        if key not in cast:
            target = dtype if tensor.is_floating_point() else tensor.dtype
            cast[key] = tensor.detach().to("cpu", target).contiguous()
    return {name: cast[tensor.data_ptr()] for name, tensor in state.items()}


def _generation_config(
    found: GenerationConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> GenerationConfig:
    """The model's own, that also stops at what the tokenizer calls the end, and at ``stop_ids``."""
    config = copy.deepcopy(found)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id, *stop_ids) if end is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        # Published models carry a temperature without do_sample; transformers then refuses to write what it read.
        config.do_sample = True
    return config
