"""The negative log-likelihood over packed batches: its normalisers, its split, its losses by example."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postlude.data.batch import PackedBatch, collate
from postlude.data.document import Document, Unit
from postlude.manifest.component import lookup
from postlude.objectives.head import FusedHead
from postlude.objectives.objective import Objective

VOCABULARY, HIDDEN = 11, 4


@dataclass
class TinyStep:
    """A step whose hidden states are a table's rows, so that a document's loss depends on nothing but itself."""

    batch: PackedBatch
    normalizers: dict[str, float]
    table: Tensor
    weight: Tensor
    statistics = {}

    def hidden(self, model: str = "policy") -> Tensor:
        return self.table[self.batch.tokens] * (1 + self.batch.positions).unsqueeze(1)

    def head(self, name: str, model: str = "policy") -> FusedHead:
        assert (name, model) == ("lm", "policy")
        return FusedHead(self.weight)


@st.composite
def documents(draw):
    length = draw(st.integers(1, 6))
    tokens = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=length, max_size=length))
    weight = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.0]), min_size=length, max_size=length))
    return Document("s:x", "s", np.array(tokens), {"weight": np.array(weight, np.float32)})


def run(objective: Objective, micro_batches: list[PackedBatch]) -> tuple[float, list[Tensor], list[Tensor]]:
    """Loss, gradients, and losses with token counts by document, of a step as the trainer runs it."""
    random = torch.Generator().manual_seed(1)
    table, weight = (torch.randn(VOCABULARY, HIDDEN, generator=random).requires_grad_() for _ in range(2))
    counts = [objective.count(batch) for batch in micro_batches]
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}
    outcomes = [objective(TinyStep(batch, totals, table, weight)) for batch in micro_batches]
    for outcome in outcomes:
        outcome.loss.backward()
    examples = [torch.stack([o.example_loss.double(), o.example_tokens.double()], 1) for o in outcomes]
    return float(sum(float(o.loss.detach()) for o in outcomes)), [table.grad, weight.grad], examples


def expected_loss(batch: PackedBatch, normalize: str) -> tuple[float, list[tuple[float, int]]]:
    """The loss read off the formula, one document and one token at a time."""
    random = torch.Generator().manual_seed(1)
    table, weight = (torch.randn(VOCABULARY, HIDDEN, generator=random).double() for _ in range(2))
    start, sums, by_example = 0, [], []
    for length in batch.lengths[: batch.documents].tolist():
        above = below = alone = trained = 0.0
        for t in range(1, length):
            w = float(batch.weight[start + t])
            logits = weight @ (table[batch.tokens[start + t - 1]] * t)
            nll = float(torch.logsumexp(logits, 0) - logits[batch.tokens[start + t]])
            above, below = above + w * nll, below + w
            alone, trained = alone + nll * (w > 0), trained + (w > 0)
        by_example.append((alone, int(trained)))
        if below:
            sums.append((above, below))
        start += length
    if not sums:
        return 0.0, by_example
    if normalize == "token":
        return sum(a for a, _ in sums) / sum(b for _, b in sums), by_example
    return sum(a / b for a, b in sums) / len(sums), by_example


@pytest.mark.capability("A loss that does not depend on how a step is split")
@settings(max_examples=40, deadline=None)
@given(
    st.lists(documents(), min_size=1, max_size=6),
    st.sampled_from(["token", "document"]),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_the_loss_is_the_formula_however_the_step_is_split(several, normalize, parts, extra):
    objective = lookup("objectives", "nll").model_validate({"normalize": normalize}).build()
    units = [Unit((document,)) for document in several]
    whole = collate([tuple(units)], pad_to=sum(map(len, units)) + extra)
    loss, gradients, examples = run(objective, [whole])
    expected, by_example = expected_loss(whole, normalize)
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(examples[0], torch.tensor(by_example).double(), rtol=1e-4, atol=1e-5)

    split = [collate([tuple(units[i::parts])]) for i in range(parts)]  # some of them may hold nothing
    loss_of_parts, gradients_of_parts, examples_of_parts = run(objective, split)
    assert loss_of_parts == pytest.approx(loss, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradients_of_parts, gradients, rtol=1e-4, atol=1e-5)
    for i in range(parts):
        torch.testing.assert_close(examples_of_parts[i], examples[0][i::parts], rtol=1e-5, atol=1e-5)


def test_a_step_with_nothing_trained_has_no_loss_and_a_gradient_of_zero():
    for normalize in ("token", "document"):
        objective = lookup("objectives", "nll").model_validate({"normalize": normalize}).build()
        loss, gradients, examples = run(objective, [collate([])])
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients)
        assert examples[0].shape == (0, 2)


def test_the_manifest_can_check_the_loss_without_torch():
    code = "import sys, postlude.objectives.nll; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
