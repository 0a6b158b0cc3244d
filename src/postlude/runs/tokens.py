"""The tokens of a sample, as a line of the rollouts keeps them: compact, since a sample has thousands."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

_FLOAT = np.dtype("<f4")


@dataclass(frozen=True)
class Tokens:
    """Of each token of a sample, the prompt's too. What is told of sampled ones alone is NaN, or -1, of the others."""

    texts: Sequence[str]
    sampled: np.ndarray
    """Whether it was sampled, and is trained; else it was given."""
    versions: np.ndarray
    """Of the weights that sampled it."""
    engine_logp: np.ndarray
    trainer_logp: np.ndarray
    entropy: np.ndarray
    """Nats."""

    @property
    def ratio(self) -> np.ndarray:
        """How much likelier the trainer finds it than the engine."""
        ratio: np.ndarray = np.exp(self.trainer_logp - self.engine_logp)
        return ratio

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Tokens | None:
        """Those of a line; None where it keeps none. ValueError where they do not fit together."""
        if line.get("token_texts") is None:
            return None
        runs = line["token_runs"]
        sampled = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        versions = np.full(len(sampled), -1, np.int64)
        pairs = np.array(line["token_versions"], np.int64).reshape(-1, 2)
        versions[sampled] = np.repeat(*pairs.T)
        columns = []
        for name in ("engine_logp", "trainer_logp", "entropy"):
            column = np.full(len(sampled), np.nan, np.float32)
            column[sampled] = np.frombuffer(base64.b64decode(line[name], validate=True), _FLOAT)
            columns.append(column)
        if len(line["token_texts"]) != len(sampled):
            raise ValueError(f"{len(line['token_texts'])} tokens have a text, and {len(sampled)} were counted")
        return cls(line["token_texts"], sampled, versions, *columns)


def told(
    texts: Sequence[str],
    sampled: Sequence[bool],
    versions: Sequence[int],
    engine_logp: np.ndarray,
    trainer_logp: np.ndarray,
    entropy: np.ndarray,
) -> dict[str, Any]:
    """What a line keeps; all but the first two are of the sampled tokens."""
    runs = [(is_sampled, len(list(run))) for is_sampled, run in groupby(sampled)]
    first = [0] if runs and runs[0][0] else []
    of_versions = [(version, len(list(run))) for version, run in groupby(versions)]
    columns = {"engine_logp": engine_logp, "trainer_logp": trainer_logp, "entropy": entropy}
    return {
        "token_texts": list(texts),
        "token_runs": [*first, *(count for _, count in runs)],
        "token_versions": [number for pair in of_versions for number in pair],
        **{name: base64.b64encode(np.asarray(v, _FLOAT).tobytes()).decode() for name, v in columns.items()},
    }
