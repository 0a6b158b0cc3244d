"""Divergences through the fused head against full logits and TRL: values, gradients, stored teachers, vocabularies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from postlude.objectives.divergence import LiveTeacher, Measure, StoredTeacher, divergence
from postlude.objectives.head import FusedHead
from postlude.objectives.logits import Limits

KINDS = ("forward_kl", "reverse_kl", "jsd")
CAPPED = {"scale": 0.7, "soft_cap": 2.5}


class Problem:
    """A student and a teacher of another width, and rows for both."""

    def __init__(self, rows=6, student=9, teacher=9, padding=2, seed=0, dtype=torch.float64, spread=1.0, **transform):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64).mul_(spread).to(dtype)

        self.hidden, self.weight = normal(rows, 4).requires_grad_(), normal(student + padding, 4).requires_grad_()
        self.bias = normal(student + padding).requires_grad_()
        self.student, self.transform = student, transform
        self.their_hidden, self.their_weight, self.teacher = normal(rows, 3), normal(teacher + 1, 3), teacher
        self.targets = torch.randint(0, min(student, teacher), (rows,), generator=random)
        self.weights = normal(rows)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def head(self, limits: Limits | None = None, upstream: float | None = None) -> FusedHead:
        return FusedHead(
            self.weight, self.bias, vocabulary=self.student, limits=limits, upstream=upstream, **self.transform
        )

    def live(self) -> LiveTeacher:
        return LiveTeacher(FusedHead(self.their_weight, vocabulary=self.teacher), self.their_hidden)

    def stored(self, k: int, temperature: float) -> StoredTeacher:
        teacher = self.live()
        return StoredTeacher(*teacher.head.top_log_probabilities(teacher.hidden, k, temperature))

    def logits(self) -> tuple[Tensor, Tensor]:
        """All logits of the student and of the teacher."""
        ours = (self.hidden @ self.weight[: self.student].t() + self.bias[: self.student]) * self.transform.get(
            "scale", 1
        )
        if "soft_cap" in self.transform:
            ours = self.transform["soft_cap"] * torch.tanh(ours / self.transform["soft_cap"])
        return ours, self.their_hidden @ self.their_weight[: self.teacher].t()


def formula(log_p: Tensor, log_q: Tensor, measure: Measure) -> Tensor:
    """The divergence of each row of log-probabilities, the teacher's and the student's."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(1)

    if measure.kind == "forward_kl":
        return kl(log_p, log_q)
    if measure.kind == "reverse_kl":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(measure.beta), log_q + math.log(1 - measure.beta))
    return measure.beta * kl(log_p, log_m) + (1 - measure.beta) * kl(log_q, log_m)


def expected(p: Problem, measure: Measure) -> tuple[Tensor, Tensor]:
    """Each row's loss and divergence from all logits at once."""
    ours, theirs = p.logits()
    shared = min(p.student, p.teacher)
    log_q = torch.log_softmax(ours[:, :shared] / measure.temperature, -1)
    log_p = torch.log_softmax(theirs[:, :shared] / measure.temperature, -1)
    distance = formula(log_p, log_q, measure)
    likelihood = torch.nn.functional.cross_entropy(ours, p.targets, reduction="none")
    soft = (1 - measure.hard_loss) * measure.temperature**2
    return soft * distance + measure.hard_loss * likelihood, distance


