"""How much memory one worker will need, found out without weights, without a device, and without running anything.

What a forward pass keeps for the backward pass is not estimated by a formula for each architecture: the model is run on
tensors that have shapes and no memory, and what autograd would keep is counted. The rest is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from postlude.manifest.adapter import Adapter
from postlude.manifest.compute import Shape
from postlude.model import anatomy, attention, quantized, recompute, sharded, vocabulary
from postlude.model.adapters.inject import inject, new_config
from postlude.model.anatomy import linear_layers
from postlude.model.attention import Documents
from postlude.model.places import is_adapter_part

MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """What of a stage decides how much memory a worker needs."""

    tokens: int
    """Of one micro-batch."""
    recompute: str = "none"
    adapter: Adapter | None = None
    shape: Shape | None = None
    """How ranks hold the model together; None where each has all of it."""
    states_per_parameter: int = 2
    """Numbers that the optimiser keeps for each trained one."""
    computed: torch.dtype = torch.float32
    """What products are computed in."""
    stored: torch.dtype = torch.float32
    frozen_models: int = 0
    """Models of the same size that are only run forward."""
    saves_beside_training: bool = False
    """Whether checkpoints are written while training goes on: what they hold is copied first."""
    head_chunk_bytes: int = 192 * MIB
    device_is_host: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker."""

    parameters: int
    trained: int
    base_bytes: int
    """Of the interpreter with everything that it imports; where the model is on a GPU, none."""
    weights_bytes: int
    gathered_bytes: int
    """Of weights that are sharded, those that are whole for a moment, with their gradients."""
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    """What the forward pass keeps, and the gradients of the layer that is worked on."""
    head_bytes: int
    """One chunk of logits, and what is made of it."""
    checkpoint_bytes: int
    """The copy that is written in the background."""

    @property
    def peak_bytes(self) -> int:
        """The most at one time: in a step, or in the optimiser's update while a checkpoint is written."""
        always = self.base_bytes + self.weights_bytes + self.optimizer_bytes + self.checkpoint_bytes
        return always + self.gradients_bytes + self.gathered_bytes + self.activations_bytes + self.head_bytes

    def to_json(self) -> dict[str, int]:
        return {**vars(self), "peak_bytes": self.peak_bytes}


class _Products(TorchDispatchMode):
    """Tells the size of what operators give whose results are kept although the rest is computed again."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operator(*arguments, **(named or {}))
        if operator in recompute.KEPT:
            self.tell(sum(tensor.nbytes for tensor in tree_leaves(result) if isinstance(tensor, Tensor)))
        return result


@dataclass(frozen=True)
class Kept:
    """What a forward pass keeps for the backward pass, in bytes; with recomputation ``outside`` is all of it, and
    ``layers`` what there is of a layer while it is computed again."""

    layers: tuple[int, ...]
    outside: int
    largest: int
    """The largest tensor of a layer."""


def plan(config: PreTrainedConfig, setting: Setting, base_bytes: int = 0) -> MemoryPlan:
    """The memory of one worker. Nothing is allocated."""
    causal = sharded.on_meta(config)
    padding = -sum(parameter.numel() for parameter in causal.parameters())
    vocabulary.pad(causal)
    padding += sum(parameter.numel() for parameter in causal.parameters())
    linear_shapes = [
        tuple(causal.get_submodule(path).weight.shape)  # type: ignore[arg-type]
        for paths in linear_layers(causal).values()
        for path in paths
    ]
    adapted: list[str] = []
    if setting.adapter is not None:
        adapted = inject(causal, new_config(setting.adapter, causal))
    with _unreal(causal):
        sizes = {name: parameter.numel() for name, parameter in causal.named_parameters()}
        own = {name for name in sizes if not adapted or is_adapter_part(name)}
        outside = _outside_layers(causal)
        kept = _kept(causal, setting)
    trained = sum(sizes[name] for name in own)
    frozen_width = setting.stored.itemsize if adapted and setting.stored == setting.computed else 4
    weights = 4 * trained + frozen_width * (sum(sizes.values()) - trained)
    unpacked = 0
    if setting.adapter is not None and setting.adapter.base is not None:
        for of_one in linear_shapes:
            weights += quantized.packed_bytes(of_one, setting.adapter.base) - frozen_width * math.prod(of_one)
        unpacked = 2 * frozen_width * max(map(math.prod, linear_shapes))
    copies = setting.frozen_models if setting.adapter is None else 0
    weights += copies * 4 * sum(sizes.values())
    shape = setting.shape or Shape()
    parts, tensor = (shape.shards * shape.tensor, shape.tensor) if setting.shape else (1, 1)
    gathered = 0
    if setting.shape and shape.data > 1:
        layers = max(1, len(kept.layers))
        a_layer = (sum(sizes.values()) - sum(sizes[name] for name in outside)) // layers
        whole = 4 * (2 * a_layer + sum(sizes[name] for name in outside)) // tensor
        gathered = whole * (2 if not adapted else 1)
    rows, hidden = setting.tokens, config.get_text_config().hidden_size
    columns = vocabulary.padded_size(config.get_text_config().vocab_size) // tensor
    head = min(setting.head_chunk_bytes, 4 * rows * columns) + 4 * rows * hidden
    if tensor > 1 and not adapted:
        head += 4 * columns * hidden  # of a part of the rows the gradient is made apart, and added then
    return MemoryPlan(
        parameters=sum(sizes.values()) - padding,
        trained=trained if adapted else trained - padding,
        base_bytes=base_bytes,
        weights_bytes=weights // parts,
        gathered_bytes=gathered,
        gradients_bytes=4 * trained // parts,
        optimizer_bytes=4 * setting.states_per_parameter * trained // parts,
        activations_bytes=_activations(kept, setting) // tensor + unpacked,
        head_bytes=head,
        checkpoint_bytes=4 * (1 + setting.states_per_parameter) * trained // parts
        if setting.saves_beside_training and setting.device_is_host
        else 0,
    )


def _activations(kept: Kept, setting: Setting) -> int:
    """While a layer's gradients are made, it has some of the size of its largest tensor beside what it kept."""
    beside = 3 * kept.largest
    if setting.recompute != "none":
        return kept.outside + max(kept.layers, default=0) + beside
    return kept.outside + sum(kept.layers) + beside


