"""A base in 8 or 4 bits: the same training as on the numbers that it stands for, and nothing else kept."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

import meshes
from postlude.manifest.adapter import Adapter
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom
from postlude.model.anatomy import linear_layers
from postlude.model.attached import AdapterRequest
from postlude.model.load import load_model
from postlude.model.memory import Setting, plan
from postlude.model.quantized import QuantizedLinear, pack_weight, packed_bytes, unpack
from postlude.training.optimizers import SGD
from postlude.training.precision import LossScale, Precision
from postlude.training.program import Program, Role
from postlude.training.workers import Workers

pytestmark = pytest.mark.capability("Adapters on a base in 8 or 4 bits")
KINDS = ("int8", "nf4")
FAR = {"int8": 0.01, "nf4": 0.12}
"""How far a weight may be from what it was, in its own norm."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    meshes.write_checkpoints(folder, ("qwen2", "qwen3_moe"))
    return folder


def adapted(place, stored=torch.float32, **keys):
    asked = AdapterRequest(Adapter.model_validate({"rank": 4, **keys}), 1, lambda dtype: stored)
    model = load_model(ModelFrom(path=str(place)), str(place), None, seed=0, adapter=asked)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.make_trainable(True)
    return model


def step_of(model):
    """The loss of a step, and the gradient of every trained parameter."""
    executor = meshes.executor_of(model, Workers(), None)
    executor = replace(executor, program=Program(executor.program.objective, {"policy": Role(model, SGD())}))
    done = executor.forward_backward(meshes.batches(0, 1), LossScale(Precision("fp32", "a test")))
    return done.loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def packed_layers(model):
    return {name: module for name, module in model.causal.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("base", "targets"), [("qwen2", None), ("qwen3_moe", ["q_proj"])])
def test_loss_and_gradients_are_those_of_the_numbers_that_it_stands_for(bases, kind, base, targets) -> None:
    keys = {} if targets is None else {"targets": targets}
    packed, plain = adapted(bases / base, base=kind, **keys), adapted(bases / base, **keys)
    layers = packed_layers(packed)
    every = [path for group in linear_layers(plain.causal).values() for path in group]
    assert sorted(layers) == sorted(path for path in every if ".lora_" not in path)
    for name, layer in layers.items():
        there = plain.causal.get_submodule(name).weight
        numbers = unpack(layer.weight)
        assert 0 < (numbers - there).norm() < FAR[kind] * there.norm()
        there.data = numbers
    loss, gradients = step_of(packed)
    expected, theirs = step_of(plain)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [False, True])
def test_no_unpacked_weight_is_kept_for_the_backward_pass(kind, half) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(torch.nn.Linear(256, 128), kind, "up")
    rows = torch.randn(3, 256, requires_grad=True)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        made = layer(rows)
    assert made.dtype == (torch.bfloat16 if half else torch.float32)
    assert all(tensor.numel() < 128 * 256 for tensor in kept)
    made.float().sum().backward()
    expected = unpack(layer.weight).sum(0).expand(3, -1)
    torch.testing.assert_close(rows.grad, expected, rtol=0.02 if half else 1e-5, atol=0.05 if half else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_packed_weight_takes_as_many_bytes_as_is_said(kind, stored) -> None:
    weight = torch.randn(384, 256).to(stored)
    packed = pack_weight(weight, kind, "up")
    assert unpack(packed).dtype == stored
    parts, _ = packed.__tensor_flatten__()
    taken = sum(getattr(packed, part).nbytes for part in parts)
    assert taken == pytest.approx(packed_bytes((384, 256), kind), rel=0.01)
    assert taken < math.prod(weight.shape) * (1.05 if kind == "int8" else 0.55)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_plan_counts_a_packed_base(bases, kind) -> None:
    def size(tensor) -> int:
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        return sum(getattr(tensor, part).nbytes for part in parts) or tensor.nbytes

    model = adapted(bases / "qwen2", base=kind)
    taken = sum(size(parameter.data) for parameter in model.parameters())
    setting = Setting(tokens=64, adapter=Adapter(rank=4, base=kind))
    assert plan(model.config, setting).weights_bytes == pytest.approx(taken, rel=0.02)


def test_what_cannot_be_packed_is_told() -> None:
    with pytest.raises(ManifestError, match=r"'down' has 150 numbers.*Choose int8"):
        pack_weight(torch.randn(10, 15), "nf4", "down")


def test_without_torchao_it_is_said_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ManifestError, match=r"pip install 'postlude\[quantized\]'"):
        pack_weight(torch.randn(64, 64), "int8", "up")
