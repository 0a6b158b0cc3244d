"""Preference optimisation over pairs: the many losses of direct preference optimisation and its kin, a function each.

Let c and r be the log-probabilities that the policy gives the chosen and the rejected answer, sums over their tokens,
c' and r' those that the frozen reference gives, |c| and |r| the numbers of tokens, s the logistic function, b the key
``beta``, e ``label_smoothing`` and

    h = (c - c') - (r - r')

A step's loss is the mean over its pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from postlude.data.document import REFERENCE_LOGP
from postlude.objectives.answers import (
    divergence,
    likelihood,
    once_per_unit,
    reference_likelihood,
    sides,
    trained_counts,
)
from postlude.objectives.objective import Outcome

if TYPE_CHECKING:
    from postlude.data.batch import PackedBatch
    from postlude.objectives.objective import Step


@dataclass(frozen=True)
class Pairs:
    """The log-probabilities of pairs, [pairs] each: c, r, c', r', |c| and |r|."""

    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor
    """Zero for a loss without a reference."""
    rejected_reference: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def difference(self) -> Tensor:
        """h"""
        return (self.chosen - self.chosen_reference) - (self.rejected - self.rejected_reference)

    @property
    def mean_difference(self) -> Tensor:
        """(c - c') / |c| - (r - r') / |r|"""
        chosen = (self.chosen - self.chosen_reference) / self.chosen_tokens
        return chosen - (self.rejected - self.rejected_reference) / self.rejected_tokens


@dataclass(frozen=True)
class Settings:
    """The numbers of the losses."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5


def sigmoid(pairs: Pairs, settings: Settings) -> Tensor:
    """DPO (Rafailov et al., 2023), binary cross-entropy of s(b h): -log s(b h); with smoothing, which is conservative
    DPO (Mitchell, 2023), -(1 - e) log s(b h) - e log s(-b h).
    """
    return _cross_entropy(settings.beta * pairs.difference, settings.label_smoothing)


def sigmoid_norm(pairs: Pairs, settings: Settings) -> Tensor:
    """DPO over means in place of sums: -log s(b ((c - c') / |c| - (r - r') / |r|)) (Meng et al., 2024, section 4)."""
    return _cross_entropy(settings.beta * pairs.mean_difference, settings.label_smoothing)


def robust(pairs: Pairs, settings: Settings) -> Tensor:
    """Robust DPO (Chowdhury et al., 2024), without bias where a share e of the labels is flipped:
    (-(1 - e) log s(b h) + e log s(-b h)) / (1 - 2 e).
    """
    logits, e = settings.beta * pairs.difference, settings.label_smoothing
    return (-(1 - e) * F.logsigmoid(logits) + e * F.logsigmoid(-logits)) / (1 - 2 * e)


def ipo(pairs: Pairs, settings: Settings) -> Tensor:
    """IPO (Azar et al., 2023, equation 17), of means over tokens: ((c - c') / |c| - (r - r') / |r| - 1 / (2 b))^2."""
    return (pairs.mean_difference - 1 / (2 * settings.beta)).square()


def hinge(pairs: Pairs, settings: Settings) -> Tensor:
    """SLiC's hinge on the same difference (Zhao et al., 2023; Liu et al., 2023): max(0, 1 - b h)."""
    return F.relu(1 - settings.beta * pairs.difference)


def simpo(pairs: Pairs, settings: Settings) -> Tensor:
    """SimPO (Meng et al., 2024), without a reference: -log s(b (c / |c| - r / |r|) - gamma)."""
    return _cross_entropy(settings.beta * pairs.mean_difference - settings.gamma, settings.label_smoothing)


def orpo(pairs: Pairs, settings: Settings) -> Tensor:
    """The odds ratio of ORPO (Hong et al., 2024), without a reference, to which the likelihood of the chosen answers is
    added: -b log s(log odds(c / |c|) - log odds(r / |r|)) with log odds(x) = x - log(1 - exp x).
    """
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -settings.beta * F.logsigmoid(log_odds)


