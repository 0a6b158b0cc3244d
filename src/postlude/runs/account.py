"""What a checkpoint, or a finished stage, stands for beside its own files: how far each journal of the stage goes, and
how many losses by example there are. It is kept in the checkpoint's small state, and in the state of a finished stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from postlude import storage
from postlude.runs import examples
from postlude.runs.stage import Stage

_EXAMPLES, EVENTS = "examples", "events"


class Account:
    """Gathers, on the leading rank, what the next checkpoint stands for. ``examples`` stand there already."""

    def __init__(self, stage: Stage, events: storage.Journal, examples: int) -> None:
        self._examples = examples
        journals = {**_journals(stage), EVENTS: events}
        self._followers = {
            name: storage.Follower(journal) for name, journal in journals.items() if storage.is_local(journal.uri)
        }
        for follower in self._followers.values():
            follower.pass_over_long()  # the checkpoints before have it

    def take(self, examples: int) -> dict[str, Any]:
        """The account of this moment, when all that was told is on the disk: so many losses by example in this life."""
        extents = {name: follower.extent().to_json() for name, follower in self._followers.items()}
        return {**extents, _EXAMPLES: self._examples + examples}


def final_account(stage: Stage, events: storage.Journal) -> dict[str, Any]:
    """What a finished stage stands for: of the events those that no checkpoint has are kept with it."""
    extents = {name: storage.extent_of(journal) for name, journal in _journals(stage).items()}
    before = _extents(_accounts(stage)[:1], EVENTS)
    extents[EVENTS] = storage.extent_of(events, after=before[0].lines if before else 0)
    rows, _ = examples.count(stage.examples)
    return {**{name: extent.to_json() for name, extent in extents.items() if extent}, _EXAMPLES: rows}


def _accounts(stage: Stage, step: int | None = None) -> list[Mapping[str, Any]]:
    """Those of the checkpoints, before a step if one is given, newest first."""
    accounts = []
    for checkpoint in stage.checkpoints():
        if step is None or checkpoint.step < step:
            with suppress(storage.StorageError):  # what cannot be read cannot help
                accounts.append(storage.read_marker(checkpoint.uri).extra.get("account", {}))
    return accounts


def settle(stage: Stage, step: int, account: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Bring the journals of a stage to hold what the account of the checkpoint of a step says, with the help of earlier
    ones. What was written again, and what is lost.

    CorruptError where an amendment is lost: the result follows from those.
    """
    restored, lost = [], []
    for name, journal in _journals(stage).items():
        extent = storage.read_extent(account.get(name))
        if extent is None or extent.holds(journal.lines()):
            continue
        what = f"'{journal.uri}' is not what was written: it had {extent.lines:,} lines."
        if storage.restore(journal, [extent, *_extents(_accounts(stage, step), name)]):
            restored.append(f"{what} They were written again from the checkpoint.")
        elif name == "amendments":
            raise storage.CorruptError(f"{what} {journal.remedy}")
        else:
            lost.append(what)
    return restored, lost


def missing(stage: Stage, deep: bool) -> Iterator[str]:
    """What a stage has lost of what it stands for, if it is finished, or of what its newest checkpoint stands for.
    ``deep``: what is long is read, too."""
    is_done = stage.status().state == "done"
    account = _standing(stage)
    remedy = "Put it back as it was." if is_done else "`postlude run` writes it again where a checkpoint has it."
    for name, journal in _journals(stage).items():
        extent = storage.read_extent(account.get(name))
        if extent is None or (name == "rollouts" and not deep):
            continue
        if not extent.holds(journal.lines()):
            yield f"'{journal.uri}' is not what was written: it had {extent.lines:,} lines. {remedy}"
    if deep and _EXAMPLES in account:
        rows, damages = examples.count(stage.examples, deep=True)
        yield from damages
        if rows != account[_EXAMPLES]:
            yield f"'{stage.examples}' holds {rows:,} losses by example where {account[_EXAMPLES]:,} were written."


def _standing(stage: Stage) -> Mapping[str, Any]:
    """The account of a finished stage, or of its newest checkpoint; empty where none is known."""
    if "account" in (details := stage.status().details):
        return details["account"]
    for checkpoint in stage.checkpoints()[:1]:
        with suppress(storage.StorageError):
            return storage.read_marker(checkpoint.uri).extra.get("account", {})
    return {}


def settle_events(events: storage.Journal, stages: Iterable[Stage]) -> str | None:
    """Write lines of a run's events again that its finished stages and checkpoints stand for. What was wrong, or
    None."""
    accounts = (
        account for stage in stages for account in (stage.status().details.get("account", {}), *_accounts(stage))
    )
    extents = sorted(_extents(accounts, EVENTS), key=lambda extent: extent.lines, reverse=True)
    if not extents or extents[0].holds(events.lines()):
        return None
    what = f"'{events.uri}' is not what was written: it had {extents[0].lines:,} lines, or more."
    again = storage.restore(events, extents)
    return what + (" They were written again." if again else " Nothing else has what is missing.")


def _extents(accounts: Iterable[Mapping[str, Any]], name: str) -> list[storage.Extent]:
    return [extent for account in accounts if (extent := storage.read_extent(account.get(name)))]


def _journals(stage: Stage) -> dict[str, storage.Journal]:
    return {"metrics": stage.metrics, "rollouts": stage.rollouts, "amendments": stage.amendments}
