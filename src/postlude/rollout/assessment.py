"""Groups that were answered become documents with all that is trained on: log-probabilities, values, advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from postlude.data.document import REFERENCE_LOGP, WEIGHT, Document, stream
from postlude.objectives.actor_critic import VALUE
from postlude.objectives.policy import BEHAVIOUR_LOGP, CORRECTION, OLD_LOGP
from postlude.rollout.algorithm import Algorithm, Scored
from postlude.rollout.answers import Group
from postlude.rollout.engine import EngineLost
from postlude.rollout.scoring import Score
from postlude.rollout.trajectory import Trajectory
from postlude.runs import tokens
from postlude.training.frozen import Assessor


@dataclass
class Assessment:
    """Makes documents of what was answered. Every rank does it with the same groups, and gets the same."""

    assessor: Assessor
    algorithm: Algorithm
    gap: float = 1e-3
    """How far the engine's log-probabilities may be from the policy's, on average."""
    correction: float | None = None
    """The bound of the correction for an engine that is not quite the policy; None takes it for the policy."""
    reference: str | None = None
    """The model that the policy is compared with."""
    critic: str | None = None
    """The model that says what was to be expected."""
    record_tokens: int = 0
    """Of every so many-th prompt the rollouts keep the tokens of the samples; 0 for none."""
    texts: Callable[[list[int]], Iterable[str]] = lambda ids: map(str, ids)
    """What each of the tokens of a sample adds to its text."""
    _compared: bool = field(default=False, init=False)
    """Whether the engine was found to have the policy's weights."""

    def take_over(self, before: Assessment) -> None:
        """Go on with what another, of which this one is an amendment, had found and learned."""
        self._compared = before._compared
        self.algorithm.take_over(before.algorithm)

    def of(self, groups: Sequence[Group], version: int) -> tuple[list[Document], dict[str, float]]:
        """The samples as documents with all the streams that are trained on, and the metrics of the round. The policy's
        weights are those after ``version`` steps."""
        samples = [sample for group in groups for sample in group]
        numbers = [number for number, group in enumerate(groups) for _ in group]
        documents = [sample.document(number) for sample, number in zip(samples, numbers, strict=True)]
        sampled = [{BEHAVIOUR_LOGP.name: d.streams[BEHAVIOUR_LOGP.name][d.streams[WEIGHT.name] > 0]} for d in documents]
        if documents:
            self._ask_models(documents, sampled)
        gaps = self._engine_gaps(samples, sampled, version)
        self._record(samples, documents)
        rewards = [sample.reward if sample.score is not None else 0.0 for sample in samples]
        more, metrics = self.algorithm.streams(Scored(rewards, numbers, sampled))
        whole = [
            _with_streams(document, {**before, **after})
            for document, before, after in zip(documents, sampled, more, strict=True)
        ]
        return whole, {**_measure(groups, version), **gaps, **metrics}

    def _ask_models(self, documents: Sequence[Document], sampled: Sequence[dict[str, np.ndarray]]) -> None:
        """Add to the streams of the sampled tokens what the models of the step say of them."""
        if self.correction is not None:
            for streams, old in zip(sampled, self.assessor.log_probabilities("policy", documents), strict=True):
                ratio = np.exp(old - streams[BEHAVIOUR_LOGP.name])
                streams |= {OLD_LOGP.name: old, CORRECTION.name: np.minimum(ratio, self.correction)}
        else:
            for streams in sampled:
                streams[OLD_LOGP.name] = streams[BEHAVIOUR_LOGP.name]
        if self.reference is not None:
            references = self.assessor.log_probabilities(self.reference, documents)
            for streams, reference in zip(sampled, references, strict=True):
                streams[REFERENCE_LOGP.name] = reference
        if self.critic is not None:
            for streams, value in zip(sampled, self.assessor.values(self.critic, documents), strict=True):
                streams[VALUE.name] = value

    def _record(self, samples: Sequence[Trajectory], documents: Sequence[Document]) -> None:
        """Keep for the rollouts what engine and policy say of each token of some samples."""
        every = self.record_tokens
        places = [place for place, sample in enumerate(samples) if every and sample.issue.number % every == 0]
        if not places:
            return
        measured = self.assessor.likelihoods("policy", [documents[place] for place in places])
        for sample, (logp, entropy) in zip((samples[place] for place in places), (m.T for m in measured), strict=True):
            behaviour = np.array(sample.logp)[sample.sampled]
            sample.recorded = tokens.told(
                list(self.texts(sample.tokens)), sample.sampled, sample.sampled_versions, behaviour, logp, entropy
            )

    def _engine_gaps(
        self, samples: Sequence[Trajectory], sampled: Sequence[Mapping[str, np.ndarray]], version: int
    ) -> dict[str, float]:
        """How far the engine's log-probabilities are from the policy's, over the tokens that its present weights
        sampled. EngineLost where that is at first more than the arithmetic explains: the engine has other weights.
        Later it is a case for an alarm."""
        if self.correction is None:
            return {}
        gaps = [
            np.abs(streams[OLD_LOGP.name] - streams[BEHAVIOUR_LOGP.name])[np.array(sample.sampled_versions) == version]
            for sample, streams in zip(samples, sampled, strict=True)
        ]
        all_gaps = np.concatenate(gaps) if gaps else np.zeros(0)
        if not len(all_gaps):
            return {}
        mean, worst = float(all_gaps.mean()), float(all_gaps.max())
        if mean > self.gap and not self._compared:
            raise EngineLost(
                f"The engine's log-probabilities are {mean:.3g} from the policy's on average over the first "
                f"{len(all_gaps)} tokens that it sampled, {worst:.3g} at worst; this precision explains "
                f"{self.gap:g}. It has not the policy's weights, or computes another model of them."
            )
        self._compared = True
        return {"engine_gap": mean, "engine_gap_worst": worst, "engine_gap_explained": self.gap}


def _measure(groups: Sequence[Group], version: int) -> dict[str, float]:
    samples = [sample for group in groups for sample in group]
    if not samples:
        return {}
    lengths = [sample.sampled_tokens for sample in samples]
    metrics = {
        "completion_tokens": float(np.mean(lengths)),
        "longest_completion": float(max(lengths)),
        "stopped": float(np.mean([sample.ended == "stop" for sample in samples])),
        "staleness": float(np.mean([version - sample.oldest_version for sample in samples])),
    }
    scores = [sample.score for sample in samples if isinstance(sample.score, Score)]
    if scores:
        rewards = [score.total for score in scores]
        alike = [len({sample.reward for sample in group}) == 1 for group in groups]
        metrics |= {
            "reward": float(np.mean(rewards)),
            "reward_deviation": float(np.std(rewards)),
            "groups_alike": float(np.mean(alike)),
            **{f"reward_{name}": float(np.mean([score.parts[name] for score in scores])) for name in scores[0].parts},
        }
    return metrics


def _with_streams(document: Document, sampled: Mapping[str, np.ndarray]) -> Document:
    """The document with streams given over its sampled tokens."""
    places = document.streams[WEIGHT.name] > 0
    streams = dict(document.streams)
    for name, values in sampled.items():
        row = np.full(len(document), stream(name).fill, stream(name).dtype)
        row[places] = values
        streams[name] = row
    return replace(document, streams=streams)
