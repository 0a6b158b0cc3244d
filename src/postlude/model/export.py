"""The artifact: a Hugging Face directory that anything can load, with the lineage of what is in it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from postlude import storage
from postlude.model import vocabulary
from postlude.model.adapters.merge import base_state, config_of
from postlude.model.adapters.stored import digest_of, open_model, write_adapter_files
from postlude.model.anatomy import decoder_of
from postlude.model.attached import Attached
from postlude.model.causal import from_config
from postlude.model.language_model import LanguageModel
from postlude.model.places import (
    ADAPTER_CONFIG_FILE,
    LINEAGE_FILE,
    LM_HEAD_FILE,
    SCALAR_FILE,
    quiet,
)
from postlude.model.sharded import open_whole
from postlude.model.sharded_export import DividedWeights, WeightFiles, gather_adapter, gather_weights, write_config
from postlude.model.weights import dtype_in_files, read_whole


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
        write_generation_config(_generation_config(model.causal.generation_config, tokenizer, stop_ids), folder)
        tokenizer.save_pretrained(folder)
        return
    dtype = dtype or model.stored_dtype or torch.float32
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    weights = _weights(model, dtype)
    written, beside = None, dict[str, Tensor]()
    if weights.scalar is not None:
        config.pad_token_id = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        written, beside = _classifier(model, config, dtype, weights.state, weights.scalar)
    if written is None:
        written = _causal(model, config, dtype, weights.state)
    weights.write(written, beside, folder)
    write_generation_config(_generation_config(model.causal.generation_config, tokenizer, stop_ids), folder)
    tokenizer.save_pretrained(folder)
    (folder / LINEAGE_FILE).write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")


def write_weights(model: LanguageModel, folder: str | Path, dtype: torch.dtype, merge: bool = True) -> None:
    """Write what an engine needs to run a model: config and safetensors, as :func:`write_model` does; of one with an
    adapter the base, with that merged into it or without it.

    Where ranks hold the model together several may write, and the others call :func:`send_weights`.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    weights = _weights(model, dtype, merge, scalar=False)
    weights.write(_causal(model, config, dtype, weights.state), {}, Path(folder))


def send_weights(model: LanguageModel, dtype: torch.dtype, merge: bool = True) -> None:
    """Take part in :func:`write_weights` on a rank that does not write, of those that hold the model together."""
    for _ in gather_weights(model, dtype, merge, scalar=False):
        pass


def write_adapter(model: LanguageModel, folder: str | Path | None) -> None:
    """Write the adapter of a model as PEFT does. Where ranks hold it together all call this, without a folder those
    that do not write."""
    assert model.attached is not None
    tensors, _ = gather_adapter(model)
    if folder is not None:
        Path(folder).mkdir()
        write_adapter_files(tensors, model.attached, Path(folder))


def send_model(model: LanguageModel, dtype: torch.dtype | None = None) -> None:
    """Take part in the writing of a model that ranks hold together, on a rank that does not write it."""
    if model.attached is not None:
        gather_adapter(model)
    elif model.mesh is not None:
        for _ in gather_weights(model, dtype or model.stored_dtype or torch.float32):
            pass


def _write_adapter(model: LanguageModel, attached: Attached, folder: Path, lineage: dict[str, Any]) -> None:
    tensors, scalar = gather_adapter(model)
    write_adapter_files(tensors, attached, folder)
    if scalar is not None:
        save_file({"weight": scalar}, folder / SCALAR_FILE)
    base = {"place": attached.base.place, "sha256": digest_of(attached.base.place)}
    (folder / LINEAGE_FILE).write_text(json.dumps({**lineage, "base": base}, indent=2) + "\n", encoding="utf-8")


