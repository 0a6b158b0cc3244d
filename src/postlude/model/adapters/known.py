"""What of PEFT's adapters is known here: its kinds, and each key of LoRA's configuration.

What a new PEFT adds is in no table and therefore refused, and ``tests/model/test_foreign_adapters.py`` compares the
tables with the PEFT that is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from postlude.manifest.problem import ManifestError

MERGED_KINDS = frozenset(
    (
        "ADALORA",
        "ADAMSS",
        "BEFT",
        "BOFT",
        "C3A",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    )
)
"""Kinds beside LoRA that PEFT can merge, so that a whole model comes of them. What comes of each is compared with the
adapted model before it is used."""
REFUSED_KINDS: Mapping[str, str] = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
        "puts learned vectors before the text, and no weights are changed",
    ),
    "ADAPTION_PROMPT": "adds to the attention what no weights of the architecture hold",
    "POLY": "mixes its parts anew for each task",
    "XLORA": "mixes its parts anew for each token",
    "LILY": "shares its parts between layers, which PEFT cannot merge",
    "SHADOW": "runs a second network beside the model",
}
"""Kinds of which no whole model can be made."""

_PLACED = frozenset(
    (
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "inference_mode",
        "runtime_config",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "megatron_core",
        "qalora_group_size",
    )
)
"""Keys that say where the layers are and how they are scaled, and those without effect on a trained adapter."""
_STARTS = frozenset(("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"))
_BY_PEFT = frozenset(
    (
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "lora_bias",
        "kasa_config",
        "velora_config",
        "ensure_weight_tying",
    )
)
"""Keys that change more than the weights of linear layers, where they are set."""
_REFUSED: Mapping[str, str] = {
    "revision": "names a revision of the base, and a base is taken as it is now",
    "alora_invocation_tokens": "works on the tokens after an invocation only",
    "layer_replication": "makes a model with more layers than its base",
    "megatron_config": "is for models of Megatron",
    "monteclora_config": "draws its weights anew in each pass",
    "arrow_config": "chooses among adapters for each token",
    "use_qalora": "pools what goes into packed layers",
    "use_bdlora": "is for layers divided by vLLM",
}
KNOWN_KEYS = _PLACED | _STARTS | _BY_PEFT | _REFUSED.keys()

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base as it is."""
_REPEATED_STARTS = ("pissa", "olora", "loftq", "mica")
"""Those that PEFT does again whenever it loads the adapter, and that give the same again."""
_OTHER_STARTS: Mapping[str, str] = {
    "corda": "changed the base by data that are not in its files",
    "lora_ga": "changed the base by gradients that are not in its files",
    "pissa_niter": "changed the base by a decomposition that begins at random and cannot be repeated",
}


def check_known(keys: Mapping[str, Any], place: str) -> bool:
    """Whether an adapter, by the keys of its configuration, is a plain LoRA: products beside linear layers and nothing
    else. ManifestError, with key and value, for what is not known or cannot be merged."""
    kind = str(keys.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        if kind not in MERGED_KINDS:
            raise _refused(place, "peft_type", kind, REFUSED_KINDS.get(kind, "is not known here"))
        return False
    for key, value in sorted(keys.items()):
        if _is_unset(value) or (key == "revision" and value == "main"):
            continue
        if key in _REFUSED:
            raise _refused(place, key, value, _REFUSED[key])
        if key not in KNOWN_KEYS:
            raise _refused(place, key, value, "is not known here")
    return _check_start(keys.get("init_lora_weights", True), place) and not any(
        not _is_unset(keys.get(key)) for key in _BY_PEFT
    )


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value == "none" or value in ([], {})


def _check_start(value: Any, place: str) -> bool:
    """Whether what the adapter began with left its base as it was."""
    if value in _PLAIN_STARTS or value is None:
        return True
    name = str(value).lower()
    if name in _REPEATED_STARTS:
        return False
    start = "pissa_niter" if name.startswith("pissa_niter") else name
    raise _refused(place, "init_lora_weights", value, _OTHER_STARTS.get(start, "is not known here"))


def _refused(place: str, key: str, value: Any, why: str) -> ManifestError:
    return ManifestError(
        f"The adapter at '{place}' has {key}: {value!r} in its adapter_config.json, which {why}. Merge it into its "
        "base with the program that made it, and give the merged model."
    )
