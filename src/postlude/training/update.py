"""How far an optimiser moves the weights, as a share of them: found in a sample, and nothing is changed by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from postlude.model.mesh import Mesh, divided_along, own_part

SAMPLED = 2**20
"""About so many weights are looked at, of all ranks together: each, or every so many-th one in its tensor."""


class Sample:
    """Weights as they are before a step. Of a model that ranks hold together each looks at its own part."""

    @torch.no_grad()
    def __init__(self, parameters: Sequence[torch.nn.Parameter], mesh: Mesh | None) -> None:
        every = max(1, sum(parameter.numel() for parameter in parameters) // SAMPLED)  # numel is that of the whole
        divided = [each for each in parameters if divided_along(each, "tensor")] if mesh is not None else []
        whole = [each for each in parameters if not divided_along(each, "tensor")] if divided else parameters
        kinds = [[own_part(each) for each in kind] for kind in (whole, divided)]
        self._kinds, self._every, self._mesh = kinds, every, mesh
        self._before = [self._values(kind) for kind in kinds]

    @torch.no_grad()
    def moved(self) -> float | None:
        """The norm of what was added to the weights since, over theirs before; None where they were zero. Every rank
        calls it, and gets the same."""
        squares = torch.zeros(2, 2, dtype=torch.float64)  # of what is whole along the tensor dimension, and divided
        for place, (kind, before) in enumerate(zip(self._kinds, self._before, strict=True)):
            if kind:
                squares[place] = torch.stack([(self._values(kind) - before).norm(), before.norm()]).double().square()
        if self._mesh is not None:
            self._mesh.sum_over_shards(squares)
            self._mesh.sum_over_tensor(squares[1:])
        update, weights = squares.sum(0).sqrt().tolist()
        return update / weights if weights else None

    def _values(self, parts: Sequence[Tensor]) -> Tensor:
        """A copy."""
        rows = [part.reshape(-1) for part in parts] or [torch.empty(0)]
        return torch.cat(rows if self._every == 1 else [row[:: self._every] for row in rows])