measures = st.builds(
    Measure,
    kind=st.sampled_from(KINDS),
    beta=st.sampled_from([0.1, 0.5, 0.8]),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    hard_loss=st.sampled_from([0.0, 0.3]),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", [{}, CAPPED])
@pytest.mark.parametrize("k", [None, 3])
def test_gradients_are_the_derivatives(kind, transform, k):
    p = Problem(rows=4, **transform)
    measure = Measure(kind, 0.3, 1.4, 0.25)
    teacher = p.live() if k is None else p.stored(k, measure.temperature)

    def loss(hidden, weight, bias):
        head = FusedHead(weight, bias, vocabulary=p.student, limits=Limits(2 * 9 * 8 * 2, 3, 64), **transform)
        return divergence(head, hidden, p.targets, p.weights, teacher, measure)[0]

    assert torch.autograd.gradcheck(loss, p.leaves)


@pytest.mark.capability("Divergences from a teacher without ever holding all logits of either model")
@settings(max_examples=80, deadline=None)
@given(
    measures,
    st.integers(0, 7),
    st.integers(1, 10),
    st.integers(1, 10),
    st.integers(1, 8),
    st.integers(1, 12),
    st.sampled_from([{}, CAPPED]),
    st.integers(0, 2**20),
)
def test_any_cut_equals_full_logits(measure, rows, student, teacher, chunk, tile, transform, seed):
    p = Problem(rows, student, teacher, seed=seed, **transform)
    limits = Limits(chunk_bytes=2 * chunk * student * 8, chunk_rows=chunk, tile_bytes=chunk * tile * 8)
    loss, found = divergence(p.head(limits), p.hidden, p.targets, p.weights, p.live(), measure)
    each, distance = expected(p, measure)
    torch.testing.assert_close(found.loss, each.detach())
    torch.testing.assert_close(found.divergence, distance.detach())
    torch.testing.assert_close(loss, (each * p.weights).sum())
    made = torch.autograd.grad(loss, p.leaves)
    torch.testing.assert_close(made, torch.autograd.grad((each * p.weights).sum(), p.leaves))
    shared = min(student, teacher)
    ours, theirs = p.logits()
    same = ours[:, :shared].argmax(1) == theirs[:, :shared].argmax(1)
    if teacher >= student or measure.hard_loss == 0 != measure.temperature - 1:
        assert torch.equal(found.agrees.bool(), same)


def test_a_promised_factor_shares_the_gradient_of_the_weight_among_micro_batches():
    p, measure = Problem(rows=8), Measure("jsd", 0.4, 2.0, 0.2)
    each, _ = expected(p, measure)
    wanted = torch.autograd.grad((each * p.weights).sum() * 4, p.leaves)
    live = p.live()
    for part in torch.arange(8).split(3):
        teacher = LiveTeacher(live.head, live.hidden[part])
        head = p.head(upstream=4.0)
        loss, _ = divergence(head, p.hidden[part], p.targets[part], p.weights[part], teacher, measure)
        (loss * 4).backward()
    torch.testing.assert_close([leaf.grad for leaf in p.leaves], list(wanted))


@settings(max_examples=60, deadline=None)
@given(measures, st.integers(1, 9), st.floats(0.3, 4.0), st.integers(0, 2**20))
def test_the_error_of_a_stored_teacher_is_within_the_bound_of_the_rest(measure, k, spread, seed):
    p = Problem(seed=seed, spread=spread)
    stored = p.stored(k, measure.temperature)
    _, found = divergence(p.head(), p.hidden, p.targets, p.weights, stored, measure)
    ours, theirs = (torch.log_softmax(logits.detach() / measure.temperature, -1) for logits in p.logits())
    error = formula(theirs, ours, measure) - found.divergence
    rest = torch.ones_like(ours).scatter_(1, stored.ids, 0.0)
    p_0, q_0 = (theirs.exp() * rest).sum(1), (ours.exp() * rest).sum(1)
    worst = ((theirs - ours).abs() * rest).amax(1)
    if measure.kind == "jsd":
        m_0 = measure.beta * p_0 + (1 - measure.beta) * q_0
        w = (measure.beta * p_0 / m_0.clamp_min(1e-300)).clamp(1e-300, 1 - 1e-16)
        bound = m_0 * -(w * w.log() + (1 - w) * (-w).log1p())
    else:
        bound = 2 * worst * (p_0 if measure.kind == "forward_kl" else q_0)
    assert bool((error >= -1e-9).all())
    assert bool((error <= bound + 1e-9).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_stored_whole_is_the_live_one(kind):
    p, measure = Problem(), Measure(kind, 0.3, 1.5, 0.2)
    results = []
    for teacher in (p.live(), p.stored(p.teacher, 1.5)):
        loss, found = divergence(p.head(), p.hidden, p.targets, p.weights, teacher, measure)
        results.append((loss.detach(), found, torch.autograd.grad(loss, p.leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_meaning_of_beta_is_that_of_trl(beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    p = Problem(dtype=torch.float32)
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    weights = torch.ones(6)
    loss, _ = divergence(p.head(), p.hidden, p.targets, weights, p.live(), Measure(kind, beta, 2.0))
    theirs = gkd.GKDTrainer.generalized_jsd_loss(*p.logits(), beta=beta, temperature=2.0, reduction="sum")
    assert float(loss.detach()) == pytest.approx(4 * float(theirs.detach()), rel=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(loss, p.leaves), torch.autograd.grad(4 * theirs, p.leaves), rtol=1e-4, atol=1e-5
    )


class Largest(TorchDispatchMode):
    """The number of elements of the largest storage that an operation makes while this is entered."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in before:
                self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 5])
def test_nothing_larger_than_a_chunk_of_rows_is_made(kind, k):
    p = Problem(rows=200, student=400, teacher=400)
    limits = Limits(chunk_bytes=(1 if k else 2) * 20 * 400 * 8, chunk_rows=20, tile_bytes=20 * 50 * 8)
    teacher, measure = p.stored(k, 2.0) if k else p.live(), Measure(kind, 0.5, 2.0, 0.3)
    with Largest() as seen:
        divergence(p.head(limits), p.hidden, p.targets, p.weights, teacher, measure)[0].backward()
    assert seen.elements == 20 * 400


def test_extreme_logits_stay_finite_in_single_precision():
    for kind in KINDS:
        p = Problem(dtype=torch.float32, spread=12.0)
        for teacher in (p.live(), p.stored(3, 1.0)):
            loss, found = divergence(p.head(), p.hidden, p.targets, p.weights, teacher, Measure(kind))
            assert all(bool(g.isfinite().all()) for g in (*torch.autograd.grad(loss, p.leaves), found.divergence))


def test_what_cannot_be_is_refused():
    p = Problem()
    with pytest.raises(ValueError, match="no gradient"):
        divergence(p.head(), p.hidden, p.targets, p.weights.requires_grad_(), p.live(), Measure())
    for k in (0, 10):
        with pytest.raises(ValueError, match="cannot be taken"):
            p.stored(k, 1.0)
