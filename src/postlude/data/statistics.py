"""What the data are like: counted while records become units, told as JSON and as tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from postlude.data.document import Unit
from postlude.telemetry.screen import Kind, Listing

SHOWN = 5
"""So many ids are kept of what was dropped for one reason."""


@dataclass
class Dropped:
    """How many examples were dropped for one reason, and the ids of the first."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example_id: str) -> None:
        self.count += 1
        if len(self.examples) < SHOWN:
            self.examples.append(example_id)

    def __str__(self) -> str:
        return f"{self.count}, such as {', '.join(self.examples)}" if self.examples else str(self.count)


@dataclass
class SourceStatistics:
    """Counts of what one source has yielded so far. A record read twice counts twice."""

    name: str
    records: int
    """Records that the source has, after its filters."""
    filtered: dict[str, Dropped] = field(default_factory=dict)
    """Records that were left out before they were encoded, by reason."""
    read: int = 0
    """Records read."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """Examples that yielded nothing, by reason."""
    unprinted: dict[str, Dropped] = field(default_factory=dict)
    """Examples of which the chat template leaves something out, by what it is
    (:data:`postlude.manifest.schema.Unprinted`)."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens of a unit, and how many units have so many."""
    trained_tokens: int = 0
    truncated: int = 0
    """Examples that lost tokens."""
    tokens_cut: int = 0

    def add(self, units: Iterable[Unit]) -> None:
        """Count the units of one example."""
        for unit in units:
            self.lengths[len(unit)] += 1
            self.trained_tokens += sum(document.trained_tokens for document in unit.documents)

    def drop(self, reason: str, example_id: str) -> None:
        """Count an example that yields nothing."""
        self.dropped.setdefault(reason, Dropped()).add(example_id)

    @property
    def units(self) -> int:
        return self.lengths.total()

    @property
    def tokens(self) -> int:
        return sum(length * count for length, count in self.lengths.items())

    @property
    def mean_tokens(self) -> float:
        return self.tokens / self.units if self.units else 0.0

    @property
    def trained_share(self) -> float:
        """Trained tokens among all, 0 to 1."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def truncated_share(self) -> float:
        """Truncated units among all, 0 to 1."""
        return self.truncated / self.units if self.units else 0.0

    def percentile(self, percent: float) -> int:
        """The smallest length that at least so many percent of the units do not exceed; 0 where there are none."""
        ordered = sorted(self.lengths.items())
        for (length, _), below in zip(ordered, accumulate(count for _, count in ordered), strict=True):
            if below >= self.units * percent / 100:
                return length
        return 0

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, units) with bins that begin at 1, 2, 4, 8, ... tokens, from the first that is met to the last."""
        bins: Counter[int] = Counter()
        for length, count in self.lengths.items():
            bins[length.bit_length() - 1] += count
        return [(1 << i, (2 << i) - 1, bins[i]) for i in range(min(bins), max(bins) + 1)] if bins else []

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        tokens = ("tokens", "trained_tokens", "trained_share", "truncated", "truncated_share", "tokens_cut")
        return {
            **{name: getattr(self, name) for name in ("records", "read", "units", *tokens)},
            "filtered": {reason: asdict(dropped) for reason, dropped in self.filtered.items()},
            "dropped": {reason: asdict(dropped) for reason, dropped in self.dropped.items()},
            "unprinted": {kind: asdict(dropped) for kind, dropped in self.unprinted.items()},
            "lengths": {
                "mean": self.mean_tokens,
                **{f"p{percent}": self.percentile(percent) for percent in (5, 50, 90, 99)},
                "longest": max(self.lengths, default=0),
                "histogram": [{"from": first, "to": last, "units": count} for first, last, count in self.histogram()],
            },
        }


@dataclass
class Statistics:
    """What a stage's data are like: each source, and the packed mixture."""

    sources: dict[str, SourceStatistics]
    repeats: dict[str, float]
    """How often each source is passed over in one epoch."""
    block: int
    """Tokens of a block."""
    records_per_epoch: int
    tokens_per_epoch: int
    """Estimated where ``sampled``, like the blocks."""
    blocks_per_epoch: int
    fill: float
    """Tokens among the places in the blocks, 0 to 1."""
    sampled: bool
    """Whether some source was read in part only."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        per_epoch = ("records_per_epoch", "tokens_per_epoch", "blocks_per_epoch")
        return {
            "sources": {
                name: {**source.to_json(), "passes_per_epoch": self.repeats[name]}
                for name, source in self.sources.items()
            },
            "packing": {name: getattr(self, name) for name in ("block", "fill", *per_epoch, "sampled")},
        }

    def tables(self) -> list[Listing]:
        """Tables to print: the sources, the mixture, and what was dropped, if anything was."""
        shown = [self._sources_table(), self._packing_table()]
        lost = [
            (source, what, reason, dropped)
            for source in self.sources.values()
            for what, reasons in (("records", source.filtered), ("examples", source.dropped))
            for reason, dropped in reasons.items()
        ]
        if lost:
            table = Listing("Left out", {"source": "text", "reason": "text", "how many": "number", "such as": "text"})
            for source, what, reason, dropped in lost:
                table.add_row(source.name, reason, f"{dropped.count:,} {what}", ", ".join(dropped.examples))
            shown.append(table)
        left_out = [
            (name, entry) for name, source in self.sources.items() for entry in sorted(source.unprinted.items())
        ]
        if left_out:
            heads: dict[str, Kind] = {"source": "text", "what": "text", "examples": "number", "such as": "text"}
            table = Listing("Not printed by the chat template", heads)
            for name, (kind, dropped) in left_out:
                table.add_row(name, kind, f"{dropped.count:,}", ", ".join(dropped.examples))
            shown.append(table)
        return shown

    def _sources_table(self) -> Listing:
        lengths = ("median", "p99", "longest", "lengths")
        numbers = ("records", "tokens", "trained", *lengths, "truncated", "passes")
        table = Listing("Data", {"source": "whole", **dict.fromkeys(numbers, "number")})
        for name, source in self.sources.items():
            table.add_row(
                name,
                f"{source.read:,} of {source.records:,}" if source.read < source.records else f"{source.records:,}",
                f"{source.tokens:,}",
                f"{source.trained_share:.1%}",
                f"{source.percentile(50):,}",
                f"{source.percentile(99):,}",
                f"{max(source.lengths, default=0):,}",
                _bars([count for _, _, count in source.histogram()]),
                f"{source.truncated_share:.1%} (-{source.tokens_cut:,})" if source.truncated else "0",
                f"{self.repeats[name]:.2f}",
            )
        return table

    def _packing_table(self) -> Listing:
        about = "about " if self.sampled else ""
        heads = ("records", "tokens", f"blocks of {self.block:,}", "fill")
        table = Listing("One epoch, packed", dict.fromkeys(heads, "number"))
        table.add_row(
            f"{self.records_per_epoch:,}",
            f"{about}{self.tokens_per_epoch:,}",
            f"{about}{self.blocks_per_epoch:,}",
            f"{self.fill:.2%}",
        )
        return table


def _bars(counts: Sequence[int]) -> str:
    """One bar for each count; a count above zero never looks like none."""
    highest = max(counts, default=0)
    return "".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * count / highest)] for count in counts)