Loss = Callable[[Pairs, Settings], Tensor]

LOSSES: Mapping[str, Loss] = {loss.__name__: loss for loss in (sigmoid, sigmoid_norm, robust, ipo, hinge, simpo, orpo)}
WITHOUT_REFERENCE = ("simpo", "orpo")
NORMALISED = ("sigmoid_norm", "ipo", "simpo", "orpo")
"""Those that look at means over tokens."""


def _cross_entropy(logits: Tensor, smoothing: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 1 - smoothing), reduction="none")


def _log1mexp(value: Tensor) -> Tensor:
    """log(1 - exp(value)) of negative values, exact at both ends (Mächler, 2012)."""
    value = value.clamp_max(-1e-7)  # a certain answer has no odds
    near = value > -0.6931471805599453
    return torch.where(near, torch.log(-torch.expm1(value)), torch.log1p(-torch.exp(value)))


@dataclass(frozen=True)
class PreferenceOptimisation:
    """The objective over units of two documents; normalisers are ``pairs`` and, for ORPO, ``chosen_tokens``."""

    loss: str = "sigmoid"
    settings: Settings = Settings()
    stored_reference: bool = False
    """The documents bring the reference's log-probabilities as a stream; no reference is run."""

    statistics = ()
    loss_is_likelihood = False

    @property
    def has_reference(self) -> bool:
        return self.loss not in WITHOUT_REFERENCE

    @property
    def streams(self) -> tuple[str, ...]:
        return (REFERENCE_LOGP.name,) if self.has_reference and self.stored_reference else ()

    @property
    def heads(self) -> Mapping[str, tuple[str, ...]]:
        runs_reference = self.has_reference and not self.stored_reference
        return {"policy": ("lm",), **({"reference": ("lm",)} if runs_reference else {})}

    def count(self, batch: PackedBatch) -> Mapping[str, float]:
        counts = {"pairs": float(batch.units)}
        if self.loss == "orpo":
            counts["chosen_tokens"] = float(sides(batch, trained_counts(batch))[0].sum())
        return counts

    def measure(self, step: Step) -> Mapping[str, float]:
        return {}

    def __call__(self, step: Step) -> Outcome:
        batch = step.batch
        reference = reference_likelihood(step, self.stored_reference) if self.has_reference else None
        policy = likelihood(step)
        theirs = torch.zeros_like(policy.documents) if reference is None else reference.documents
        pairs = Pairs(*sides(batch, policy.documents), *sides(batch, theirs), *sides(batch, trained_counts(batch)))
        losses = LOSSES[self.loss](pairs, self.settings)
        loss = losses.sum() / step.normalizers["pairs"]
        if self.loss == "orpo":
            loss = loss - pairs.chosen.sum() / step.normalizers["chosen_tokens"]
        example_loss, example_tokens = once_per_unit(batch, losses)
        metrics = _metrics(pairs, self.settings.beta, self.loss in NORMALISED)
        if reference is not None:
            metrics["divergence"] = divergence([policy], [reference])
        return Outcome(
            loss=loss + 0.0 * policy.tokens.sum(),  # a rank without pairs takes part in the backward pass
            metrics=metrics,
            example_loss=example_loss,
            example_tokens=example_tokens,
        )


@torch.no_grad()
def _metrics(pairs: Pairs, beta: float, normalised: bool) -> dict[str, tuple[Tensor, Tensor | float]]:
    """Means over pairs. A reward is b (log p - log p'), over the number of tokens where the loss looks at means."""
    count = float(len(pairs.chosen))
    chosen = beta * (pairs.chosen - pairs.chosen_reference)
    rejected = beta * (pairs.rejected - pairs.rejected_reference)
    if normalised:
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    values = {
        "accuracy": (chosen > rejected).double(),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "chosen_logp": pairs.chosen,
        "rejected_logp": pairs.rejected,
    }
    return {name: (value.sum(), count) for name, value in values.items()}
