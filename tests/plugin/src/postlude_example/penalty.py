"""What the component ``confidence_penalty`` builds."""

from __future__ import annotations

from postlude.objectives.objective import Outcome


class Penalty:
    streams = ()
    heads = {"policy": ("lm",)}
    statistics = ()

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def count(self, batch):
        return {}

    def measure(self, step):
        return {}

    def __call__(self, step):
        rows = step.batch.trained_rows()
        logp, entropy = step.head("lm").log_probabilities(
            step.hidden()[rows - 1], step.batch.tokens[rows], entropy=True
        )
        trained = step.normalizers["trained_tokens"]
        return Outcome(
            loss=(-logp - self.beta * entropy).sum() / trained,
            metrics={"entropy": (entropy.detach().sum(), float(len(rows)))},
            example_loss=step.batch.per_document(-logp.detach(), rows),
            example_tokens=step.batch.per_document((rows > 0).long(), rows),
        )
