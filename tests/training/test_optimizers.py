"""Optimisers: every parameter belongs to one group, decay spares vectors, Muon keeps to the matrices in the layers."""

from __future__ import annotations

import pytest
import torch
import transformers

from postlude.manifest.component import lookup


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.capability("Optimisers: AdamW (fused), Muon, SGD")
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_each_parameter_is_in_one_group_and_decay_spares_vectors(name: str, model: torch.nn.Module) -> None:
    component = lookup("optimizers", name)(lr=1e-3, weight_decay=0.1)
    optimizers = component.build(list(model.named_parameters()))
    members = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        vectors = all(parameter.ndim < 2 for parameter in group["params"])
        assert component.decay(group["role"]) == (0.0 if vectors else 0.1)


def test_muon_takes_the_matrices_inside_the_layers_only(model: torch.nn.Module) -> None:
    optimizers = lookup("optimizers", "muon")(lr=1e-3).build(list(model.named_parameters()))
    muon = next(optimizer for optimizer in optimizers if isinstance(optimizer, torch.optim.Muon))
    taken = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    named = {name for name, parameter in model.named_parameters() if id(parameter) in taken}
    assert named == {name for name, p in model.named_parameters() if "layers." in name and p.ndim == 2}


def test_rates_of_both_parts_of_muon_can_differ() -> None:
    component = lookup("optimizers", "muon")(lr=2e-2, adamw_lr=3e-4)
    assert (component.rate("orthogonal"), component.rate("matrices"), component.rate("vectors")) == (2e-2, 3e-4, 3e-4)
