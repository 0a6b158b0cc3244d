"""What a policy answered, to be looked at: an index of a stage's rollouts, kept up while it runs.

Of each line it is held where it stands and the few numbers by which one chooses, not what it says: that is read again,
by ranges of bytes, for the groups that are shown. A group are the samples of one prompt in one draw; a prompt that was
never answered is a group without samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from postlude import storage

Sort = Literal["step", "reward", "spread", "advantage", "tokens", "staleness"]

_UNKNOWN = -2
"""A whole number that was not told; a version may be -1."""
_TRAINED = 2**31 - 1
"""The number of the word, above those of all others: a group is trained of which a sample is."""

_LINE = np.dtype(
    [
        ("line", np.int64),  # of the journal
        ("place", np.int32),
        ("start", np.int64),
        ("bytes", np.int32),
        ("number", np.int32),  # of the line in its file
        ("step", np.int32),
        ("issue", np.int64),
        ("epoch", np.int32),
        ("prompt", np.int32),
        ("sample", np.int32),
        ("tokens", np.int32),
        ("oldest", np.int32),
        ("reward", np.float64),
        ("advantage", np.float64),
        ("outcome", np.int32),
        ("reason", np.int32),
    ]
)


@dataclass(frozen=True)
class Group:
    """The samples of one prompt in one draw. What none of them tells is None."""

    number: int
    """By which its samples are asked for, as long as the index is not updated."""
    step: int
    issue: int | None
    epoch: int | None
    prompt_id: str | None
    samples: int
    """That were answered."""
    reward: float | None
    """The mean."""
    least: float | None
    most: float | None
    advantage: float | None
    """The highest, by its amount."""
    tokens: int | None
    """Of all samples."""
    outcome: str | None
    """``trained`` where any of them was."""
    reason: str | None
    staleness: int | None
    """Steps between the weights that its first token was sampled with and those that were trained on it; the most."""
    is_alike: bool
    """Whether several samples have a reward, and all the same."""


@dataclass(frozen=True)
class _Index:
    """Lines, and the groups that they make up."""

    lines: np.ndarray
    """Of the type :data:`_LINE`, in the order of the journal."""
    order: np.ndarray
    """Rows, group by group."""
    starts: np.ndarray
    """Of each group its first place in ``order``, in the order of the groups' first lines."""
    ends: np.ndarray
    columns: dict[str, np.ndarray]
    """Of each group, NaN where nothing is told."""

    @staticmethod
    def of(lines: np.ndarray) -> _Index:
        prompts = int(lines["prompt"].max(initial=0)) + 1
        keys = (lines["issue"] - _UNKNOWN) * prompts + lines["prompt"]
        keys = np.where(lines["prompt"] < 0, -1 - lines["line"], keys)  # without a prompt a line stands by itself
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        group = rank[group]
        order = np.argsort(group, kind="stable")
        counts = np.bincount(group, minlength=len(first))
        ends = np.cumsum(counts)
        starts = ends - counts
        held = lines[order]
        return _Index(lines, order, starts, ends, _measure(held, starts, counts) if len(held) else {})


