"""How a stage's work ended, in terms that need no torch: it goes to a controller that has none."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Summary:
    """How a call to :meth:`postlude.training.trainer.Trainer.fit`, or the work of a stage, ended."""

    steps: int
    interrupted: bool = False
    first_loss: float | None = None
    last_loss: float | None = None
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    """Losses on held-out data by name, in the order they were measured during this call."""
