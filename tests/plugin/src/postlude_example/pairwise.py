"""Objectives that only tests use: they show that the trainer needs no change for what the next recipes want."""

from __future__ import annotations

import torch

from postlude.objectives.objective import Outcome


class Pairwise:
    """The chosen side of each pair should be likelier than the rejected: -log sigmoid of the difference, per pair."""

    streams = ()
    heads = {"policy": ("lm",)}
    statistics = ()

    def count(self, batch):
        return {"pairs": batch.units}

    def measure(self, step):
        return {}

    def __call__(self, step):
        batch = step.batch
        rows = batch.trained_rows()
        logp, _ = step.head("lm").log_probabilities(step.hidden()[rows - 1], batch.tokens[rows])
        by_document = batch.per_document(logp, rows)
        place, unit = batch.place[: batch.documents], batch.unit[: batch.documents]
        sign = 1.0 - 2.0 * place
        margins = by_document.new_zeros(batch.units).index_add(0, unit, by_document * sign)
        losses = -torch.nn.functional.logsigmoid(margins)
        return Outcome(
            loss=losses.sum() / step.normalizers["pairs"] + 0.0 * logp.sum(),
            metrics={"margin": (margins.detach().sum(), float(batch.units))},
        )


class ActorCritic:
    """A policy weighted by how much better a token's return is than a critic expects; the critic, another model
    with a scalar head and an optimiser of its own, learns the returns. The mean expectation of the whole step is
    taken off first, which is a statistic that couples the batch."""

    streams = ("return",)
    heads = {"policy": ("lm",), "critic": ("scalar",)}
    statistics = ("expected",)

    def count(self, batch):
        return {"trained": int((batch.weight > 0).sum())}

    def measure(self, step):
        rows = step.batch.trained_rows()
        return {"expected": step.head("scalar", "critic")(step.hidden("critic")[rows - 1]).sum()}

    def __call__(self, step):
        batch, trained = step.batch, step.normalizers["trained"]
        rows = batch.trained_rows()
        returns = batch.streams["return"][rows]
        values = step.head("scalar", "critic")(step.hidden("critic")[rows - 1])
        logp, _ = step.head("lm").log_probabilities(step.hidden()[rows - 1], batch.tokens[rows])
        advantages = returns - values.detach() - step.statistics["expected"] / trained
        critic = (values - returns).square().sum() / trained
        return Outcome(
            loss=-(logp * advantages).sum() / trained + critic,
            metrics={"value_error": ((values.detach() - returns).abs().sum(), float(len(rows)))},
        )
