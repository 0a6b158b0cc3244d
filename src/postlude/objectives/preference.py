"""Preference optimisation over pairs: what every loss of direct preference optimisation and its kin has in common.

Let c and r be the log-probabilities that the policy gives the chosen and the rejected answer, sums over their tokens,
c' and r' those that the frozen reference gives, |c| and |r| the numbers of tokens, s the logistic function, b the key
``beta``, e ``label_smoothing`` and

    h = (c - c') - (r - r')

A step's loss is the mean over its pairs. A loss is a component, found by its name, so that it stands in one place: its
keys, whether it has a reference, and its formula (:mod:`postlude.objectives.preference_losses`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from postlude.data.document import REFERENCE_LOGP
from postlude.data.example import Ranked
from postlude.manifest.change import EVERY, Change, from_step
from postlude.manifest.component import Component
from postlude.objectives.objective import Objective, Outcome

if TYPE_CHECKING:
    from torch import Tensor

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


class PreferenceLoss(Component):
    """Base of the kind ``preference_losses``: the keys of a loss. It imports without torch."""

    needs_reference: ClassVar[bool] = True
    """Whether a frozen model is run beside the policy."""
    stores_reference: ClassVar[bool] = True
    """Whether it is enough to run that over the data once, before the first step."""
    over_means: ClassVar[bool] = False
    """Whether it looks at means over tokens in place of sums; the metrics then do, too."""
    adds_likelihood: ClassVar[bool] = False
    """Whether the negative log-likelihood of the chosen answers, a mean over their tokens, comes to it."""
    accepts: ClassVar[tuple[type, ...]] = (Ranked,)
    """The shapes of examples that it learns from."""
    changes: ClassVar[Mapping[str, Change]] = {EVERY: from_step("the loss has it")}

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How much a difference in log-probability counts."""

    def losses(self, pairs: Pairs) -> Tensor:
        """The loss of each pair, [pairs]."""
        raise NotImplementedError

    def objective(self, stored_reference: bool) -> Objective:
        """The objective. With ``stored_reference`` documents bring what the reference says."""
        return PreferenceOptimisation(self, stored_reference)


@dataclass(frozen=True)
class PreferenceOptimisation(Objective):
    """The objective over units of two documents; normalisers are ``pairs`` and, with the likelihood,
    ``chosen_tokens``."""

    loss: PreferenceLoss
    stored_reference: bool = False
    """The documents bring the reference's log-probabilities as a stream; no reference is run."""

    @property
    def streams(self) -> tuple[str, ...]:
        return (REFERENCE_LOGP.name,) if self.loss.needs_reference and self.stored_reference else ()

    @property
    def heads(self) -> Mapping[str, tuple[str, ...]]:
        runs_reference = self.loss.needs_reference and not self.stored_reference
        return {"policy": ("lm",), **({"reference": ("lm",)} if runs_reference else {})}

    def count(self, batch: PackedBatch) -> Mapping[str, float]:
        from postlude.objectives.answers import sides, trained_counts

        counts = {"pairs": float(batch.units)}
        if self.loss.adds_likelihood:
            counts["chosen_tokens"] = float(sides(batch, trained_counts(batch))[0].sum())
        return counts

    def __call__(self, step: Step) -> Outcome:
        from postlude.objectives import answers

        batch = step.batch
        reference = answers.reference_likelihood(step, self.stored_reference) if self.loss.needs_reference else None
        policy = answers.likelihood(step)
        theirs = policy.documents.new_zeros(policy.documents.shape) if reference is None else reference.documents
        columns = (policy.documents, theirs, answers.trained_counts(batch))
        pairs = Pairs(*(side for column in columns for side in answers.sides(batch, column)))
        losses = self.loss.losses(pairs)
        loss = losses.sum() / step.normalizers["pairs"]
        if self.loss.adds_likelihood:
            loss = loss - pairs.chosen.sum() / step.normalizers["chosen_tokens"]
        example_loss, example_tokens = answers.once_per_unit(batch, losses)
        metrics = self._metrics(pairs)
        if reference is not None:
            metrics["divergence"] = answers.divergence([policy], [reference])
        return Outcome(
            loss=loss + 0.0 * policy.tokens.sum(),  # a rank without pairs takes part in the backward pass
            metrics=metrics,
            example_loss=example_loss,
            example_tokens=example_tokens,
        )

    def _metrics(self, pairs: Pairs) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Means over pairs. A reward is b (log p - log p'), over the number of tokens where the loss looks at means."""
        count = float(len(pairs.chosen))
        chosen = self.loss.beta * (pairs.chosen - pairs.chosen_reference).detach()
        rejected = self.loss.beta * (pairs.rejected - pairs.rejected_reference).detach()
        if self.loss.over_means:
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        values = {
            "accuracy": (chosen > rejected).double(),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_logp": pairs.chosen.detach(),
            "rejected_logp": pairs.rejected.detach(),
        }
        return {name: (value.sum(), count) for name, value in values.items()}
