"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024): answers of which each is wanted or not, without pairs.

Where x is an answer's log-probability under the policy less that under the reference, both summed over its tokens, and
s the logistic function, the loss of a step is the mean over its documents of

    desirable_weight (1 - s(b (x - z)))      for a wanted answer,
    undesirable_weight (1 - s(b (z - x)))    for an unwanted one.

z estimates the divergence of the policy from the reference: the mean of x over answers put to prompts that are not
theirs, not below zero, over the whole step. A document takes the answer of the one before it in its block, the first
that of the last; a document alone in its block takes none. So z does not depend on micro-batches or workers. No
gradient goes through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from postlude.data.batch import PackedBatch
from postlude.data.document import SCORE, WEIGHT
from postlude.objectives.answers import divergence, likelihood, reference_likelihood, trained_counts
from postlude.objectives.objective import Objective, Outcome, Step


@dataclass(frozen=True)
class KahnemanTversky(Objective):
    """The objective; the stream ``score`` is 1 for a wanted answer and -1 for an unwanted one."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    heads = {"policy": ("lm",), "reference": ("lm",)}
    streams = (SCORE.name,)
    statistics = ("mismatched_sum", "mismatched_answers")

    def count(self, batch: PackedBatch) -> Mapping[str, float]:
        return {"answers": float(batch.documents)}

    def measure(self, step: Step) -> Mapping[str, float]:
        other = mismatch(step.batch)
        if other is None:
            return {"mismatched_sum": 0.0, "mismatched_answers": 0.0}
        mixed = step.on(other)
        ratios = likelihood(mixed).documents - reference_likelihood(mixed, stored=False).documents
        return {"mismatched_sum": float(ratios.double().sum()), "mismatched_answers": float(len(ratios))}

    def __call__(self, step: Step) -> Outcome:
        batch = step.batch
        estimate = step.statistics["mismatched_sum"] / max(step.statistics["mismatched_answers"], 1.0)
        floor = max(estimate, 0.0)
        reference, policy = reference_likelihood(step, stored=False), likelihood(step)
        ratios = policy.documents - reference.documents
        wanted = labels(batch) > 0
        weights = torch.where(wanted, self.desirable_weight, self.undesirable_weight)
        signed = torch.where(wanted, ratios - floor, floor - ratios)
        losses = weights * torch.sigmoid(-self.beta * signed)
        rewards = (self.beta * ratios).detach()
        return Outcome(
            loss=losses.sum() / step.normalizers["answers"] + 0.0 * policy.tokens.sum(),
            metrics={
                "chosen_reward": (rewards[wanted].sum(), float(wanted.sum())),
                "rejected_reward": (rewards[~wanted].sum(), float((~wanted).sum())),
                "accuracy": ((rewards > self.beta * floor).eq(wanted).double().sum(), float(len(rewards))),
                "baseline": (rewards.new_tensor(floor * len(rewards)), float(len(rewards))),
                "divergence": divergence([policy], [reference]),
            },
            example_loss=losses.detach(),
            example_tokens=trained_counts(batch),
        )


def labels(batch: PackedBatch) -> Tensor:
    """[documents]: the score of each document, which stands at all of its tokens."""
    starts = batch.lengths[: batch.documents].cumsum(0) - batch.lengths[: batch.documents]
    return batch.streams[SCORE.name][starts.long()]


def mismatch(batch: PackedBatch) -> PackedBatch | None:
    """Each document's prompt, all before its first trained token, with the answer of the one before it in its block.

    None if no block has two documents.
    """
    lengths = batch.lengths[: batch.documents].tolist()
    weight = batch.weight
    prompts, answers = [], []
    for places in torch.arange(sum(lengths), device=weight.device).split(lengths):
        trained = weight[places].nonzero()
        begin = int(trained[0]) if len(trained) else len(places)
        prompts.append(places[:begin])
        answers.append(places[begin:])
    by_block: dict[int, list[int]] = {}
    for document, block in enumerate(batch.block[: batch.documents].tolist()):
        by_block.setdefault(block, []).append(document)
    mixed = [
        (document, several[place - 1])
        for several in by_block.values()
        if len(several) > 1
        for place, document in enumerate(several)
    ]
    if not mixed:
        return None
    parts = [torch.cat([prompts[document], answers[other]]) for document, other in mixed]
    places = torch.cat(parts)
    sizes = torch.tensor([len(part) for part in parts], device=places.device)
    documents = torch.arange(len(mixed), device=places.device)
    chosen = torch.tensor([document for document, _ in mixed], device=places.device)
    return replace(
        batch,
        tokens=batch.tokens[places],
        positions=torch.cat([torch.arange(len(part), device=places.device) for part in parts]),
        lengths=sizes.to(batch.lengths.dtype),
        streams={WEIGHT.name: weight[places]},  # those of a prompt are zero
        document=documents.repeat_interleave(sizes),
        unit=documents,
        place=torch.zeros_like(documents),
        block=batch.block[chosen],
        group=batch.group[chosen],
        trajectory=batch.trajectory[chosen],
        example_ids=tuple(batch.example_ids[document] for document, _ in mixed),
        sources=tuple(batch.sources[document] for document, _ in mixed),
    )