def _measure(held: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of groups, of lines that are in their order."""
    reward, advantage = held["reward"], held["advantage"]
    scored = np.add.reduceat((~np.isnan(reward)).astype(np.int64), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        least, most = np.fmin.reduceat(reward, starts), np.fmax.reduceat(reward, starts)
        mean = np.add.reduceat(np.nan_to_num(reward, nan=0.0, posinf=np.inf, neginf=-np.inf), starts) / scored
        spread = most - least
    low, high = np.fmin.reduceat(advantage, starts), np.fmax.reduceat(advantage, starts)
    tokens = np.where(held["tokens"] == _UNKNOWN, 0, held["tokens"])
    stale = np.where(held["oldest"] < 0, np.nan, held["step"] - 1.0 - held["oldest"])
    return {
        "step": held["step"][starts].astype(np.float64),
        "samples": np.add.reduceat((held["prompt"] >= 0).astype(np.int64), starts),
        "reward": mean,
        "least": least,
        "most": most,
        "spread": spread,
        "advantage": np.where(np.abs(low) > np.abs(high), low, high),
        "tokens": np.where(np.maximum.reduceat(held["tokens"], starts) < 0, np.nan, np.add.reduceat(tokens, starts)),
        "staleness": np.fmax.reduceat(stale, starts),
        "alike": (scored > 1) & (least == most),
        "outcome": np.maximum.reduceat(held["outcome"], starts),
        "reason": np.maximum.reduceat(held["reason"], starts),
    }


class Rollouts:
    """The rollouts of a stage. :meth:`update` is called by one thread; the rest tells what stood when it last returned.
    Errors of reading are those of :class:`~postlude.storage.Journal`."""

    def __init__(self, journal: storage.Journal) -> None:
        self._journal, self._reader = journal, storage.Reader(journal)
        self._blocks: list[np.ndarray] = []
        self._places: dict[str, int] = {}
        self._prompts: dict[str, int] = {}
        self._prompt_ids: list[str] = []
        self._words: dict[str, int] = {"trained": _TRAINED}
        """Outcomes and reasons."""
        self._damages: dict[int, str] = {}
        self._lines = np.zeros(0, _LINE)
        self._made: _Index | None = None

    def update(self) -> bool:
        """Read what came since the last call. Whether anything did."""
        changed = False
        for part in self._reader.parts():
            changed = True
            self._cut(part.first)
            if part.content:
                self._blocks.append(self._read(part))
        if changed:
            self._lines = np.concatenate([np.zeros(0, _LINE), *self._blocks])
            self._blocks, self._made = [self._lines], None
        return changed

    def _cut(self, first: int) -> None:
        """Drop the lines from so many on."""
        self._damages = {line: why for line, why in self._damages.items() if line < first}
        while self._blocks and (not len(self._blocks[-1]) or self._blocks[-1]["line"][-1] >= first):
            block = self._blocks.pop()
            kept = block[: np.searchsorted(block["line"], first)]
            if len(kept):
                self._blocks.append(kept)

    def _read(self, part: storage.Part) -> np.ndarray:
        lines = part.content.split(b"\n")[:-1]
        place = self._places.setdefault(part.place, len(self._places))
        rows, start, kept = np.zeros(len(lines), _LINE), part.start, 0
        for number, line in enumerate(lines):
            count = len(line) + 1
            try:
                (entry,) = self._journal.entries(part.place, part.number + number, line + b"\n")
            except storage.CorruptError as error:
                self._damages[part.first + number] = str(error)
            else:
                where = (part.first + number, place, start, count, part.number + number)
                rows[kept] = (*where, *self._numbers(entry))
                kept += 1
            start += count
        return rows[:kept]

    def _numbers(self, entry: dict[str, Any]) -> tuple[Any, ...]:
        versions, prompt_id = entry.get("versions"), entry.get("prompt_id")
        outcome, reason = entry.get("outcome"), entry.get("reason")
        return (
            entry["step"],
            entry.get("issue", _UNKNOWN),
            entry.get("epoch", _UNKNOWN),
            -1 if prompt_id is None else self._prompt(prompt_id),
            entry.get("sample", _UNKNOWN),
            entry.get("tokens", _UNKNOWN),
            versions[0] if versions else _UNKNOWN,
            entry.get("reward", np.nan),
            entry.get("advantage", np.nan),
            -1 if outcome is None else self._words.setdefault(outcome, len(self._words)),
            -1 if reason is None else self._words.setdefault(reason, len(self._words)),
        )

    def _prompt(self, prompt_id: str) -> int:
        if prompt_id not in self._prompts:
            self._prompts[prompt_id] = len(self._prompt_ids)
            self._prompt_ids.append(prompt_id)
        return self._prompts[prompt_id]

    # --- what is told ---------------------------------------------------------------------------------------

    @property
    def damages(self) -> list[str]:
        """What is wrong with lines that cannot be read."""
        return list(self._damages.values())

    def __len__(self) -> int:
        """How many lines there are."""
        return len(self._lines)

    def became(self) -> dict[tuple[str | None, str | None], int]:
        """How many groups had which outcome, for which reason."""
        columns = self._index.columns
        if not columns:
            return {}
        pairs, counts = np.unique(np.stack([columns["outcome"], columns["reason"]]), axis=1, return_counts=True)
        words = self._word
        return {(words(one), words(two)): int(count) for (one, two), count in zip(pairs.T, counts, strict=True)}

    def groups(
        self,
        sort: Sort = "step",
        descending: bool = True,
        first: int = 0,
        count: int = 50,
        outcome: str | None = None,
        reason: str | None = None,
        alike: bool | None = None,
        prompt_id: str | None = None,
    ) -> tuple[int, list[Group]]:
        """How many groups are so, and a page of them. Those without what they are sorted by come last."""
        index = self._index
        columns = index.columns
        if not columns:
            return 0, []
        chosen = np.ones(len(index.starts), bool)
        for name, word in (("outcome", outcome), ("reason", reason)):
            if word is not None:
                chosen &= columns[name] == self._words.get(word, _UNKNOWN)
        if alike is not None:
            chosen &= columns["alike"] == alike
        if prompt_id is not None:
            chosen &= index.lines["prompt"][index.order[index.starts]] == self._prompts.get(prompt_id, _UNKNOWN)
        places = np.flatnonzero(chosen)
        keys = columns[sort][places].astype(np.float64)
        places = places[np.argsort(-keys if descending else keys, kind="stable")]  # NaN is last either way
        return len(places), [self._group(index, int(place)) for place in places[first : first + count]]

    def number(self, issue: int, prompt_id: str | None) -> int | None:
        """Of the group of a prompt in a draw; None where there is none."""
        lines, index = self._lines, self._index
        prompt = -1 if prompt_id is None else self._prompts.get(prompt_id, _UNKNOWN)
        rows = np.flatnonzero((lines["issue"] == issue) & (lines["prompt"] == prompt))
        return None if not len(rows) else int(np.flatnonzero(index.order[index.starts] == rows[0])[0])

    def group(self, number: int) -> Group:
        return self._group(self._index, number)

    def samples(self, group: int) -> list[dict[str, Any]]:
        """What the rollouts say of a group, read again: its lines, in the order of the journal. CorruptError where
        they are not there any more."""
        index = self._index
        rows = index.lines[index.order[index.starts[group] : index.ends[group]]]
        ends = rows["start"] + rows["bytes"]
        is_apart = (rows["place"][1:] != rows["place"][:-1]) | (rows["start"][1:] != ends[:-1])
        places, lines = list(self._places), []
        for near in np.split(rows, np.flatnonzero(is_apart) + 1):  # one request for those that stand side by side
            start, count = int(near["start"][0]), int(near["bytes"].sum())
            content = storage.read_range(places[near["place"][0]], start, count)
            for row in near:
                first = int(row["start"]) - start
                lines.append(self._line(row, places, content[first : first + int(row["bytes"])]))
        return lines

    @property
    def _index(self) -> _Index:
        lines, made = self._lines, self._made
        if made is None or made.lines is not lines:
            made = self._made = _Index.of(lines)
        return made

    def _line(self, row: np.void, places: list[str], content: bytes) -> dict[str, Any]:
        place, number = places[row["place"]], int(row["number"])
        entries = self._journal.entries(place, number, content)
        if len(entries) != 1 or entries[0].get("issue", _UNKNOWN) != row["issue"] or entries[0]["step"] != row["step"]:
            why = f"line {number} is another than was read: the stage has gone back, and writes it anew"
            raise storage.damaged(place, why, "Look again.")
        return entries[0]

    def _word(self, number: int) -> str | None:
        return next((word for word, other in self._words.items() if other == number), None)

    def _group(self, index: _Index, number: int) -> Group:
        head = index.lines[index.order[index.starts[number]]]
        told: dict[str, Any] = {
            name: None if np.isnan(column[number]) else column[number].item() for name, column in index.columns.items()
        }
        return Group(
            number=number,
            step=int(head["step"]),
            issue=_told(head["issue"]),
            epoch=_told(head["epoch"]),
            prompt_id=None if head["prompt"] < 0 else self._prompt_ids[head["prompt"]],
            samples=told["samples"],
            reward=told["reward"],
            least=told["least"],
            most=told["most"],
            advantage=told["advantage"],
            tokens=None if told["tokens"] is None else int(told["tokens"]),
            outcome=self._word(told["outcome"]),
            reason=self._word(told["reason"]),
            staleness=None if told["staleness"] is None else int(told["staleness"]),
            is_alike=told["alike"],
        )


def _told(number: np.integer) -> int | None:
    return None if number == _UNKNOWN else int(number)
