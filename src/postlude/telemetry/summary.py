"""What came out of each stage, in a few numbers, read from the run directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from postlude.runs import Run, Stage, State, missing
from postlude.storage import CorruptError
from postlude.telemetry import events

if TYPE_CHECKING:
    from postlude.runs.columns import Columns

    ColumnsOf = Callable[[Stage], Columns]


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
    damages: tuple[str, ...] = ()
    """What of its files is not what was written: no number is told of that."""

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


def summarize(run: Run, names: Sequence[str] | None = None, columns_of: ColumnsOf | None = None) -> list[StageSummary]:
    """The summary of each stage; of those that have begun if no names are given. Who follows the run gives the columns
    that it keeps."""
    try:
        happened = events.read(run.events)
    except CorruptError:  # who shows events tells it
        happened = []
    stages = [run.stage(name) for name in names or [stage.name for stage in run.stages()]]
    return [_summary(stage, happened, columns_of or _new_columns) for stage in stages]


def _new_columns(stage: Stage) -> Columns:
    from postlude.runs.columns import Columns  # numpy, which who only shows progress does not need

    return Columns(stage.metrics)


def _summary(stage: Stage, happened: Sequence[events.Event], columns_of: ColumnsOf) -> StageSummary:
    name = stage.name
    status = stage.status()
    damages = [status.damage] if status.damage else []
    damages += missing(stage, deep=False)
    columns = columns_of(stage)
    try:
        columns.update()
    except CorruptError as error:
        damages.append(str(error))
        columns = _new_columns(stage)
    steps, losses = columns.steps, columns.column("loss")[1].tolist()
    held_out: dict[str, tuple[float, float]] = {}
    rewards: dict[str, tuple[float, float]] = {}
    for event in happened:
        if isinstance(event, events.Evaluation) and event.stage == name:
            curves, value = (rewards, event.metrics.get("reward")) if event.loss is None else (held_out, event.loss)
            if value is not None:
                curves[event.name] = (curves.get(event.name, (value,))[0], value)
    return StageSummary(
        stage=name,
        state=status.state,
        steps=int(steps[-1]) if len(steps) else 0,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        held_out_losses=held_out,
        held_out_rewards=rewards,
        tokens=int(columns.column("tokens")[1].sum()),
        seconds=float(columns.column("seconds")[1].sum()),
        damages=tuple(damages),
    )
