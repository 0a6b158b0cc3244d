"""The tensors of a stage that a checkpoint holds, as torch's distributed checkpoint takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from postlude.model.mesh import own_part
from postlude.training.program import Role

Optimizers = Mapping[str, list[torch.optim.Optimizer]]


def trained_state(roles: Mapping[str, Role], optimizers: Optimizers) -> dict[str, Any]:
    """What is trained of the weights and optimiser state of every role that has one, by role and parameter name.

    The tensors are the live ones: loading into them restores the model. A tied weight is held once.
    """
    state: dict[str, Any] = {}
    only_trained = StateDictOptions(ignore_frozen_params=True)
    for name, role in roles.items():
        if role.optimizer is None:
            continue
        seen: set[int] = set()
        weights = {}
        for key, tensor in get_model_state_dict(role.model, options=only_trained).items():
            if isinstance(tensor, torch.Tensor):
                place = own_part(tensor).untyped_storage().data_ptr()
                if place and place in seen:  # of a small tensor a rank may have nothing
                    continue
                seen.add(place)
            weights[key] = tensor
        state[name] = {
            "model": weights,
            "optimizer": get_optimizer_state_dict(role.model, optimizers[name]),
        }
    return state


def restore_optimizers(state: Mapping[str, Any], roles: Mapping[str, Role], optimizers: Optimizers) -> None:
    """Hand loaded optimiser state, param groups included, back to the optimisers."""
    for name, parts in state.items():
        set_optimizer_state_dict(roles[name].model, optimizers[name], optim_state_dict=parts["optimizer"])
