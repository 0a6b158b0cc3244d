"""Choosing tokens: by temperature and nucleus, with randomness that has no history.

The number that chooses a token is a function of (seed, prompt id, sample, position). So a completion is the same
whatever else is sampled with it, in whatever order, and after any interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, prompt_id: str, sample: int) -> int:
    """64 bits that stand for one completion."""
    text = f"{seed}\x00{prompt_id}\x00{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniforms(keys: Sequence[int], position: int | Sequence[int]) -> np.ndarray:
    """Numbers in [0, 1), float64 [keys]: those at one position of the streams with these keys, or at one of each.

    SplitMix64 (Steele, Lea and Flood, 2014), whose n-th output needs none of those before it.
    """
    with np.errstate(over="ignore"):
        state = np.asarray(keys, dtype=np.uint64) + _GOLDEN * (np.asarray(position, dtype=np.uint64) + np.uint64(1))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose(logits: Tensor, numbers: np.ndarray, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """A token for each row of logits [rows, vocabulary], and its log-probability: both [rows].

    ``numbers`` [rows] in [0, 1) choose by the cumulated distribution: a small change of the logits changes few choices.
    The nucleus is that of Holtzman et al. (2020); the log-probability is the one before it is cut out.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, _at(logits.log_softmax(-1), tokens)
    log_probabilities = (logits / temperature).log_softmax(-1)
    probabilities = log_probabilities.double().exp()
    order: Tensor | None = None
    if top_p < 1:
        probabilities, order = probabilities.sort(stable=True, dim=-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    wanted = torch.from_numpy(numbers).to(total.device)[:, None] * total
    # Rounding must not lead past the last token that has a probability.
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulated, wanted, right=True).squeeze(-1)
    if order is not None:
        tokens = _at(order, tokens)
    return tokens, _at(log_probabilities, tokens)


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As :func:`choose`, at a temperature above 0, with numbers that a generator gives one after the other."""
    scaled = logits.float() / temperature
    tokens = torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(-1)
    return tokens, _at(scaled.log_softmax(-1), tokens)


def _at(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.gather(-1, columns[:, None]).squeeze(-1)