@contextmanager
def _unreal(causal: Any) -> Iterator[None]:
    """While this is open, a model from the meta device runs on tensors that say they are on the CPU, and have no
    memory."""
    causal.set_attn_implementation(attention.NAME)
    causal.train()
    tied = causal.get_output_embeddings().weight is causal.get_input_embeddings().weight
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        for module in causal.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, device="cpu")
                    module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            if any(p is not None and p.ndim == 3 for p in module._parameters.values()):
                module.forward = _one_for_all(module)
        if tied:
            causal.get_output_embeddings()._parameters["weight"] = causal.get_input_embeddings()._parameters["weight"]
        yield


def _one_for_all(experts: Any) -> Any:
    """A forward pass of experts that keeps as much as theirs does but asks for no value: all tokens go to the first."""

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        rows = hidden.repeat_interleave(chosen.shape[-1], 0)
        up, down = experts.gate_up_proj[0], experts.down_proj[0]
        gate, value = (rows @ (up if len(up) == rows.shape[1] else up.T)).chunk(2, -1)
        made = nn.functional.silu(gate) * value
        made = (made @ (down if len(down) == made.shape[1] else down.T)) * weights.reshape(-1, 1)
        return made.view(*chosen.shape, -1).sum(1)

    return forward


def _outside_layers(causal: nn.Module) -> set[str]:
    """The names of the parameters that are in no layer."""
    layers = [name for name, module in causal.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = tuple(f"{name}." for name in layers)
    return {name for name, _ in causal.named_parameters() if not name.startswith(inside)}


def _kept(causal: Any, setting: Setting) -> Kept:
    """Run one micro-batch forward and count what autograd keeps, each storage once, parameters apart."""
    layers = [module for module in causal.modules() if isinstance(module, GradientCheckpointingLayer)]
    counted: dict[Any, int] = {parameter.untyped_storage()._cdata: 0 for parameter in causal.parameters()}
    alive: list[Tensor] = []  # so that no two storages have one address
    totals = {"outside": 0, "largest": 0}
    of_layers: list[int] = []
    inside = False

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in counted:
            size = tensor.untyped_storage().nbytes()
            counted[key] = size
            alive.append(tensor)
            if inside:
                of_layers[-1] += size
                totals["largest"] = max(totals["largest"], size)
            else:
                totals["outside"] += size
        return tensor

    def begin(module: nn.Module, arguments: Any) -> None:
        nonlocal inside
        inside = True
        of_layers.append(0)
        for value in arguments:
            if setting.recompute != "none" and isinstance(value, Tensor):
                totals["outside"] += value.untyped_storage().nbytes()

    def end(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal inside
        inside = False

    def product(size: int) -> None:
        if inside:
            totals["outside"] += size

    handles = [layer.register_forward_pre_hook(begin) for layer in layers]
    handles += [layer.register_forward_hook(end) for layer in layers]
    tokens = torch.zeros(setting.tokens, dtype=torch.int64)
    lengths = torch.tensor([setting.tokens], dtype=torch.int32)
    low = setting.computed != torch.float32
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=setting.computed, enabled=low),
            _Products(product) if setting.recompute == "selective" else nullcontext(),
        ):
            documents = Documents.of(lengths, tokens.device)
            hidden = anatomy.run(causal, tokens, tokens, documents)
    finally:
        for handle in handles:
            handle.remove()
    totals["outside"] += hidden.untyped_storage().nbytes()
    return Kept(tuple(of_layers), totals["outside"], totals["largest"])


def what_fits(config: PreTrainedConfig, setting: Setting, workers: int, limit: int, base_bytes: int) -> list[str]:
    """Changes of one setting each that bring the peak below a limit, that which costs least first, with the peak."""
    halves = setting.tokens // 2
    changes: list[tuple[str, Setting]] = []
    if setting.recompute == "none":
        changes.append(("recompute: layer", replace(setting, recompute="layer")))
    if setting.shape is None and workers > 1:
        changes.append(("parallel: {shard: true}", replace(setting, shape=Shape(1, workers, 1))))
    while halves >= 256:
        changes.append((f"batch: {{block: {halves}}} (and micro, if it is given)", replace(setting, tokens=halves)))
        halves //= 2
    if setting.adapter is None:
        changes.append(("adapter: {kind: lora}", replace(setting, adapter=Adapter())))
    elif setting.adapter.base is None and setting.shape is None:
        packed = setting.adapter.model_copy(update={"base": "int8"})
        changes.append(("adapter: {base: int8}", replace(setting, adapter=packed)))
    everything = replace(setting, recompute="layer", adapter=setting.adapter or Adapter())
    changes.append(("recompute: layer, with adapter: {kind: lora}", everything))
    fitting = []
    for change, other in changes:
        peak = plan(config, other, base_bytes).peak_bytes
        if peak <= limit:
            fitting.append(f"{change} (peak {peak / MIB:,.0f} MiB)")
    return fitting
