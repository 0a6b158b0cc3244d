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
    small: dict[str, Any] = {**config.to_diff_dict(), **_shortened(config)}
    architecture = small.pop("model_type")
    return ModelFrom(new=NewModel(architecture=architecture, config=small))


def _shortened(config: Any) -> dict[str, Any]:
    layers = min(2, config.num_hidden_layers)
    shortened: dict[str, Any] = {"num_hidden_layers": layers}
    if getattr(config, "layer_types", None):
        shortened["layer_types"] = config.layer_types[:layers]
    return shortened
