"""Tensor parallelism: every rank computes its part of each layer, on the same tokens.

A model of transformers is divided from outside. Its parameters become DTensors, so that checkpoints know what they are
parts of; while a module runs, it sees this rank's parts as plain tensors, and works on fewer heads, columns or experts
without knowing. What it takes in and gives out passes through the few collectives below. Which module is divided in
which way is a plan: transformers' own for the architecture, in its words, or ours where it has none.

- ``colwise`` then ``rowwise`` (Shoeybi et al., 2019): output columns, then input columns; one sum over ranks.
- ``colwise_gather_output`` then ``rowwise_split_input``: the same where the columns of several matrices lie in one and
  what is between cannot run on a part: weights and products are divided, the rest is not.
- experts: each rank has some of them whole, and runs those of its tokens that go there; one sum over ranks.
- the vocabulary: each rank has some rows of the embedding and of the head (:class:`VocabularyPart`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from postlude.manifest.problem import ManifestError
from postlude.model.anatomy import decoder_of, name_of
from postlude.model.mesh import Mesh

GPT_OSS = {
    "layers.*.self_attn": "heads",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.experts": "experts",
}
"""The attention module itself holds a sink for each head."""

OUR_PLANS: Mapping[str, Mapping[str, str]] = {"gpt_oss": GPT_OSS}
"""Plans by architecture, relative to the decoder, where transformers has none."""

_EXPERTS = {"moe_tp_experts", "ep_dispatch_experts", "experts"}
_PARTS_OF_EXPERTS = {"packed_colwise", "grouped_gemm", "rowwise", "colwise"}


# --- collectives that autograd knows ------------------------------------------------------------------------


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dimension: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dimension, ctx.group = dimension, group
        return _gather(value, dimension, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _own(gradient, ctx.dimension, ctx.group), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dimension: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dimension, ctx.group = dimension, group
        return _own(value, dimension, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradient, ctx.dimension, ctx.group), None, None


def _sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gather(value: Tensor, dimension: int, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts, dimension)


def _own(value: Tensor, dimension: int, group: dist.ProcessGroup) -> Tensor:
    return value.chunk(group.size(), dimension)[group.rank()].contiguous()


def enter(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The value, equal on all ranks, where ranks begin to differ: its gradient is the sum of theirs."""
    return _Enter.apply(value, group)


