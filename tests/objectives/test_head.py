"""The fused head against full logits: values, gradients, precision, memory, and what it must refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from postlude.objectives import logits as arithmetic
from postlude.objectives.head import FusedHead
from postlude.objectives.logits import Limits

CAPPED = {"scale": 0.7, "soft_cap": 2.5}


def limits(rows: int, columns: int, vocabulary: int, itemsize: int = 8) -> Limits:
    """Limits that give chunks of so many rows and, for full chunks, tiles of so many columns."""
    return Limits(chunk_bytes=rows * vocabulary * itemsize, chunk_rows=rows, tile_bytes=rows * columns * itemsize)


def problem(rows=7, hidden=5, padded=13, vocabulary=11, dtype=torch.float64, seed=0, bias=True) -> SimpleNamespace:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    return SimpleNamespace(
        hidden=normal(rows, hidden),
        weight=normal(padded, hidden),
        bias=normal(padded) if bias else None,
        vocabulary=vocabulary,
        targets=torch.randint(0, vocabulary, (rows,), generator=random),
        weights=torch.randn(rows, generator=random, dtype=torch.float64).to(dtype),
    )


def plain(p: SimpleNamespace, temperature=1.0, scale=1.0, soft_cap=None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [rows], in float64, from all logits at once."""
    logits = p.hidden.double() @ p.weight[: p.vocabulary].double().t()
    if p.bias is not None:
        logits = logits + p.bias[: p.vocabulary].double()
    logits = logits * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logp = torch.log_softmax(logits / temperature, -1)
    return logp.gather(1, p.targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def gradients(loss: Tensor, p: SimpleNamespace) -> list[Tensor]:
    inputs = [p.hidden, p.weight] + ([] if p.bias is None else [p.bias])
    return [g.double() for g in torch.autograd.grad(loss, inputs)]


def relative(value: Tensor, expected: Tensor) -> float:
    return float(((value.double() - expected).norm() / expected.norm()).detach())


@pytest.fixture(params=["instructions", "none"])
def processor(request, monkeypatch):
    """A CPU that multiplies in low precision, and one that does not. The value says which."""
    able = request.param == "instructions"
    monkeypatch.setattr(arithmetic, "cpu_multiplies", lambda dtype: able or dtype == torch.float32)
    return able


# --- exactness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [{}, CAPPED])
def test_gradients_are_the_derivatives(transform):
    p = problem(rows=5, hidden=3, padded=6, vocabulary=5)
    head = dict(vocabulary=p.vocabulary, limits=limits(2, 3, p.vocabulary), **transform)

    def likelihood(hidden, weight, bias):
        return FusedHead(weight, bias, **head).negative_log_likelihood(hidden, p.targets, p.weights)[0]

    def logp(hidden, weight, bias):
        return FusedHead(weight, bias, **head).log_probabilities(hidden, p.targets, temperature=1.6)[0]

    def logp_and_entropy(hidden, weight, bias):
        return FusedHead(weight, bias, **head).log_probabilities(hidden, p.targets, temperature=0.6, entropy=True)

    for function in (likelihood, logp, logp_and_entropy):
        assert torch.autograd.gradcheck(function, (p.hidden, p.weight, p.bias))


@pytest.mark.capability("A fused language-model head that never holds all logits")
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(1, 12),
    padding=st.integers(0, 3),
    hidden=st.integers(1, 5),
    chunk=st.integers(1, 10),
    tile=st.integers(1, 13),
    transform=st.sampled_from([{}, CAPPED]),
    bias=st.booleans(),
    upstream=st.sampled_from([1.0, 0.25, -3.0]),
    seed=st.integers(0, 2**20),
)
def test_both_paths_equal_full_logits_however_they_are_cut(
    rows, vocabulary, padding, hidden, chunk, tile, transform, bias, upstream, seed
):
    p = problem(rows, hidden, vocabulary + padding, vocabulary, seed=seed, bias=bias)
    p.weights[: rows // 3] = 0
    p.targets[rows // 2 :] = vocabulary - 1
    head = FusedHead(p.weight, p.bias, vocabulary=vocabulary, limits=limits(chunk, tile, vocabulary), **transform)
    logp, entropy = plain(p, **transform)

    loss, each = head.negative_log_likelihood(p.hidden, p.targets, p.weights)
    torch.testing.assert_close(each, -logp.detach())
    torch.testing.assert_close(loss, -(p.weights * logp).sum())
    made = gradients(loss * upstream, p)
    torch.testing.assert_close(made, gradients(-(p.weights * logp).sum() * upstream, p))
    for gradient in made[1:]:
        assert not gradient[vocabulary:].any()

    logp, entropy = plain(p, temperature=1.3, **transform)
    ours = head.log_probabilities(p.hidden, p.targets, temperature=1.3, entropy=True)
    torch.testing.assert_close(ours, (logp, entropy))
    torch.testing.assert_close(head.log_probabilities(p.hidden, p.targets, temperature=1.3)[0], logp)

    def loss_of(logp, entropy):
        return (logp.exp() * p.weights).sum() - 0.3 * (entropy**2).sum()

    torch.testing.assert_close(gradients(loss_of(*ours), p), gradients(loss_of(logp, entropy), p))


def test_equal_input_gives_equal_bits():
    p = problem(rows=300, hidden=32, padded=1000, vocabulary=1000, dtype=torch.float32)

    def all_of_it():
        head = FusedHead(p.weight, p.bias, limits=limits(64, 128, 1000, 4))
        loss, each = head.negative_log_likelihood(p.hidden, p.targets, p.weights)
        logp, entropy = head.log_probabilities(p.hidden, p.targets, entropy=True)
        return [loss, each, *gradients(loss, p), logp, entropy, *gradients((logp * entropy).sum(), p)]

    assert all(torch.equal(a, b) for a, b in zip(all_of_it(), all_of_it(), strict=True))


def test_likelihoods_far_from_zero_stay_finite_and_exact():
    p = problem(dtype=torch.float32)
    with torch.no_grad():
        p.hidden *= 200
    expected, _ = plain(p)
    head = FusedHead(p.weight, p.bias, vocabulary=p.vocabulary, limits=limits(4, 2, p.vocabulary, 4))
    loss, each = head.negative_log_likelihood(p.hidden, p.targets, p.weights)
    torch.testing.assert_close(each, -expected.detach().float(), rtol=1e-5, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, p))


# --- what needs a gradient ----------------------------------------------------------------------------------


def test_a_tied_weight_gets_both_gradients():
    tokens, table = torch.tensor([1, 4, 4, 2]), torch.randn(6, 3, requires_grad=True)
    weights, targets = torch.tensor([1.0, 0.0, 2.0]), tokens[1:]

    def hidden():
        return torch.nn.functional.embedding(tokens[:-1], table).tanh()

    plain = torch.nn.functional.cross_entropy(hidden() @ table.t(), targets, reduction="none") @ weights
    expected = torch.autograd.grad(plain, table)[0]
    for upstream in (None, 1.0):
        table.grad = None
        FusedHead(table, upstream=upstream).negative_log_likelihood(hidden(), targets, weights)[0].backward()
        torch.testing.assert_close(table.grad, expected)
    logp, _ = FusedHead(table).log_probabilities(hidden(), targets)
    torch.testing.assert_close(torch.autograd.grad(-(logp @ weights), table)[0], expected)


@pytest.mark.parametrize("path", ["negative_log_likelihood", "log_probabilities"])
@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(path, trained):
    p = problem(bias=False)
    frozen = p.weight if trained == "hidden" else p.hidden
    expected = gradients(-(plain(p)[0] * p.weights).sum(), p)[0 if trained == "hidden" else 1]
    frozen.requires_grad_(False)
    head = FusedHead(p.weight, vocabulary=p.vocabulary)
    with Allocations() as seen:
        if path == "negative_log_likelihood":
            loss, _ = head.negative_log_likelihood(p.hidden, p.targets, p.weights)
        else:
            loss = -(head.log_probabilities(p.hidden, p.targets)[0] * p.weights).sum()
        loss.backward()
    assert frozen.grad is None
    assert not (frozen.shape in seen.shapes and trained == "hidden")
    torch.testing.assert_close(getattr(p, trained).grad, expected)


def test_without_gradients_there_is_no_graph_and_no_gradient_is_made():
    p = problem()
    head = FusedHead(p.weight, p.bias, vocabulary=p.vocabulary, upstream=1.0)
    with torch.no_grad(), Allocations() as seen:
        loss, _ = head.negative_log_likelihood(p.hidden, p.targets, p.weights)
        logp, _ = head.log_probabilities(p.hidden, p.targets)
    assert not loss.requires_grad
    assert not logp.requires_grad
    assert p.weight.shape not in seen.shapes
    assert p.weight.grad is None
    torch.testing.assert_close(loss, -(plain(p)[0] * p.weights).sum().detach())


@pytest.mark.parametrize("upstream", [None, 1.0])
def test_a_rank_without_rows_gives_zero_and_a_graph(upstream):
    p = problem(rows=0)
    head = FusedHead(p.weight, p.bias, vocabulary=p.vocabulary, upstream=upstream)
    loss, each = head.negative_log_likelihood(p.hidden, p.targets, p.weights)
    assert loss == 0
    assert each.shape == (0,)
    loss.backward()
    logp, entropy = head.log_probabilities(p.hidden, p.targets, entropy=True)
    (logp.sum() + entropy.sum()).backward()
    for leaf in (p.hidden, p.weight, p.bias):
        assert leaf.grad is not None
        assert not leaf.grad.any()


# --- a gradient that micro-batches share --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_with_a_promised_factor_micro_batches_share_one_gradient(dtype, factor):
    p = problem(rows=12, dtype=dtype)
    expected = gradients(-(plain(p)[0] * p.weights).sum() * factor, p)
    head = FusedHead(p.weight, p.bias, vocabulary=p.vocabulary, upstream=factor)
    addresses = set()
    with Allocations() as seen:
        for part in torch.arange(12).split(4):
            loss, _ = head.negative_log_likelihood(p.hidden[part], p.targets[part], p.weights[part])
            (loss * factor).backward()
            addresses.add(p.weight.grad.data_ptr())
    assert len(addresses) == 1
    assert seen.shapes.count(p.weight.shape) == 1
    for leaf, gradient in zip((p.hidden, p.weight, p.bias), expected, strict=True):
        torch.testing.assert_close(leaf.grad / factor, (gradient / factor).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probabilities_of_micro_batches_share_one_gradient_in_place(dtype):
    p = problem(rows=12, dtype=dtype)
    expected = gradients((plain(p)[0] * p.weights).sum(), p)
    head = FusedHead(p.weight, p.bias, vocabulary=p.vocabulary, in_place=True)
    addresses = set()
    with Allocations() as seen:
        for part in torch.arange(12).split(4):
            logp, _ = head.log_probabilities(p.hidden[part], p.targets[part])
            (logp * p.weights[part]).sum().backward()
            addresses.add(p.weight.grad.data_ptr())
    assert len(addresses) == 1
    assert seen.shapes.count(p.weight.shape) == 1
    for leaf, gradient in zip((p.hidden, p.weight, p.bias), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient.to(dtype))


def test_in_place_changes_nothing_for_a_weight_that_is_no_leaf():
    p = problem(bias=False)
    logp, _ = FusedHead(p.weight * 2, in_place=True).log_probabilities(p.hidden, p.targets)
    logp.sum().backward()
    expected, _ = FusedHead(p.weight * 2).log_probabilities(p.hidden, p.targets)
    torch.testing.assert_close([p.hidden.grad, p.weight.grad], gradients(expected.sum(), p))


def test_a_broken_promise_is_an_error():
    p = problem()
    loss, _ = FusedHead(p.weight, upstream=1.0).negative_log_likelihood(p.hidden, p.targets, p.weights)
    with pytest.raises(RuntimeError, match="promised"):
        (loss * 2).backward()


def test_a_promise_for_a_weight_that_is_no_leaf_changes_nothing():
    p = problem(bias=False)
    loss, _ = FusedHead(p.weight * 2, upstream=3.0).negative_log_likelihood(p.hidden, p.targets, p.weights)
    (loss * 3).backward()
    expected, _ = FusedHead(p.weight * 2).negative_log_likelihood(p.hidden, p.targets, p.weights)
    torch.testing.assert_close([p.hidden.grad, p.weight.grad], gradients(expected * 3, p))


def test_a_scaled_gradient_cannot_be_taken_twice():
    p = problem()
    loss, _ = FusedHead(p.weight).negative_log_likelihood(p.hidden, p.targets, p.weights)
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


# --- memory -------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The shape of every tensor that an operation makes while this is entered; views count as their storage."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        self._known: set[int] = set()
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in before:
                self.shapes.append(made.shape)
        return result

    @property
    def largest(self) -> int:
        return max(shape.numel() for shape in self.shapes)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", [{}, CAPPED])
def test_nothing_larger_than_the_limits_is_allocated(transform, precision):
    p = problem(rows=200, hidden=4, padded=400, vocabulary=400, dtype=torch.float32)
    head = FusedHead(p.weight, p.bias, limits=limits(20, 50, 400, 4), **transform)
    with Allocations() as seen, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        loss, _ = head.negative_log_likelihood(p.hidden, p.targets, p.weights)
        loss.backward()
        logp, entropy = head.log_probabilities(p.hidden, p.targets, entropy=True)
        (logp + entropy).sum().backward()
    assert seen.largest == 20 * 400
    assert seen.shapes.count((20, 400)) == 3  # one buffer for each pass over the rows


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["master", "low"])
def test_low_precision_rounds_products_and_nothing_else(processor, dtype, stored):
    p = problem(rows=256, hidden=64, padded=600, vocabulary=590, dtype=torch.float32)
    with torch.no_grad():
        p.weight *= 0.1
        if stored == "low":
            p.hidden, p.weight = (t.detach().to(dtype).requires_grad_() for t in (p.hidden, p.weight))
    logp, entropy = plain(p)
    expected = gradients(-(p.weights * logp).sum(), p)
    epsilon = torch.finfo(dtype).eps if processor else 1e-6
    with torch.autocast("cpu", dtype=dtype, enabled=stored == "master"):
        head = FusedHead(p.weight, p.bias, vocabulary=p.vocabulary, limits=limits(100, 128, 590, 4))
        loss, each = head.negative_log_likelihood(p.hidden, p.targets, p.weights)
        ours = head.log_probabilities(p.hidden, p.targets, entropy=True)
    assert loss.dtype == each.dtype == ours[0].dtype == torch.float32
    assert relative(each, -logp) < epsilon
    assert relative(ours[0], logp) < epsilon
    assert relative(ours[1], entropy) < epsilon
    for made in (gradients(loss, p), gradients(-(p.weights * ours[0]).sum(), p)):
        for gradient, exact, leaf in zip(made, expected, (p.hidden, p.weight, p.bias), strict=True):
            assert relative(gradient, exact) < 2 * max(epsilon, torch.finfo(leaf.dtype).eps)


@pytest.mark.usefixtures("processor")
def test_weights_below_the_range_of_fp16_are_not_lost():
    p = problem(rows=64, hidden=16, padded=100, vocabulary=100, dtype=torch.float32)
    p.weights = p.weights.abs() * 1e-9
    expected = gradients(-(p.weights * plain(p)[0]).sum(), p)
    with torch.autocast("cpu", dtype=torch.float16):
        loss, _ = FusedHead(p.weight, p.bias).negative_log_likelihood(p.hidden, p.targets, p.weights)
    assert all(relative(ours, theirs) < 2e-3 for ours, theirs in zip(gradients(loss, p), expected, strict=True))


@pytest.mark.usefixtures("processor")
def test_in_bf16_a_confident_row_keeps_its_small_gradient():
    # Where the target has p = 1 - 1e-4, rounding p before the one is taken off would leave nothing but error.
    weight = torch.eye(8).requires_grad_()
    hidden = torch.zeros(4, 8)
    hidden[:, 0] = 11.0
    hidden.requires_grad_()
    targets, weights = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    exact = torch.autograd.grad(
        torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum"), weight
    )[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = FusedHead(weight).negative_log_likelihood(hidden, targets, weights)
    assert relative(torch.autograd.grad(loss, weight)[0], exact.double()) < 0.01


def test_gradients_come_in_the_dtype_of_their_inputs():
    p = problem(dtype=torch.bfloat16)
    loss, _ = FusedHead(p.weight, p.bias).negative_log_likelihood(p.hidden, p.targets, p.weights)
    logp, _ = FusedHead(p.weight, p.bias).log_probabilities(p.hidden, p.targets)
    for result in (loss, logp.sum()):
        made = torch.autograd.grad(result, (p.hidden, p.weight, p.bias))
        assert {gradient.dtype for gradient in made} == {torch.bfloat16}


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [-100, -1, 11, 12, 13])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    p = problem()
    p.targets[3] = target
    head = FusedHead(p.weight, p.bias, vocabulary=11)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        head.negative_log_likelihood(p.hidden, p.targets, p.weights)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        head.log_probabilities(p.hidden, p.targets)


def test_what_cannot_be_is_refused():
    p = problem()
    for vocabulary in (0, 14):
        with pytest.raises(ValueError, match="vocabulary"):
            FusedHead(p.weight, vocabulary=vocabulary)
    with pytest.raises(ValueError, match="log_probabilities"):
        FusedHead(p.weight).negative_log_likelihood(p.hidden, p.targets, p.weights.requires_grad_())
