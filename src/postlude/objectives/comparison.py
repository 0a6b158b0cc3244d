"""What a student's distribution is compared with, a chunk of rows at a time: the arithmetic under the divergences.

With p the teacher's distribution and q the student's, both at the temperature, u the student's logits divided by it and
m = beta p + (1 - beta) q (Agarwal et al., 2023; the meaning of ``beta`` is theirs and TRL's):

- ``forward_kl``: D = sum_j p_j log(p_j / q_j), and its gradient by u is q - p;
- ``reverse_kl``: D = sum_j q_j r_j with r = log(q / p), and the gradient is q (r - D);
- ``jsd``: D = beta KL(p || m) + (1 - beta) KL(q || m), and with s = log(q / m) it is (1 - beta) q (s - KL(q || m)).

A comparison is made in two passes over the tiles of a chunk, because the gradient needs sums over the whole row.
Everything is done in the two buffers that held the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from postlude.objectives.logits import LogitChunks

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class AtPlaces:
    """Values at a few tokens of each row."""

    places: Tensor
    """[rows, n] columns."""
    values: Tensor
    """[rows, n]."""
    logits: Tensor
    """[rows, n] the logits there."""


class Distances(NamedTuple):
    """What the first pass finds out about a chunk of rows."""

    divergence: Tensor
    """[rows, 1]."""
    agrees: Tensor
    """[rows, 1], whether both think the same token the likeliest."""
    apart: AtPlaces | None = None
    """Those of the exponentials that are not among the others: zero stands there."""


class Comparison(Protocol):
    """One chunk of rows at a time: :meth:`measure` first, then :meth:`gradient` for each tile."""

    def measure(self, rows: slice, logits: Tensor, peak: Tensor, tiles: Sequence[slice]) -> Distances:
        """Compare; ``logits`` [rows, vocabulary] become ``exp(logits - peak)`` in place, but for what is set apart."""

    def gradient(self, tile: slice, part: Tensor, share: Tensor) -> None:
        """Make ``share`` [rows, 1] times the gradient of a tile's logits of what :meth:`measure` left there."""

    def gradient_apart(self, share: Tensor) -> AtPlaces | None:
        """The same at the places that were set apart."""


class LiveComparison:
    """With the logits of a teacher, over the first ``shared`` tokens; the student's others take no part."""

    def __init__(self, kind: Kind, beta: float, teacher: LogitChunks, hidden: Tensor, shared: int) -> None:
        self.kind, self.beta, self.shared = kind, beta, shared
        self._teacher, self._hidden = teacher, hidden

    def measure(self, rows: slice, logits: Tensor, peak: Tensor, tiles: Sequence[slice]) -> Distances:
        self._theirs, their_peak = self._teacher.compute(self._hidden[rows].to(self._teacher.product))
        likeliest = self._theirs.argmax(1, keepdim=True)
        agrees = logits.gather(1, likeliest) == peak
        self._total, self._their_total = torch.zeros_like(peak), torch.zeros_like(peak)
        crossed = torch.zeros_like(peak)
        for tile in self._within(tiles):
            ours, theirs = logits[:, tile].sub_(peak), self._theirs[:, tile].sub_(their_peak)
            if self.kind == "forward_kl":
                difference = theirs - ours
                self._their_total += theirs.exp_().sum(1, keepdim=True)
                self._total += ours.exp_().sum(1, keepdim=True)
                crossed += difference.mul_(theirs).sum(1, keepdim=True)
            elif self.kind == "reverse_kl":
                self._their_total += theirs.exp().sum(1, keepdim=True)
                torch.sub(ours, theirs, out=theirs)
                self._total += ours.exp_().sum(1, keepdim=True)
                crossed += (ours * theirs).sum(1, keepdim=True)
            else:
                self._their_total += theirs.exp_().sum(1, keepdim=True)
                self._total += ours.exp_().sum(1, keepdim=True)
        logits[:, self.shared :].sub_(peak).exp_()
        normalizers = self._total.log() - self._their_total.log()
        if self.kind == "forward_kl":
            return Distances(crossed / self._their_total + normalizers, agrees)
        if self.kind == "reverse_kl":
            self._mean = crossed / self._total
            return Distances(self._mean - normalizers, agrees)
        return Distances(self._mixture(logits, tiles), agrees)

    def _mixture(self, logits: Tensor, tiles: Sequence[slice]) -> Tensor:
        """The divergence from the mixture; leaves log(q / m) in the teacher's buffer."""
        tiny = torch.finfo(logits.dtype).tiny
        to_theirs, to_ours = torch.zeros_like(self._total), torch.zeros_like(self._total)
        for tile in self._within(tiles):
            theirs, ours = self._theirs[:, tile].div_(self._their_total), logits[:, tile] / self._total
            mixture = torch.lerp(ours, theirs, self.beta).clamp_min_(tiny)
            to_theirs += (theirs / mixture).clamp_min_(tiny).log_().mul_(theirs).sum(1, keepdim=True)
            torch.div(ours, mixture, out=theirs).clamp_min_(tiny).log_()
            to_ours += ours.mul_(theirs).sum(1, keepdim=True)
        self._mean = to_ours
        return self.beta * to_theirs + (1 - self.beta) * to_ours

    def gradient(self, tile: slice, part: Tensor, share: Tensor) -> None:
        inside = max(0, min(tile.stop, self.shared) - tile.start)
        part[:, inside:] = 0
        ours, theirs = part[:, :inside], self._theirs[:, tile.start : tile.start + inside]
        if self.kind == "forward_kl":
            ours.mul_(share / self._total).addcmul_(theirs, -share / self._their_total)
            return
        factor = share if self.kind == "reverse_kl" else share * (1 - self.beta)
        ours.mul_(theirs.sub_(self._mean)).mul_(factor / self._total)

    def gradient_apart(self, share: Tensor) -> AtPlaces | None:
        return None

    def _within(self, tiles: Sequence[slice]) -> list[slice]:
        return [slice(tile.start, min(tile.stop, self.shared)) for tile in tiles if tile.start < self.shared]