def write_merged(place: str, out: Path) -> None:
    """Write the model that the adapter at a place makes of its base, tensor by tensor, in the dtype of the base.

    What else the artifact has beside its weights is copied.
    """
    with open_model(place) as stored:
        dtype = stored.base_config().dtype
        causal, sources = open_whole(stored, config_of(stored))
        config = causal.config
        config.dtype = dtype if isinstance(dtype, torch.dtype) else dtype_in_files(sources)
        written: Any = causal.to(config.dtype)  # type: ignore[arg-type]
        files = WeightFiles(written, out)
        for name in files.names:
            whole = read_whole(sources[name])
            files.add(name, whole.to(config.dtype) if whole.is_floating_point() else whole)
        files.close()
        write_config(written, out)
        if (generation_config := stored.generation_config()) is not None:
            write_generation_config(generation_config, out)
        for path in sorted(Path(stored.folder).iterdir()):
            is_of_adapter = path.name in (ADAPTER_CONFIG_FILE, storage.MARKER) or (
                path.suffix in (".safetensors", ".bin") and path.name != SCALAR_FILE
            )
            if path.is_file() and not is_of_adapter and not (out / path.name).exists():
                (out / path.name).write_bytes(path.read_bytes())


def _weights(
    model: LanguageModel, dtype: torch.dtype, merge: bool = True, scalar: bool = True
) -> WholeWeights | DividedWeights:
    """The weights of a model as they are to be written, with an adapter merged into them or without it."""
    return (WholeWeights if model.mesh is None else DividedWeights)(model, dtype, merge, scalar)


class WholeWeights:
    """What is written of a model that this process has all of."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype, merge: bool, scalar: bool) -> None:
        state = vocabulary.unpadded(model.causal, model.vocabulary)
        if model.attached is not None:
            state = dict(base_state(state, model.attached.config, merge))
        self.state = _cast(state, dtype)
        self.scalar = model.scalar.weight.detach().to("cpu", dtype) if scalar and model.scalar is not None else None

    def write(self, written: PreTrainedModel, beside: Mapping[str, Tensor], folder: Path) -> None:
        """As :meth:`DividedWeights.write`, of a model with its values."""
        saved: Any = written
        # Where ranks train together transformers would write on the first alone; each of them may have its own engine.
        saved.should_save_on_this_rank = lambda is_main_process: True
        with quiet():
            saved.save_pretrained(folder)
        if self.scalar is not None:
            save_file({"weight": self.scalar}, folder / SCALAR_FILE)
        if beside:
            save_file(dict(beside), folder / LM_HEAD_FILE)


def _causal(
    model: LanguageModel, config: PreTrainedConfig, dtype: torch.dtype, state: Mapping[str, Tensor]
) -> PreTrainedModel:
    """The language model to be written, with this state."""
    written = _on_meta(AutoModelForCausalLM, model, config, dtype)
    written.load_state_dict(state, strict=True, assign=True)
    written.tie_weights()
    return written


def _on_meta(kind: Any, model: LanguageModel, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A second model without weights. It takes them as they shall be written, so that transformers' own code decides
    what is tied and how its layers are named in a file.
    """
    with torch.device("meta"):
        return from_config(kind, config, dtype=dtype, attn_implementation=model.plain_implementation)


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
    decoder = decoder_of(model.causal)
    prefix = next(f"{name}." for name, module in model.causal.named_modules() if module is decoder)
    kept = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    if len(heads) != 1 or set(written.state_dict()) != {*kept, *heads}:
        return None, {}
    rest = {name: tensor for name, tensor in state.items() if name not in kept}
    written.load_state_dict({**kept, heads[0]: scalar}, strict=True, assign=True)
    return written, {} if model.config.get_text_config().tie_word_embeddings else rest


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
    stored: GenerationConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> GenerationConfig:
    """The model's own, that also stops at what the tokenizer calls the end, and at ``stop_ids``."""
    config = copy.deepcopy(stored)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id, *stop_ids) if end is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.do_sample is None:
        try:
            config.validate(strict=True)
        except ValueError:
            # Published models carry a temperature without do_sample, and mean that it be used.
            config.do_sample = True
            warnings.warn(
                "The model's generation config has settings of sampling without 'do_sample'; in what is written it "
                "is true, so that they are used.",
                stacklevel=2,
            )
    return config


def write_generation_config(config: GenerationConfig, folder: Path) -> None:
    """Write it as it is: with ``do_sample: false`` beside a temperature, too, which transformers reads and runs but
    refuses to save once anything else of it has changed."""
    config.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True, keys_to_pop=["compile_config"])
