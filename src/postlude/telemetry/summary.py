"""What came out of each stage, in a few numbers, read from the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from postlude.runs import Run, State
from postlude.telemetry import events


@dataclass(frozen=True)
class StageSummary:
    """One stage in a few numbers."""

    stage: str
    state: State
    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    held_out_losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The first and the last loss on each held-out data set."""
    held_out_rewards: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The first and the last mean reward on each held-out data set whose prompts are answered."""
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


def summarize(run: Run, names: Sequence[str] | None = None) -> list[StageSummary]:
    """The summary of each stage; of those that have begun if no names are given."""
    happened = events.read(run.events)
    return [_summary(run, name, happened) for name in names or [stage.name for stage in run.stages()]]


def _summary(run: Run, name: str, happened: Sequence[events.Event]) -> StageSummary:
    stage = run.stage(name)
    lines = stage.metrics.read()
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    held_out: dict[str, tuple[float, float]] = {}
    rewards: dict[str, tuple[float, float]] = {}
    for event in happened:
        if isinstance(event, events.Evaluation) and event.stage == name:
            curves, value = (rewards, event.metrics.get("reward")) if event.loss is None else (held_out, event.loss)
            if value is not None:
                curves[event.name] = (curves.get(event.name, (value,))[0], value)
    return StageSummary(
        stage=name,
        state=stage.status().state,
        steps=lines[-1]["step"] if lines else 0,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        held_out_losses=held_out,
        held_out_rewards=rewards,
        tokens=sum(line.get("tokens", 0) for line in lines),
        seconds=sum(line.get("seconds", 0.0) for line in lines),
    )
