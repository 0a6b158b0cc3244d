"""The prompt ledger: which prompts were issued, and what became of each. Every one is trained or dropped, once.

Notable:

- Prompts are drawn from the data sets' order, which is a pure function of seed, epoch and position; so the ledger is a
  count of draws, and the few that are open. A draw is a record; its number in the order is what it is known by.
- What is open when the state is saved is issued again, first and in the same order, by whoever continues from there.
- The outcome of each stands in the stage's rollouts, too, which a resume cuts back to the step that it continues from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from pydantic import ConfigDict

from postlude.data.dataset import Dataset
from postlude.data.mixture import Mixture
from postlude.data.order import SourceOrder
from postlude.errors import DataError
from postlude.storage import Line
from postlude.storage.schema import KEY


@dataclass(frozen=True)
class Issue:
    """A record that was drawn for its prompt."""

    number: int
    """How many draws came before it in this stage."""
    epoch: int
    source: str
    """The name of the data set."""
    group: int
    position: int
    """Where in the data set it is."""


class LedgerState(Line):
    """The ledger in a checkpoint: where to continue. What became of each prompt before stands in the rollouts."""

    model_config = ConfigDict(extra="forbid")

    draws: int
    """Prompts issued so far."""
    epoch: int
    """That the next draw belongs to."""
    cursors: Mapping[str, int]
    """Draws so far, by data set."""
    again: Sequence[Sequence[Any]]
    """What was open and is issued again: number, epoch, data set, group of files and position of each."""
    open: Sequence[Sequence[Any]]
    """What was open and is kept elsewhere in the checkpoint, alike."""
    trained: int
    """Prompts that were trained."""
    dropped: Mapping[str, int]
    """Prompts that were dropped, by the reason."""
    rows: Mapping[str, int]
    """Records, by data set."""
    mixture: Sequence[Sequence[Any]] | None = None
    """The weights with the draws from which they hold, where an amendment has changed them."""


class Ledger:
    """Issues the prompts of a mixture of data sets, for so many ``epochs`` or without end, and keeps account of them.

    DataError for a data set without records.
    """

    def __init__(
        self, sources: Mapping[str, Dataset], weights: Mapping[str, float], seed: int, epochs: int | None
    ) -> None:
        self.rows = {name: sum(source.groups) for name, source in sources.items()}
        for name, rows in self.rows.items():
            if not rows:
                raise DataError(f"The data set '{name}' has no records to ask with. Look at its source and filters.")
        self._mixture = Mixture(seed, self.rows, weights)
        self._orders = {
            name: SourceOrder(seed, name, source.groups, source.files, source.seekable)
            for name, source in sources.items()
        }
        self._epochs = epochs
        self.end: int | None = None
        """The number of draws after which the stage is over."""
        self.issued = 0
        """Draws so far."""
        self._epoch = 0
        self._count_draws()
        self._cursors = dict.fromkeys(self._mixture.names, 0)
        self._again: list[Issue] = []
        """What was open in the state that this continues from."""
        self._open: dict[int, Issue] = {}
        self.trained = 0
        """Prompts."""
        self.dropped: Counter[str] = Counter()
        """Prompts, by the reason."""

    @property
    def settled(self) -> int:
        """Prompts that were trained or dropped so far."""
        return self.trained + self.dropped.total()

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing left to issue."""
        return not self._again and self.issued == self.end

    @property
    def progress(self) -> float | None:
        """The share of the draws that are settled, 0 to 1; None without an end."""
        waiting = len(self._open) + len(self._again)
        return None if self.end is None else (self.issued - waiting) / self.end

    def issue(self, count: int) -> list[Issue]:
        """The next draws; fewer at the end."""
        issues = self._again[:count]
        self._again = self._again[count:]
        while len(issues) < count and self.issued != self.end:
            issues.append(self._draw())
        self._open.update({issue.number: issue for issue in issues})
        return issues

    def settle(self, issue: Issue, reason: str | None = None) -> None:
        """Note that a draw was trained, or dropped for a ``reason``. KeyError for one that is not open."""
        del self._open[issue.number]
        if reason is None:
            self.trained += 1
        else:
            self.dropped[reason] += 1

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Draw with other weights from the next draw on."""
        if weights != self._mixture.weights:
            self._mixture.reweigh(self.issued, weights)
            self._count_draws()

    def _count_draws(self) -> None:
        self._epoch_end = self._mixture.epoch_end(self._epoch)
        self.end = None if self._epochs is None else self._mixture.epoch_end(self._epochs - 1)

    def state(self, but: Sequence[Issue] = ()) -> dict[str, Any]:
        """Where to continue, as :class:`LedgerState` and JSON: what is open will be issued again, except ``but`` those
        that are kept elsewhere and count as settled when they are continued from."""
        kept = {issue.number for issue in but}
        again = [*self._open.values(), *self._again]
        state = {
            "draws": self.issued,
            "epoch": self._epoch,
            "cursors": dict(self._cursors),
            "again": [astuple(issue) for issue in sorted(again, key=lambda i: i.number) if issue.number not in kept],
            "open": [astuple(issue) for issue in but],
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "rows": self.rows,
            **({"mixture": changed} if (changed := self._mixture.state()) else {}),
        }
        return LedgerState.stamp(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. DataError if the data sets hold other rows than then; NewerSchema."""
        LedgerState.check_version(state.get(KEY, 1), "The ledger of prompts in the checkpoint")
        if state["rows"] != self.rows:
            raise DataError(
                f"The data are not those that the run was stopped with: then records by data set were {state['rows']}, "
                f"now they are {self.rows}, so the prompts cannot be continued. Restore the data, or start a new run."
            )
        self.issued, self._epoch = state["draws"], state["epoch"]
        self._mixture.load(state.get("mixture", []))
        self._count_draws()
        self._cursors = dict(state["cursors"])
        self._again = [Issue(*issue) for issue in state["again"]]
        self._open = {issue[0]: Issue(*issue) for issue in state["open"]}
        self.trained, self.dropped = state["trained"], Counter(state["dropped"])

    def _draw(self) -> Issue:
        source = self._mixture.names[int(self._mixture.choices(self.issued, 1)[0])]
        [(group, positions)] = self._orders[source].draws(self._cursors[source], 1)
        issue = Issue(self.issued, self._epoch, source, group, int(positions[0]))
        self.issued += 1
        self._cursors[source] += 1
        if self.issued == self._epoch_end:
            self._epoch += 1
            self._epoch_end = self._mixture.epoch_end(self._epoch)
        return issue
