"""Policy gradients: a policy learns from its own samples, each token of which has an advantage.

Where A_t is the advantage of a sampled token, r_t = p(t) / p_old(t) how much likelier it has become since it was
sampled (``ratio: sequence`` takes the geometric mean over the document at each of its tokens), and w_t the correction
for samples of another policy than the old one, the loss of a token is

- ``clip``:   -w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)       (PPO, Schulman et al., 2017)
- ``cispo``:  -w_t [min(r_t, 1 + high)] A_t log p(t)                    (MiniMax-M1, 2025)
- ``plain``:  -w_t r_t A_t

in which nothing in brackets has a gradient. To it come ``kl_coefficient`` times r_t (e^d - d - 1) with d the logarithm
of p_reference(t) / p(t) (Schulman, 2020; with the ratio before it, whose gradient counts, the gradient is that of the
divergence: DeepSeek-V3.2, 2025), and less ``entropy_coefficient`` times the entropy. The loss of a step is

- ``token``:     the mean over all its sampled tokens                   (DAPO)
- ``document``:  the mean over each document's, then over documents     (GRPO)
- ``length``:    the sum, divided by documents times ``longest``        (Dr. GRPO)

All log-probabilities are those at the temperature that was sampled with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from postlude.data.batch import PackedBatch
from postlude.data.document import REFERENCE_LOGP, define_stream
from postlude.objectives.objective import Objective, Outcome, Step

ADVANTAGE = define_stream("advantage", "float32")
"""How much better than expected a sampled token was."""
BEHAVIOUR_LOGP = define_stream("behaviour_logp", "float32")
"""The log-probability of a sampled token as the engine that sampled it told."""
OLD_LOGP = define_stream("old_logp", "float32")
"""The log-probability of a sampled token under the policy as it was when the training on it began."""
CORRECTION = define_stream("correction", "float32", fill=1.0)
"""p_old / p_behaviour of a sampled token, truncated: 1 where it was sampled from the old policy itself."""

Surrogate = Literal["clip", "cispo", "plain"]
Ratio = Literal["token", "sequence"]
Normalizer = Literal["token", "document", "length"]


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """The objective; normalisers are ``sampled_tokens`` and ``sampled_documents``."""

    surrogate: Surrogate = "clip"
    ratio: Ratio = "token"
    normalize: Normalizer = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    longest: int = 1
    """Tokens of the longest completion there may be."""
    temperature: float = 1.0
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    measures_reference: bool = False
    """Whether documents bring ``reference_logp``, if only to be told how far away the policy is."""

    heads = {"policy": ("lm",)}

    @property
    def streams(self) -> tuple[str, ...]:
        reference = (REFERENCE_LOGP.name,) if self.measures_reference or self.kl_coefficient else ()
        return (ADVANTAGE.name, OLD_LOGP.name, BEHAVIOUR_LOGP.name, CORRECTION.name, *reference)

    def count(self, batch: PackedBatch) -> Mapping[str, float]:
        sampled = batch.per_document(batch.weight.double())
        return {"sampled_tokens": float(sampled.sum()), "sampled_documents": float((sampled > 0).sum())}

    def __call__(self, step: Step) -> Outcome:
        batch = step.batch
        rows = batch.trained_rows()
        before = step.hidden().index_select(0, rows - 1)
        logp, entropy = step.head("lm").log_probabilities(before, batch.tokens[rows], self.temperature, entropy=True)
        assert entropy is not None
        streams = {name: batch.streams[name][rows] for name in self.streams}
        counts = batch.per_document(torch.ones_like(logp), rows)
        log_ratio = logp - streams[OLD_LOGP.name]
        if self.ratio == "sequence":
            log_ratio = (batch.per_document(log_ratio, rows) / counts.clamp_min(1.0))[batch.document[rows]]
        losses, clipped = self._surrogate(log_ratio, logp, streams[ADVANTAGE.name])
        losses = losses * streams[CORRECTION.name]
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {}
        total = float(len(rows))
        if REFERENCE_LOGP.name in streams:
            apart = divergence(streams[REFERENCE_LOGP.name] - logp)
            losses = losses + self.kl_coefficient * (logp - streams[OLD_LOGP.name]).exp() * apart
            metrics["kl"] = (apart.detach().sum(), total)
        losses = losses - self.entropy_coefficient * entropy
        moved = (logp - streams[OLD_LOGP.name]).detach()
        mismatch = (logp.detach() - streams[BEHAVIOUR_LOGP.name]).abs()
        metrics |= {
            "entropy": (entropy.detach().sum(), total),
            "clip_share": (clipped.double().sum(), total),
            "policy_kl": (divergence(-moved).sum(), total),
            "behaviour_gap": (mismatch.sum(), total),
            "correction": (streams[CORRECTION.name].sum(), total),
        }
        return Outcome(
            loss=(losses * self._weights(step, counts, batch.document[rows])).sum(),
            metrics=metrics,
            example_loss=batch.per_document(losses.detach(), rows),
            example_tokens=counts,
        )

    def _surrogate(self, log_ratio: Tensor, logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each token, and which tokens the clipping has taken the gradient from: [rows] each."""
        ratio = log_ratio.exp()
        if self.surrogate == "cispo":
            bound = 1 + self.clip_high
            return -ratio.detach().clamp(max=bound) * advantage * logp, ratio.detach() > bound
        if self.surrogate == "plain":
            return -ratio * advantage, torch.zeros_like(ratio, dtype=torch.bool)
        inside = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        free, held = ratio * advantage, inside * advantage
        return -torch.minimum(free, held), (held < free).detach()

    def _weights(self, step: Step, counts: Tensor, document: Tensor) -> Tensor:
        """How much each sampled token counts in the loss of the whole step, [rows]."""
        normalizers = step.normalizers
        if self.normalize == "token":
            return counts.new_full((len(document),), 1 / max(normalizers["sampled_tokens"], 1.0))
        documents = max(normalizers["sampled_documents"], 1.0)
        if self.normalize == "length":
            return counts.new_full((len(document),), 1 / (documents * self.longest))
        return (1 / counts.clamp_min(1.0))[document] / documents


def divergence(log_ratio: Tensor) -> Tensor:
    """e^d - d - 1 of the logarithm d of a ratio p_other / p: where the tokens are drawn from p, an estimate of
    KL(p || other) that is never negative (Schulman, 2020). [rows]."""
    return log_ratio.exp() - log_ratio - 1
