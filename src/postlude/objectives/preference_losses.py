"""The losses of direct preference optimisation and its kin, a class each. For the letters see
:mod:`postlude.objectives.preference`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from postlude.data.example import Judged
from postlude.objectives.objective import Objective
from postlude.objectives.preference import Pairs, PreferenceLoss

if TYPE_CHECKING:
    from torch import Tensor

Positive = Annotated[float, Field(gt=0)]


class Smoothed(PreferenceLoss):
    """A loss that may take a share of the pairs for exchanged."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of pairs whose sides are taken for exchanged."""

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """-(1 - e) log s(x) - e log s(-x) of logits x."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        targets = torch.full_like(logits, 1 - self.label_smoothing)
        return binary_cross_entropy_with_logits(logits, targets, reduction="none")


class Sigmoid(Smoothed):
    """DPO (Rafailov et al., 2023), binary cross-entropy of s(b h): -log s(b h); with smoothing, which is conservative
    DPO (Mitchell, 2023), -(1 - e) log s(b h) - e log s(-b h)."""

    def losses(self, pairs: Pairs) -> Tensor:
        return self.cross_entropy(self.beta * pairs.difference)


class SigmoidNorm(Smoothed):
    """DPO over means in place of sums: -log s(b ((c - c') / |c| - (r - r') / |r|)) (Meng et al., 2024, section 4)."""

    over_means = True

    def losses(self, pairs: Pairs) -> Tensor:
        return self.cross_entropy(self.beta * pairs.mean_difference)


class Robust(Smoothed):
    """Robust DPO (Chowdhury et al., 2024), without bias where a share e of the labels is flipped:
    (-(1 - e) log s(b h) + e log s(-b h)) / (1 - 2 e)."""

    @model_validator(mode="after")
    def _has_a_share(self) -> Self:
        if not self.label_smoothing:
            raise ValueError("'loss: robust' needs 'label_smoothing', the share of pairs whose sides are exchanged")
        return self

    def losses(self, pairs: Pairs) -> Tensor:
        from torch.nn.functional import logsigmoid

        logits, e = self.beta * pairs.difference, self.label_smoothing
        return (-(1 - e) * logsigmoid(logits) + e * logsigmoid(-logits)) / (1 - 2 * e)


class IPO(PreferenceLoss):
    """IPO (Azar et al., 2023, equation 17), of means over tokens: ((c - c') / |c| - (r - r') / |r| - 1 / (2 b))^2."""

    over_means = True

    def losses(self, pairs: Pairs) -> Tensor:
        return (pairs.mean_difference - 1 / (2 * self.beta)).square()


class Hinge(PreferenceLoss):
    """SLiC's hinge on the same difference (Zhao et al., 2023; Liu et al., 2023): max(0, 1 - b h)."""

    def losses(self, pairs: Pairs) -> Tensor:
        return (1 - self.beta * pairs.difference).relu()


class SimPO(Smoothed):
    """SimPO (Meng et al., 2024), without a reference: -log s(b (c / |c| - r / |r|) - gamma)."""

    needs_reference = False
    over_means = True

    gamma: float = 0.5
    """The margin between the two sides."""

    def losses(self, pairs: Pairs) -> Tensor:
        return self.cross_entropy(self.beta * pairs.mean_difference - self.gamma)


class ORPO(PreferenceLoss):
    """The odds ratio of ORPO (Hong et al., 2024), without a reference, to which the likelihood of the chosen answers is
    added: -b log s(log odds(c / |c|) - log odds(r / |r|)) with log odds(x) = x - log(1 - exp x)."""

    needs_reference = False
    over_means = True
    adds_likelihood = True

    def losses(self, pairs: Pairs) -> Tensor:
        from torch.nn.functional import logsigmoid

        chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
        log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        return -self.beta * logsigmoid(log_odds)


class KTO(PreferenceLoss):
    """KTO (Ethayarajh et al., 2024), of single answers that are wanted or not. It puts answers to other prompts, of
    which nothing can be stored."""

    stores_reference = False
    accepts = (Judged,)

    desirable_weight: Positive = 1.0
    """How much a wanted answer counts."""
    undesirable_weight: Positive = 1.0
    """How much an unwanted answer counts."""

    def objective(self, stored_reference: bool) -> Objective:
        from postlude.objectives.kto import KahnemanTversky

        return KahnemanTversky(self.beta, self.desirable_weight, self.undesirable_weight)


def _log1mexp(value: Tensor) -> Tensor:
    """log(1 - exp(value)) of negative values, exact at both ends (Mächler, 2012)."""
    import torch

    value = value.clamp_max(-1e-7)  # a certain answer has no odds
    near = value > -0.6931471805599453
    return torch.where(near, torch.log(-torch.expm1(value)), torch.log1p(-torch.exp(value)))
