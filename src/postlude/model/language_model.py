"""A transformers causal LM as the trainer uses it: packed batches in, hidden states out, heads apart.

The transformers model inside is untouched but for its attention (by document) and the padding of its
vocabulary. Parallelism, adapters and precision are applied from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from postlude.data.batch import PackedBatch
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.model import anatomy, attention, vocabulary
from postlude.model.anatomy import Anatomy
from postlude.model.attention import Documents
from postlude.model.mesh import Mesh
from postlude.model.places import is_adapter_part
from postlude.model.recompute import checkpoint_arguments
from postlude.model.tensor_parallel import VocabularyPart, local

if TYPE_CHECKING:
    from postlude.model.attached import Attached


class HeadParameters(NamedTuple):
    """What the logits are made of: ``soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap)``."""

    weight: Tensor
    """[padded vocabulary, hidden]; only the first ``vocabulary`` rows are real. This rank's rows, if it has a part."""
    bias: Tensor | None
    """[padded vocabulary]."""
    vocabulary: int
    scale: float
    soft_cap: float | None
    part: VocabularyPart | None = None
    """Which rows these are, where every rank has some."""


class LanguageModel(nn.Module):
    """A causal language model over packed batches.

    ``causal`` must stand on its device with its weights loaded: the architecture is examined by running it.
    :class:`postlude.model.anatomy.UnsupportedModel` if it cannot be trained on packs. ``stored_dtype`` is that of
    the checkpoint it came from.

    A model that is held by the ranks of a ``mesh`` together comes without weights: ``prepare`` divides it and loads
    them, and what there is to know of its architecture was ``examined`` before. Every rank then calls it at the same
    time.
    """

    def __init__(
        self,
        causal: PreTrainedModel,
        stored_dtype: torch.dtype | None = None,
        mesh: Mesh | None = None,
        prepare: Callable[[LanguageModel], None] | None = None,
        examined: Anatomy | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.stored_dtype = stored_dtype
        self.mesh = mesh
        self.scalar: nn.Linear | None = None
        self.attached: Attached | None = None
        """The adapter that is trained, with the rest of the weights frozen."""
        self.compiled = False
        self.vocabulary = vocabulary.rows(causal)
        vocabulary.pad(causal)
        self.plain_implementation: str = causal.config._attn_implementation
        causal.set_attn_implementation(attention.NAME)
        if prepare is not None:
            prepare(self)
        self.anatomy = examined or anatomy.examine(causal, self.plain_implementation, self.vocabulary)

    @property
    def config(self) -> PreTrainedConfig:
        """The transformers configuration; its vocabulary is the real one."""
        return self.causal.config

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        return self.causal.device

    # --- forward --------------------------------------------------------------------------------------------

    def forward(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """``run(causal, *arguments)``: whatever runs the transformers model does it through this, so that what wraps a
        module's call (the gathering of sharded weights) applies."""
        return run(self.causal, *arguments)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The last hidden states [tokens, hidden] of a batch, after the final norm: what heads are applied to.

        DataError if a document is longer than the architecture's positions allow.
        """
        documents = Documents.of(batch.lengths, batch.tokens.device)
        self._check_lengths(batch, documents)
        if self.compiled:
            torch._dynamo.maybe_mark_dynamic(documents.lengths, 0)
            torch._dynamo.maybe_mark_dynamic(documents.offsets, 0)
        return self(anatomy.run, batch.tokens, batch.positions, documents)[0]

    def _check_lengths(self, batch: PackedBatch, documents: Documents) -> None:
        limit = self.anatomy.longest_document
        if limit is None:
            return
        real = documents.lengths[: batch.documents]
        if len(real) and int(real.max()) > limit:
            index = int(real.argmax())
            raise DataError(
                f"The document '{batch.example_ids[index]}' has {int(real[index])} tokens, but the architecture "
                f"'{anatomy.name_of(self.causal)}' knows {limit} positions at most in a packed batch. Lower "
                f"batch.block to {limit}, or choose a model with longer positions."
            )

    # --- heads ----------------------------------------------------------------------------------------------

    def lm_head_parameters(self) -> HeadParameters:
        """The parameters of the head that predicts tokens; gathered, where they are sharded, until the next backward
        pass or :meth:`release`."""
        self._gather()
        head: Any = self.causal.get_output_embeddings()
        weight, transform, part = local(head.weight), self.anatomy.transform, None
        if self.mesh is not None and self.mesh.shape.tensor > 1:
            part = VocabularyPart(self.mesh.tensor_group, self.mesh.tensor_rank * len(weight))
        bias = None if head.bias is None else local(head.bias)
        return HeadParameters(weight, bias, self.vocabulary, transform.scale, transform.soft_cap, part)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of hidden states [rows, hidden], all at once: for a few rows."""
        if self.mesh is not None:
            return self.anatomy.transform.apply(self(anatomy.products, hidden)[..., : self.vocabulary])
        weight, bias, size, *_ = self.lm_head_parameters()
        products = nn.functional.linear(hidden, weight[:size], None if bias is None else bias[:size])
        return self.anatomy.transform.apply(products)

    def add_scalar_head(self, seed: int = 0) -> None:
        """Add the trained head ``scalar``, equal on every rank, unless it is there.

        Drawn with variance 1 / (hidden + 1), after Stiennon et al. (2020), so that first values are of order one.
        """
        if self.scalar is not None:
            return
        self.scalar = nn.Linear(self.hidden_size, 1, bias=False, device=self.device)
        with torch.no_grad():
            self.scalar.weight.copy_(draw_scalar(self.hidden_size, seed))

    def head(self, name: str) -> ScalarHead:
        """The head ``scalar``, a function from [rows, hidden] to [rows]. KeyError if the model has none so named."""
        if name != "scalar" or self.scalar is None:
            raise KeyError(name)
        self._gather()
        return ScalarHead(self.scalar)

    def make_trainable(self, trained: bool) -> None:
        """Say whether the model is trained: all of it, or its adapter and the head ``scalar``."""
        for name, parameter in self.named_parameters():
            own = self.attached is None or is_adapter_part(name) or name.startswith("scalar.")
            parameter.requires_grad_(trained and own)

    def freeze_heads_except(self, used: Collection[str]) -> None:
        """Take the heads that no objective uses out of the training: without a gradient, an optimiser would hold no
        state for them that a checkpoint could bring back. One that is the embedding too stays."""
        if self.scalar is not None and "scalar" not in used:
            self.scalar.requires_grad_(False)
        head: nn.Module = self.causal.get_output_embeddings()
        if "lm" not in used and head.weight is not self.causal.get_input_embeddings().weight:
            head.requires_grad_(False)

    # --- sharded weights ------------------------------------------------------------------------------------

    def _gather(self) -> None:
        if isinstance(self, FSDPModule):
            self.unshard()

    def release(self) -> None:
        """Free what was gathered of sharded weights for a pass without gradients."""
        if isinstance(self, FSDPModule):
            self.reshard()

    # --- layers ---------------------------------------------------------------------------------------------

    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers, in order. ManifestError for an architecture that does not mark them."""
        layers = [module for module in self.causal.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ManifestError(
                f"The architecture '{anatomy.name_of(self.causal)}' has no layers that can be recomputed or compiled "
                "one by one. Set 'recompute: none' and 'compile: false'."
            )
        return layers

    def recompute_layers(self, kind: str = "layer") -> None:
        """Keep only each layer's input for the backward pass (``layer``), or its products and its attention, too
        (``selective``), and compute the rest again there."""
        self.layers()
        causal = self.causal
        enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
        enable(checkpoint_arguments(kind))

    def compile_layers(self, budget: float = 1.0) -> None:
        """Compile each layer; documents are data to the compiled code, so another pack needs no other code.

        ``budget`` is the share of what would be kept for the backward pass that is kept. It holds for all that this
        process compiles from now on.
        """
        torch._functorch.config.activation_memory_budget = budget
        for layer in self.layers():
            layer.compile()
        self.compiled = True

    # --- without documents ----------------------------------------------------------------------------------

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """While this is open, the transformers model attends as transformers has it, caches and all."""
        with anatomy.plain_attention(self.causal, self.plain_implementation):
            yield self.causal


def draw_scalar(width: int, seed: int = 0) -> Tensor:
    """The random weight [1, width] that a head ``scalar`` begins with."""
    return torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / (width + 1) ** 0.5


class ScalarHead:
    """One number for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to [rows], fp32."""
        return self.linear(hidden).squeeze(-1).float()
