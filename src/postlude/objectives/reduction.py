"""Sums and means over what belongs together: documents, units, groups, trajectories; over ranks where it must be.

Everything is a function of ids. A document and a unit are whole on one rank and in one micro-batch; the samples of
a group and the turns of a trajectory may lie on several ranks, and then their segments are made with a process
group, on which every rank takes part in every call (a rank may have nothing to bring).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from postlude.data.batch import PackedBatch


@dataclass(frozen=True)
class Segments:
    """Which of some values belong together."""

    index: Tensor
    """[values] int64: the segment of each value; values with the index ``len(ids)`` belong to none."""
    ids: Tensor
    """[segments] int64, ascending: what each segment is; the same on every rank of the process group."""
    process_group: dist.ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """[segments, ...]: the sum of each segment's values, [values, ...], over all ranks.

        Differentiable, where the loss is what the ranks' losses sum to: the backward pass is a collective, too, so
        every rank's loss must depend on the result, if only by a factor of zero.
        """
        rows = values.new_zeros(len(self.ids) + 1, *values.shape[1:]).index_add(0, self.index, values)[:-1]
        return rows if self.process_group is None else _SumOverRanks.apply(rows, self.process_group)

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """[segments]: the mean of each segment's values, [values], weighted by [values]; 0 where nothing weighs."""
        weights = torch.ones_like(values) if weights is None else weights
        below = self.sum(weights)
        return self.sum(values * weights) / below.where(below != 0, 1)

    def deviation(self, values: Tensor) -> Tensor:
        """[segments]: the standard deviation of each segment's values, [values], dividing by their number."""
        return self.mean((values - self.spread(self.mean(values))).square()).sqrt()

    def spread(self, of_segments: Tensor, fill: float = 0.0) -> Tensor:
        """[values, ...]: to each value what its segment has in [segments, ...], ``fill`` to those that have none."""
        none = of_segments.new_full((1, *of_segments.shape[1:]), fill)
        return torch.cat([of_segments, none])[self.index]


def segments(ids: Tensor, process_group: dist.ProcessGroup | None = None) -> Segments:
    """Segments of values with equal ids, [values] int64; negative ids belong to none."""
    known = torch.unique(ids[ids >= 0])
    if process_group is not None:
        known = torch.unique(torch.cat(_gather(known, process_group)))
    index = torch.searchsorted(known, ids)
    return Segments(index.where(ids >= 0, len(known)), known, process_group)


def by_document(batch: PackedBatch, rows: Tensor) -> Segments:
    """Segments of per-token values at the positions ``rows``, one for each document, empty ones too."""
    return Segments(batch.document[rows], torch.arange(batch.documents, device=rows.device))


def by_unit(batch: PackedBatch) -> Segments:
    """Segments of per-document values, one for each unit."""
    return Segments(batch.unit[: batch.documents], torch.arange(batch.units, device=batch.unit.device))


def by_group(batch: PackedBatch, process_group: dist.ProcessGroup | None = None) -> Segments:
    """Segments of per-document values: the samples of one prompt."""
    return segments(batch.group[: batch.documents], process_group)


def by_trajectory(batch: PackedBatch, process_group: dist.ProcessGroup | None = None) -> Segments:
    """Segments of per-document values: the turns of one episode."""
    return segments(batch.trajectory[: batch.documents], process_group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return _summed(values, process_group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.process_group), None


def _summed(values: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=process_group)
    return total


def _gather(values: Tensor, process_group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's [values], of any length each, in rank order."""
    world = dist.get_world_size(process_group)
    length = torch.tensor([len(values)], device=values.device)
    lengths = [torch.zeros_like(length) for _ in range(world)]
    dist.all_gather(lengths, length, group=process_group)
    longest = max(int(n) for n in lengths)
    padded = [values.new_zeros(longest) for _ in range(world)]
    own = values.new_zeros(longest)
    own[: len(values)] = values
    dist.all_gather(padded, own, group=process_group)
    return [row[: int(n)] for row, n in zip(padded, lengths, strict=True)]