def leave(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, where they are alike again: its gradient is that of each."""
    return _Leave.apply(value, group)


def gather(value: Tensor, dimension: int, group: dist.ProcessGroup) -> Tensor:
    """All ranks' parts in order, where they are alike again."""
    return _Gather.apply(value, dimension, group)


def split(value: Tensor, dimension: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of a value that is equal on all."""
    return _Split.apply(value, dimension, group)


# --- modules that run on parts ------------------------------------------------------------------------------


class Divided:
    """The forward pass of one module that holds parameters of its own, on this rank's parts of them."""

    partial = False
    """Whether parameters that are whole meet values that differ between ranks, so that their gradients are parts."""
    dimensions: Mapping[str, int] = {}
    """Along which dimension parameters are divided, by their names."""
    dimension_of_others: int | None = None
    """Along which those are that are not named; None where they are whole on every rank."""

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        self.module, self.mesh, self.group = module, mesh, mesh.tensor_group
        self.original: Callable[..., Any] = module.forward

    def place(self) -> None:
        """Turn the parameters into DTensors, and run the module on their parts from now on."""
        for name, parameter in self.module.named_parameters(recurse=False):
            dimension = self.dimensions.get(name, self.dimension_of_others)
            placement = Replicate() if dimension is None else Shard(dimension)
            divided = distribute_tensor(parameter.data, self.mesh.tensor, [placement], src_data_rank=None)
            self.module._parameters[name] = nn.Parameter(divided, requires_grad=parameter.requires_grad)
        self.module.forward = self.forward

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.run(self.original, *arguments, **named)

    def run(self, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call the module's own forward pass on this rank's parts of its parameters."""
        whole = self.module._parameters
        parts = {name: self.part(parameter) for name, parameter in whole.items()}
        self.module._parameters = parts  # type: ignore[assignment]
        try:
            return original(*arguments, **named)
        finally:
            self.module._parameters = whole

    def part(self, parameter: Tensor | None) -> Tensor | None:
        """This rank's part of a parameter, as a plain tensor that autograd follows."""
        if parameter is None:
            return None
        own = local(parameter)
        whole = isinstance(parameter, DTensor) and not any(p.is_shard() for p in parameter.placements)
        return enter(own, self.group) if self.partial and whole else own


class Columns(Divided):
    """A linear layer that makes some of its output columns on each rank."""

    gathers = False

    dimensions = {"weight": 0, "bias": 0}

    def forward(self, value: Tensor) -> Tensor:
        output = self.run(self.original, enter(value, self.group))
        return gather(output, -1, self.group) if self.gathers else output


class GatheredColumns(Columns):
    gathers = True


class Rows(Divided):
    """A linear layer that takes some of its input columns on each rank. The bias is added once, to the sum."""

    splits = False

    dimensions = {"weight": 1}

    def forward(self, value: Tensor) -> Tensor:
        bias = self.module._parameters.get("bias")
        return leave(self.run(self._without_bias, value), self.group) + (0 if bias is None else local(bias))

    def _without_bias(self, value: Tensor) -> Tensor:
        parts: Any = self.module._parameters
        return nn.functional.linear(split(value, -1, self.group) if self.splits else value, parts["weight"])


class SplitRows(Rows):
    splits = True


class Heads(Divided):
    """A module whose parameters have one entry for each head, and that works on some heads on each rank."""

    dimension_of_others = 0


class OfEachHead(Divided):
    """A module whose parameters serve every head, and that works on some heads on each rank: a norm of queries."""

    partial = True


class Experts(Divided):
    """Experts as 3-D parameters, [experts, ...]: some of them whole on each rank.

    Takes [tokens, hidden], the chosen experts [tokens, k] and their weights [tokens, k], as transformers' experts do.
    Only the tokens that go to an expert of this rank are computed here.
    """

    dimension_of_others = 0

    def place(self) -> None:
        super().place()
        experts: Any = self.module
        self.here: int = experts.num_experts // self.group.size()
        experts.num_experts = self.here

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        hidden, weights = enter(hidden, self.group), enter(weights, self.group)
        first = self.group.rank() * self.here
        token, choice = ((chosen >= first) & (chosen < first + self.here)).nonzero(as_tuple=True)
        # One more, of weight zero, so that there is something to run on and every parameter has a gradient.
        token, choice = nn.functional.pad(token, (0, 1)), nn.functional.pad(choice, (0, 1))
        weight = weights[token, choice] * (torch.arange(len(token), device=token.device) < len(token) - 1)
        expert = (chosen[token, choice] - first).clamp(0, self.here - 1)
        made = self.run(self.original, hidden[token], expert[:, None], weight[:, None])
        return leave(torch.zeros_like(hidden).index_add(0, token, made.to(hidden.dtype)), self.group)


class EmbeddingRows(Divided):
    """An embedding with some of its rows on each rank."""

    dimensions = {"weight": 0}

    def place(self) -> None:
        super().place()
        rows = len(local(self.module.weight))  # type: ignore[arg-type]
        self.first = self.group.rank() * rows
        self.rows = rows
        padding: Any = self.module.padding_idx
        if padding is not None:
            own = self.first <= padding < self.first + rows
            self.module.padding_idx = padding - self.first if own else None  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        here = (tokens >= self.first) & (tokens < self.first + self.rows)
        embedded = self.run(self.original, torch.where(here, tokens - self.first, 0))
        return leave(embedded.masked_fill(~here.unsqueeze(-1), 0), self.group)


_ADAPTED = re.compile(r"(?P<path>.*)\.(?P<part>base_layer|lora_A|lora_B|lora_magnitude_vector)(\.default)?")
"""A module inside of a layer that PEFT has adapted."""

_KINDS: Mapping[str, type[Divided]] = {
    "colwise": Columns,
    "rowwise": Rows,
    "colwise_gather_output": GatheredColumns,
    "rowwise_split_input": SplitRows,
    "replicated_with_grad_allreduce": OfEachHead,
    "heads": Heads,
    **dict.fromkeys(_EXPERTS, Experts),
}


# --- plans --------------------------------------------------------------------------------------------------


def plan_of(causal: PreTrainedModel) -> dict[str, str] | None:
    """How each module of the decoder is divided, by a pattern of its path; None for an architecture without a plan."""
    config = causal.config.get_text_config()
    plan: dict[str, str] = dict(OUR_PLANS.get(config.model_type) or getattr(config, "base_model_tp_plan", None) or {})
    experts = [pattern for pattern, style in plan.items() if style in _EXPERTS]
    # Experts are divided whole: the plan for what is inside of them is not needed.
    plan = {
        pattern: style
        for pattern, style in plan.items()
        if not any(pattern.startswith(f"{expert}.") and style in _PARTS_OF_EXPERTS for expert in experts)
    }
    return plan if plan and set(plan.values()) <= set(_KINDS) else None


def divide(causal: PreTrainedModel, mesh: Mesh) -> None:
    """Divide a model among the ranks of the mesh's tensor dimension, in place; parameters may be on the meta device.

    ManifestError if there is no plan for the architecture, or if something does not divide.
    """
    check_divides(causal, mesh.shape.tensor)
    embedding: Any = causal.get_input_embeddings()
    head: Any = causal.get_output_embeddings()
    tied = head.weight is embedding.weight
    for module, kind in _kinds(causal).values():
        kind(module, mesh).place()
    if tied:
        head._parameters["weight"] = embedding._parameters["weight"]


def check_divides(causal: PreTrainedModel, tensor: int) -> None:
    """ManifestError if a model, which may be on the meta device, cannot be divided among so many ranks."""
    kinds = _kinds(causal)
    config = causal.config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if heads and heads % tensor:
            raise ManifestError(_does_not_divide(tensor, f"the model's {key} ({heads})"))
    for name, (module, kind) in kinds.items():
        for parameter, value in module.named_parameters(recurse=False):
            dimension = kind.dimensions.get(parameter, kind.dimension_of_others)
            if dimension is not None and value.shape[dimension] % tensor:
                size = value.shape[dimension]
                raise ManifestError(_does_not_divide(tensor, f"'{name}.{parameter}' ({size} in dimension {dimension})"))
    rows = len(causal.get_input_embeddings().weight)  # type: ignore[arg-type]
    if rows // tensor * (tensor - 1) >= config.vocab_size:
        raise ManifestError(
            _does_not_divide(tensor, f"the vocabulary ({config.vocab_size} tokens) so that each rank has some of it")
        )


def _kinds(causal: PreTrainedModel) -> dict[str, tuple[nn.Module, type[Divided]]]:
    """The modules that hold parameters of their own, by name, and how each is divided."""
    plan = plan_of(causal)
    if plan is None:
        raise ManifestError(
            f"The architecture '{name_of(causal)}' has no plan for tensor parallelism, neither from transformers nor "
            "here. Set parallel.tensor to 1: 'parallel: {shard: true}' divides its weights among the workers all the "
            "same."
        )
    decoder = decoder_of(causal)
    prefix = next(f"{name}." for name, module in causal.named_modules() if module is decoder)
    patterns = [
        (re.compile(re.escape(prefix + path).replace(r"\*", r"\d+")), _KINDS[style]) for path, style in plan.items()
    ]
    layers: dict[str, tuple[nn.Module, type[Divided]]] = {}
    for name, module in causal.named_modules():
        if next(module.named_parameters(recurse=False), None) is None:
            continue
        adapted = _ADAPTED.fullmatch(name)
        path, part = (adapted["path"], adapted["part"]) if adapted else (name, "base_layer")
        if module is causal.get_input_embeddings():
            kind: type[Divided] = EmbeddingRows
        elif module is causal.get_output_embeddings():
            kind = GatheredColumns
        else:
            kind = next((kind for pattern, kind in patterns if pattern.fullmatch(path)), Divided)
        if part == "lora_magnitude_vector":
            raise ManifestError(
                "adapter.dora needs whole rows of the weights, which parallel.tensor divides. Set parallel.tensor to 1."
            )
        # Of an adapter that matrix is divided which meets the divided side of its base.
        if (part == "lora_A" and not issubclass(kind, Rows)) or (part == "lora_B" and not issubclass(kind, Columns)):
            kind = Divided
        layers[name] = (module, kind)
    return layers


def _does_not_divide(tensor: int, what: str) -> str:
    return f"parallel.tensor ({tensor}) does not divide {what}. Choose a divisor of it."


# --- the vocabulary of the head -----------------------------------------------------------------------------


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter that may be divided, as a plain tensor that autograd follows."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@dataclass(frozen=True)
class VocabularyPart:
    """Which rows of the head are this rank's, of those that a group of ranks has together."""

    group: dist.ProcessGroup
    first: int
    """The token of its first row."""
