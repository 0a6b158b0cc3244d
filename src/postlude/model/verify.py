"""Whether a model computes on packed documents what it computes on each of them alone, and holds what it should.

The reference is transformers' own forward pass with its own attention and its own head, one document at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.text import Text
from torch import Tensor

from postlude.data.batch import collate
from postlude.data.document import Document, Unit
from postlude.model.anatomy import name_of, plain_logits
from postlude.model.language_model import LanguageModel
from postlude.model.verify_source import Comparison
from postlude.telemetry.screen import Listing

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""The largest difference between two orders of the same sums, relative to the largest logit, by dtype."""

SHOWN = 12
"""Faults of a kind that are printed."""
LENGTHS = (1, 2, 3, 17, 40, 64, 129, 200)


@dataclass(frozen=True)
class DocumentErrors:
    """How far one document's logits are apart."""

    tokens: int
    max_absolute_error: float
    max_relative_error: float
    """The above over the largest logit."""


@dataclass(frozen=True)
class Verification:
    """Packed logits against plain ones."""

    architecture: str
    dtype: str
    device: str
    tolerance: float
    """On the relative error."""
    documents: tuple[DocumentErrors, ...]
    """None where the model cannot be loaded, which is a fault in the comparison with its source."""
    source: Comparison = field(default_factory=Comparison)

    @property
    def same(self) -> bool:
        return not self.source.faults and self.same_logits

    @property
    def same_logits(self) -> bool:
        return all(document.max_relative_error <= self.tolerance for document in self.documents)

    @property
    def exit_code(self) -> int:
        """0 if the logits are the same, 1 if they differ."""
        return 0 if self.same else 1

    def to_json(self) -> dict[str, Any]:
        return {"same": self.same, **asdict(self), "documents": [asdict(document) for document in self.documents]}

    def render(self) -> Group:
        verdict = "the same" if self.same_logits else "NOT the same"
        listing = Listing(
            f"{self.architecture}, {self.dtype} on {self.device}: packed logits are {verdict} as plain ones, "
            f"with a tolerance of {self.tolerance:g} of the largest logit",
            {"tokens": "number", "absolute error": "number", "relative error": "number", "": "whole"},
        )
        for document in self.documents:
            listing.add_row(
                str(document.tokens),
                f"{document.max_absolute_error:.2e}",
                f"{document.max_relative_error:.2e}",
                "" if document.max_relative_error <= self.tolerance else "differs",
            )
        source = self.source
        lines = [Text(f"Compared with {place}.") for place in source.compared_with]
        lines += [Text(f"Not compared: {why.rstrip('.')}.") for why in source.not_compared]
        for kind, names in source.faults.items():
            more = f" and {len(names) - SHOWN} more (--json lists all)" if len(names) > SHOWN else ""
            lines.append(Text(f"NOT as its source, {kind}: {', '.join(names[:SHOWN])}{more}", "red"))
        if source.compared_with and not source.faults:
            lines.append(Text("It holds what it must."))
        for line in lines:
            line.overflow = "fold"
        return Group(*([listing] if self.documents else []), *lines)


@torch.no_grad()
def verify(model: LanguageModel, documents: Sequence[Sequence[int]] | None = None, seed: int = 0) -> Verification:
    """Compare a model's logits on documents packed together with its plain forward pass on each alone.

    ``documents`` are token ids; without them random ones are drawn, long enough to pass a sliding window.
    """
    rows = [np.asarray(ids, dtype=np.int64) for ids in documents] if documents else list(_random(model, seed))
    units = [(Unit((Document(f"verify:{i}", "verify", ids),)),) for i, ids in enumerate(rows)]
    batch = collate(units).to(model.device)
    training = model.training
    model.eval()
    try:
        packed = model.hidden(batch).split(batch.lengths.tolist())
        with model.plain():
            errors = [
                _errors(model.logits(hidden), model(plain_logits, ids[None])[0, :, : model.vocabulary])
                for hidden, ids in zip(packed, batch.tokens.split(batch.lengths.tolist()), strict=True)
            ]
    finally:
        model.train(training)
        model.release()
    dtype = packed[0].dtype
    return Verification(
        architecture=name_of(model.causal),
        dtype=str(dtype).removeprefix("torch."),
        device=str(model.device),
        tolerance=TOLERANCE[dtype],
        documents=tuple(errors),
    )


def _random(model: LanguageModel, seed: int) -> Iterator[np.ndarray]:
    windows = [layer.window for layer in model.anatomy.layers if layer.window is not None]
    lengths = [*LENGTHS, *(min(window + 40, 2048) for window in set(windows))]
    limit = model.anatomy.longest_document
    generator = np.random.default_rng(seed)
    for length in generator.permutation(lengths):
        yield generator.integers(0, model.vocabulary, min(length, limit or length))


def _errors(packed: Tensor, plain: Tensor) -> DocumentErrors:
    absolute = float((packed.float() - plain.float()).abs().max())
    return DocumentErrors(len(packed), absolute, absolute / max(float(plain.float().abs().max()), 1e-12))
