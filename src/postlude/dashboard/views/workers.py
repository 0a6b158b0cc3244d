"""The workers of a stage: memory, where the time of a step goes, connections, and the engines that they ask."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
from nicegui import ui

from postlude.dashboard import charts_records, frame
from postlude.dashboard.followed import Followed
from postlude.dashboard.kept import kept
from postlude.dashboard.views.drawing import Chart
from postlude.dashboard.views.tables import Cell, Table
from postlude.runs import Stage
from postlude.runs.workers import Workers

WIDTH = 200
"""Pixel columns of a curve: there is one for each worker."""
MOST_DRAWN = 64
_LINKS = {
    "rank_round_trip_seconds": ("ranks in", 1e3, "ms"),
    "collective_bytes_per_second": ("collective", 1e-9, "GB/s"),
    "host_to_device_bytes_per_second": ("to device", 1e-9, "GB/s"),
    "device_to_host_bytes_per_second": ("to host", 1e-9, "GB/s"),
}


def _reader(stage: Stage) -> Workers:
    return Workers(stage.readings)


def _drawn(workers: Workers, chosen: int | None) -> dict[str, Any]:
    """What the view shows."""
    ranks, newest = workers.ranks, workers.newest()
    told: dict[str, Any] = {"newest": newest}
    for name in ("resident_bytes", "device_bytes"):
        curves = {f"worker {rank}": workers.curve(rank, name, WIDTH) for rank in ranks[:MOST_DRAWN]}
        told[name] = {worker: curve for worker, curve in curves.items() if len(curve.values)}
    told["bands"] = {f"worker {rank}": phases for rank in ranks if (phases := charts_records.phases(newest[rank]))}
    rank = chosen if chosen in newest else ranks[0] if ranks else None
    told["rank"] = rank
    told["over_time"] = None if rank is None else workers.bands(rank, WIDTH)
    told["behind"] = charts_records.behind(newest)
    return told


class _WorkersPage:
    def __init__(self, followed: Followed, stage: str, view: dict[str, str]) -> None:
        self.kept = kept(followed, stage, _reader)
        self.view, self.is_first = view, True
        self.trouble = frame.warn("")
        self.none = frame.nothing("Reading ...")
        with ui.column().classes("w-full gap-4") as self.all:
            self.memory = Chart("Memory of each worker, MiB")
            self.device = Chart("Memory of its GPU in use, MiB")
            self.no_device = frame.nothing("No worker has told what of a GPU it uses: the stage runs on CPUs.")
            self.bands = Chart("Phases of a step by worker, seconds (means of the last steps)")
            self.no_bands = frame.nothing("No worker has told yet where the time of its steps goes.")
            with ui.row().classes("items-center gap-2"):
                self.rank = ui.select({}, label="Worker", on_change=lambda event: self._choose(event.value))
                self.rank.props("dense").classes("w-32")
            self.over_time = Chart("Phases of its steps over time, seconds")
            ui.label("Newest readings").classes("font-bold")
            heads = ["worker", "host", "step", "when", "memory", "GPU", "s a step", "behind", "answers in"]
            self.table = Table([*heads, *(name for name, _, _ in _LINKS.values())])
            ui.label("Engines").classes("font-bold")
            self.no_engines = frame.nothing("No worker of this stage has asked an engine.")
            self.engines = Table(["worker", "engine", "weights of step", "asked for", "tokens", "tokens/s"])

    def _choose(self, rank: int | None) -> None:
        if rank is not None and rank != frame.number(self.view, "worker"):
            frame.remember(self.view, worker=rank)
            self.is_first = True

    async def refresh(self) -> None:
        again, self.is_first = self.is_first, False
        chosen = frame.number(self.view, "worker")
        told = await asyncio.to_thread(self.kept.look, lambda workers: _drawn(workers, chosen), again)
        self.trouble.set_text(self.kept.trouble or "")
        self.trouble.set_visibility(self.kept.trouble is not None)
        if told is None:
            return
        newest = told["newest"]
        self.none.set_text("No worker has been read yet: that is done while a stage works, every few seconds.")
        self.none.set_visibility(not newest)
        self.all.set_visibility(bool(newest))
        if not newest:
            return
        for chart, name in ((self.memory, "resident_bytes"), (self.device, "device_bytes")):
            chart.draw(charts_records.over_time(name, told[name], 2**20) if told[name] else None)
        self.no_device.set_visibility(not told["device_bytes"])
        self.no_bands.set_visibility(not told["bands"])
        self.bands.draw(charts_records.bands(told["bands"]) if told["bands"] else None, 80 + 18 * len(told["bands"]))
        moments, phases = told["over_time"]
        is_told = any(np.isfinite(values).any() for values in phases.values())
        self.over_time.draw(charts_records.bands_over_time(moments, phases) if is_told else None)
        self.rank.set_visibility(is_told)
        self.rank.set_options({rank: f"{rank}" for rank in newest}, value=told["rank"])
        self.table.show({f"{rank}": _row(rank, line, told["behind"].get(rank)) for rank, line in newest.items()})
        engines = {
            f"{rank} {name}": _engine_row(rank, name, numbers)
            for rank, line in newest.items()
            for name, numbers in (line.get("engines") or {}).items()
        }
        self.no_engines.set_visibility(not engines)
        self.engines.show(engines)


def _row(rank: int, line: Mapping[str, Any], behind: float | None) -> list[Cell]:
    seconds, link = line.get("seconds") or {}, line.get("link") or {}
    return [
        f"{rank}",
        line["host"],
        f"{line['step']:,}",
        frame.ago(line["time"]),
        f"{line['resident_bytes'] / 2**20:,.0f} MiB",
        f"{line['device_bytes'] / 2**20:,.0f} MiB" if line.get("device_bytes") is not None else "",
        f"{seconds['seconds']:.3f}" if "seconds" in seconds else "",
        "" if behind is None else f"{behind:.1f} times the others" if behind else "no",
        f"{1000 * line['round_trip_seconds']:.1f} ms",
        *(f"{link[key] * scale:,.3g} {unit}" if key in link else "" for key, (_, scale, unit) in _LINKS.items()),
    ]


def _engine_row(rank: int, name: str, numbers: Mapping[str, float]) -> list[Cell]:
    seconds = numbers.get("seconds", 0.0)
    return [
        f"{rank}",
        name,
        f"{numbers['version']:,.0f}" if "version" in numbers else "",
        f"{numbers['requests']:,.0f}" if "requests" in numbers else "",
        f"{numbers['tokens']:,.0f}" if "tokens" in numbers else "",
        f"{numbers['tokens'] / seconds:,.0f}" if seconds and "tokens" in numbers else "",
    ]


def show(followed: Followed, stage: str | None, view: dict[str, str]) -> None:
    """The workers of a stage."""
    if stage is None:
        frame.nothing("No stage has begun yet, so that there are no workers.")
        return
    frame.refreshed(_WorkersPage(followed, stage, view).refresh)
