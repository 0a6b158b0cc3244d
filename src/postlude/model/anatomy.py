"""What an architecture does, established by running it once on a few tokens rather than by a list of names.

Two things must hold before a model is trained here. Documents in a pack must not see each other, whatever
the architecture's layers are (a linear attention or a state space carries its state across a border). And what
happens between the last hidden states and the logits must be known, because the fused head does it anew, chunk
by chunk. Both are compared with transformers' own forward pass; what differs is refused, by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from postlude.manifest.problem import ManifestError
from postlude.model import attention
from postlude.model.attention import AttentionLayer, Documents, Refused


class UnsupportedModel(ManifestError):
    """The architecture does something that packed training cannot respect."""


@dataclass(frozen=True)
class LogitTransform:
    """From hidden states to logits: ``soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap)``."""

    scale: float = 1.0
    soft_cap: float | None = None

    def apply(self, products: Tensor) -> Tensor:
        """From ``hidden @ weight.T + bias`` to logits."""
        logits = products * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


@dataclass(frozen=True)
class Anatomy:
    """What was found out about an architecture."""

    layers: tuple[AttentionLayer, ...]
    """Its attention layers, in the order they run."""
    transform: LogitTransform
    longest_document: int | None
    """Beyond so many tokens in a document the model has no position, or treats the whole pack differently."""


def name_of(causal: PreTrainedModel) -> str:
    """The architecture's name as a user would write it."""
    return causal.config.model_type


def decoder_of(causal: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that ends in hidden states: everything but the head."""
    decoder = causal.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else causal.base_model  # type: ignore[return-value]


@contextmanager
def plain_attention(causal: PreTrainedModel, implementation: str) -> Iterator[None]:
    """While this is open the model attends as transformers has it, without documents."""
    causal.set_attn_implementation(implementation)
    try:
        yield
    finally:
        causal.set_attn_implementation(attention.NAME)


def examine(causal: PreTrainedModel, implementation: str, vocabulary: int) -> Anatomy:
    """Prove that a model can be trained on packs, and learn its shape.

    ``implementation`` is transformers' own attention to compare with, ``vocabulary`` the number of real tokens.
    :class:`UnsupportedModel` if documents leak into each other or the logits cannot be explained.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (3, 6), generator=generator).to(causal.device)
    training = causal.training
    causal.eval()
    try:
        layers = _attention_layers(causal, rows[:1])
        packed = _separate(causal, rows)
        transform = _explain(causal, implementation, rows, packed, vocabulary)
    except Refused as refusal:
        raise UnsupportedModel(
            f"The architecture '{name_of(causal)}' cannot be trained on packed documents: it {refusal}. Choose a "
            "model of causal attention layers, full or with a sliding window, whose logits come from a linear head."
        ) from refusal
    finally:
        causal.train(training)
    return Anatomy(layers, transform, _longest_document(causal))


def run(causal: PreTrainedModel, tokens: Tensor, positions: Tensor, documents: Documents) -> Tensor:
    """The last hidden states [1, tokens, hidden] of a pack, after the final norm."""
    output = decoder_of(causal)(
        input_ids=tokens[None],
        position_ids=positions[None],
        attention_mask=None,
        use_cache=False,
        documents=documents,
    )
    return output.last_hidden_state


