"""What a layer keeps for the backward pass, where not all of it is kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from postlude.model import kernels  # noqa: F401  (defines the operator of document attention)

KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.postlude.document_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}
"""Matrix products and attention: most of a layer's time, and a small part of what it would keep. Norms, activations,
rotations and sums are computed again, and so are the grouped products of experts, whose results transformers changes in
place."""


def _policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_arguments(kind: str) -> dict[str, Any]:
    """What ``torch.utils.checkpoint`` is told: ``layer`` keeps a layer's input, ``selective`` what is dear, too."""
    if kind == "layer":
        return {"use_reentrant": False}
    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, _policy)}
