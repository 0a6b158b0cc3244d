"""Small models with random weights that stand in for those of a stage, where a preflight tries it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from postlude.manifest.schema import ModelFrom, NewModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LARGEST_PARAMETERS = 300_000_000
"""A small model that is still larger than this is not run here: wide, or with a large vocabulary."""


def little_model(config: PreTrainedConfig) -> ModelFrom:
    """A new model of the same architecture, width and vocabulary with at most two layers."""
    from postlude.model.places import configuration_keys

    architecture = config.model_type
    # Some configurations write down what they do not read: a pattern that others follow from, another name for a key.
    known = configuration_keys(architecture)
    other_names = {stored: key for key, stored in config.attribute_map.items()}
    named = {key if key in known else other_names.get(key, key): v for key, v in config.to_diff_dict().items()}
    said = {key: value for key, value in named.items() if key in known}
    small: dict[str, Any] = {**said, **_shortened(config)}
    return ModelFrom(new=NewModel(architecture=architecture, config=small))


def _shortened(config: Any) -> dict[str, Any]:
    layers = min(2, config.num_hidden_layers)
    shortened: dict[str, Any] = {"num_hidden_layers": layers}
    if getattr(config, "layer_types", None):
        shortened["layer_types"] = config.layer_types[:layers]
    return shortened