class StoredComparison:
    """With the largest k log-probabilities of a teacher; all other tokens are one outcome, the rest.

    ``ids`` is [rows, k] and ``logp`` [rows, k + 1], the last the logarithm of the rest's mass. What is computed is the
    divergence D' of the k + 1 outcomes, which lumping makes smaller: with p_0 and q_0 the masses of the rest, p' and q'
    the distributions within it, and m_0 = beta p_0 + (1 - beta) q_0, the chain rule gives

    - ``forward_kl``: D - D' = p_0 KL(p' || q'), between 0 and 2 c p_0 where |log(p_j / q_j)| <= c for all tokens j of
      the rest;
    - ``reverse_kl``: D - D' = q_0 KL(q' || p'), between 0 and 2 c q_0;
    - ``jsd``: D - D' = m_0 JSD(p', q') with the weight w = beta p_0 / m_0, between 0 and m_0 h(w), where
      h(w) = -w log w - (1 - w) log(1 - w) <= log 2, whatever the rest holds.

    With k the whole vocabulary there is no rest and the result is exact.
    """

    def __init__(self, kind: Kind, beta: float, ids: Tensor, logp: Tensor) -> None:
        self.kind, self.beta, self._ids, self._logp = kind, beta, ids.long(), logp

    def measure(self, rows: slice, logits: Tensor, peak: Tensor, tiles: Sequence[slice]) -> Distances:
        tiny = torch.finfo(logits.dtype).tiny
        self._places = self._ids[rows]
        self._kept = logits.gather(1, self._places)
        agrees = self._kept[:, :1] == peak
        for tile in tiles:
            logits[:, tile].sub_(peak).exp_()
        kept = (self._kept - peak).exp_()
        # The rest is summed by itself, and keeps a gradient of its own: differences from the kept would be rounding.
        logits.scatter_(1, self._places, 0.0)
        rest = torch.zeros_like(peak)
        for tile in tiles:
            rest += logits[:, tile].sum(1, keepdim=True)
        self._total = rest + kept.sum(1, keepdim=True)
        self._q = torch.cat([kept, rest], 1) / self._total
        p = self._logp[rows].to(self._q).exp()
        log_p, log_q = p.clamp_min(tiny).log(), self._q.clamp_min(tiny).log()
        if self.kind == "forward_kl":
            # The slope by each outcome's probability, -p / q, times that probability is all that is ever needed.
            divergence, self._slope = (p * (log_p - log_q)).sum(1, keepdim=True), -p / self._q.clamp_min(tiny)
        elif self.kind == "reverse_kl":
            divergence, self._slope = (self._q * (log_q - log_p)).sum(1, keepdim=True), log_q - log_p
        else:
            log_m = torch.lerp(self._q, p, self.beta).clamp_min(tiny).log()
            to_theirs = (p * (log_p - log_m)).sum(1, keepdim=True)
            to_ours = (self._q * (log_q - log_m)).sum(1, keepdim=True)
            divergence = self.beta * to_theirs + (1 - self.beta) * to_ours
            self._slope = (1 - self.beta) * (log_q - log_m)
        self._slope = self._slope - (self._q * self._slope).sum(1, keepdim=True)
        return Distances(divergence, agrees, AtPlaces(self._places, kept, self._kept))

    def gradient(self, tile: slice, part: Tensor, share: Tensor) -> None:
        part.mul_(share * self._slope[:, -1:] / self._total)

    def gradient_apart(self, share: Tensor) -> AtPlaces:
        return AtPlaces(self._places, share * self._q[:, :-1] * self._slope[:, :-1], self._kept)