def products(causal: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What the head makes of hidden states [..., hidden] before the transform: ``hidden @ weight.T + bias``."""
    head: Any = causal.get_output_embeddings()
    return head(hidden)


def _pack(causal: PreTrainedModel, rows: Tensor) -> Tensor:
    """The hidden states [documents, tokens, hidden] of the rows [documents, tokens] laid end to end."""
    documents = Documents.of(torch.full((len(rows),), rows.shape[1]), rows.device)
    positions = torch.arange(rows.shape[1], device=rows.device).repeat(len(rows))
    try:
        return run(causal, rows.flatten(), positions, documents)[0].unflatten(0, rows.shape)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:  # one that reads its mask, for instance
        raise Refused(f"does not run on a pack ({' '.join(str(error).split())})") from error


def _attention_layers(causal: PreTrainedModel, row: Tensor) -> tuple[AttentionLayer, ...]:
    """The attention layers that run on one document, each compared with the mask it was given."""
    with torch.no_grad(), attention.observed() as layers:
        _pack(causal, row)
    expected = causal.config.get_text_config().num_hidden_layers
    if len(layers) < expected:
        raise Refused(f"sends only {len(layers)} of its {expected} layers through transformers' attention interface")
    return tuple(layers)


def _separate(causal: PreTrainedModel, rows: Tensor) -> Tensor:
    """The packed hidden states [documents, tokens, hidden], once it is proven that documents are apart.

    The gradient of one token's state with respect to the embeddings of other documents, and of later tokens, is
    exactly zero where no path leads there, however faint a leak would be in the values.
    """
    embedded: list[Tensor] = []

    def detach(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # what follows may work in place

    handle = causal.get_input_embeddings().register_forward_hook(detach)
    try:
        with torch.enable_grad():
            packed = _pack(causal, rows)
    finally:
        handle.remove()
    document, token = len(rows) // 2, rows.shape[1] // 2
    direction = torch.linspace(-1, 1, packed.shape[-1], device=packed.device, dtype=packed.dtype)
    gradients = torch.autograd.grad((packed[document, token] * direction).sum(), embedded)
    reached = torch.zeros_like(rows, dtype=torch.bool)
    for gradient in gradients:
        reached |= gradient.reshape(*rows.shape, -1).ne(0).any(-1)
    if reached[document, token + 1 :].any():
        raise Refused("looks at later tokens, so that nothing is left to predict")
    reached[document] = False
    if reached.any():
        raise Refused("carries something from one document to the next (a convolution, a state, a summary)")
    return packed.detach()


@torch.no_grad()
def _explain(
    causal: PreTrainedModel, implementation: str, rows: Tensor, packed: Tensor, vocabulary: int
) -> LogitTransform:
    """Compare packed hidden states with plain ones, and explain the plain logits. :class:`Refused` on failure."""
    if causal.get_output_embeddings() is None:
        raise Refused("has no head that predicts tokens")
    # The head is tried on large hidden states: on a model's own a soft cap may be too faint to be told.
    generator = torch.Generator().manual_seed(1)
    loud = torch.randn(packed.shape, generator=generator).to(packed)
    largest = float(products(causal, loud).abs().max())
    if not largest:
        raise Refused("has a head of zeros, which tells nothing about what becomes of its logits")
    loud *= 60.0 / largest
    seen: list[Tensor] = []

    def replace(module: nn.Module, arguments: Any, output: Any) -> Any:
        seen.append(output.last_hidden_state)
        output.last_hidden_state = loud
        return output

    handle = decoder_of(causal).register_forward_hook(replace)
    try:
        with plain_attention(causal, implementation):
            logits = plain_logits(causal, rows)[..., :vocabulary]
    finally:
        handle.remove()
    if not seen:
        raise Refused("does not compute its logits from its decoder's last hidden states")
    exact = packed.dtype in (torch.float32, torch.float64)
    if _relative_error(packed, seen[0]) > (1e-3 if exact else 5e-2):
        raise Refused("computes something else on packed documents than on each document alone")
    made = products(causal, loud)[..., :vocabulary].float()
    for transform in _candidates(causal.config.get_text_config()):
        if _relative_error(transform.apply(made), logits.float()) < (1e-4 if exact else 2e-2):
            return transform
    raise Refused("turns its last hidden states into logits in a way that is not known here")


def plain_logits(causal: PreTrainedModel, rows: Tensor) -> Tensor:
    """Logits of rows [rows, tokens] as transformers computes them."""
    return causal(input_ids=rows, use_cache=False).logits


def _candidates(config: Any) -> Iterator[LogitTransform]:
    """The logit transforms that a configuration suggests, the plainest first."""
    scales: list[float] = [1.0]
    caps: list[float | None] = [None]
    if getattr(config, "logit_scale", None):
        scales.append(float(config.logit_scale))
    if getattr(config, "logits_scaling", None):
        scales.append(1.0 / config.logits_scaling)
    if getattr(config, "final_logit_softcapping", None):
        caps.append(float(config.final_logit_softcapping))
    for scale, cap in product(scales, caps):
        yield LogitTransform(scale, cap)


def _relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _longest_document(causal: PreTrainedModel) -> int | None:
    """How long a document may be: learned positions end, and some rotary frequencies change for the whole pack."""
    config = causal.config.get_text_config()
    limits = []
    trained_length = getattr(config, "max_position_embeddings", None)
    tokens = causal.get_input_embeddings()
    for module in decoder_of(causal).modules():
        learned = isinstance(module, nn.Embedding) and module is not tokens
        if learned and trained_length and trained_length <= module.num_embeddings <= trained_length + 2:
            limits.append(trained_length)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or trained_length
            limits.append(getattr(config, "original_max_position_embeddings", None) or original)
    return min(limits, default=None)


def linear_layers(causal: PreTrainedModel) -> dict[str, list[str]]:
    """The paths of the linear layers inside the decoder layers: those in an attention, and the others."""
    groups: dict[str, list[str]] = {"attention": [], "mlp": []}
    for path, layer in causal.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for inner, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    parts = inner.split(".")
                    above = [layer.get_submodule(".".join(parts[:length])) for length in range(1, len(parts))]
                    in_attention = any("Attention" in type(module).__name__ for module in above)
                    groups["attention" if in_attention else "mlp"].append(f"{path}.{inner}")
    return groups
