"""Actor and critic: a policy gradient, and the regression of a critic on the returns (PPO, Schulman et al., 2017).

Where v_t is what the critic expects of the document before its sampled token t, R_t the return and v_old,t what the
critic had expected when the training on these samples began, the critic's loss is, in the mean over sampled tokens,

    coefficient / 2 * max((v_t - R_t)^2, (clip(v_t, v_old,t - c, v_old,t + c) - R_t)^2).

The critic is a model of its own with the head ``scalar``, or that head on the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from postlude.data.batch import PackedBatch
from postlude.data.document import define_stream
from postlude.objectives.objective import Objective, Outcome, Step
from postlude.objectives.policy import PolicyGradient

VALUE = define_stream("value", "float32")
"""What the critic expected before a sampled token, when the training on it began."""
RETURN = define_stream("return", "float32")
"""What the critic should have expected there."""


@dataclass(frozen=True)
class ActorCritic(Objective):
    """The objective. ``critic`` names the model whose head ``scalar`` is the critic."""

    policy: PolicyGradient
    critic: str = "critic"
    value_coefficient: float = 1.0
    value_clip: float | None = 0.2

    @property
    def heads(self) -> Mapping[str, tuple[str, ...]]:
        return (
            {"policy": ("lm", "scalar")} if self.critic == "policy" else {"policy": ("lm",), self.critic: ("scalar",)}
        )

    @property
    def streams(self) -> tuple[str, ...]:
        return (*self.policy.streams, VALUE.name, RETURN.name)

    def count(self, batch: PackedBatch) -> Mapping[str, float]:
        return self.policy.count(batch)

    def __call__(self, step: Step) -> Outcome:
        outcome = self.policy(step)
        batch = step.batch
        rows = batch.trained_rows()
        values = step.head("scalar", self.critic)(step.hidden(self.critic).index_select(0, rows - 1))
        old, returns = batch.streams[VALUE.name][rows], batch.streams[RETURN.name][rows]
        errors = (values - returns).square()
        clipped = torch.zeros_like(errors, dtype=torch.bool)
        if self.value_clip is not None:
            held = old + (values - old).clamp(-self.value_clip, self.value_clip)
            errors, clipped = torch.maximum(errors, (held - returns).square()), (held - returns).square() > errors
        total = float(len(rows))
        loss = 0.5 * errors.sum() / max(step.normalizers["sampled_tokens"], 1.0)
        return replace(
            outcome,
            loss=outcome.loss + self.value_coefficient * loss,
            metrics={
                **outcome.metrics,
                "value_loss": (0.5 * errors.detach().sum(), total),
                "value": (values.detach().sum(), total),
                "value_clip_share": (clipped.double().sum(), total),
            },
        )
