"""From curves and marks to what ECharts draws: pure functions, which the page and the report share.

No option here is a program, no text of a run a key, and tooltips are drawn and not made of HTML: so nothing that a run
says can become markup or a script. Colours are read on white and on black.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from postlude.telemetry import events

if TYPE_CHECKING:
    from postlude.runs.columns import Curve

Options = dict[str, Any]
Kind = Literal["amendment", "checkpoint", "fault", "alarm"]

TEXT = "#7a7a7a"
GRID = "rgba(128,128,128,0.25)"
COLORS = ("#3584c4", "#c77a1e", "#2f9e62", "#b0609c", "#8a8a1f", "#d05a4e", "#26a0a8", "#7d6bd0")
KIND_COLORS: dict[Kind, str] = {
    "amendment": "#b0609c",
    "checkpoint": "#5f9ea0",
    "fault": "#d05a4e",
    "alarm": "#c77a1e",
}
STATE_COLORS = {
    "pending": "#8a8a8a",
    "running": "#3584c4",
    "interrupted": "#c77a1e",
    "failed": "#d05a4e",
    "done": "#2f9e62",
}
MARKS_SHOWN = 100
"""Of one kind on a curve; of more the first in each hundredth stands for all there."""

GROUPS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("Loss", ("loss",), "no step has told a loss: the stage trains nothing, or has made no step yet"),
    ("Held-out", ("eval_*",), "nothing was evaluated yet: `evaluate` in the manifest says on what and how often"),
    ("Reward", ("reward", "reward_*"), "nothing is rewarded in this stage"),
    ("Learning rate", ("lr", "lr_*"), "no step has told a rate"),
    ("Gradient norm", ("grad_norm*",), "no step has told a gradient"),
    ("Tokens per second", ("tokens_per_second",), "no step has told its speed"),
    ("MFU", ("mfu",), "it was not measured: the peak of this machine's processor is not known"),
    ("Memory, MiB", ("memory_bytes",), "it was not measured"),
)
"""What is drawn first of a stage: title, metrics, and why there may be none."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    kind: Kind
    text: str
    time: str = ""


@dataclass(frozen=True)
class Line:
    """A curve with its name, and the same smoothed."""

    name: str
    curve: Curve
    smooth: Curve | None = None


def grouped(names: Iterable[str]) -> list[tuple[str, list[str], str]]:
    """The metrics of each group, in the order of their coming, and why there may be none."""
    known = list(names)
    return [
        (title, [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)], why)
        for title, patterns, why in GROUPS
    ]


def others(names: Iterable[str]) -> list[str]:
    """The metrics that are in no group."""
    patterns = [pattern for _, patterns, _ in GROUPS for pattern in patterns]
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]


def marks_of(happened: Sequence[events.Event], stage: str) -> list[Mark]:
    """What stands on every curve of a stage, in the order of its happening. What has no step of its own stands where
    the stage went on."""
    marks: list[Mark] = []
    waiting: list[events.Event] = []
    for event in happened:
        if event.stage != stage:
            continue
        match event:
            case events.StageSetAside():
                marks, waiting = [], []
            case events.AmendmentApplied():
                marks.append(
                    Mark(event.step, "amendment", f"{event.assignment} holds from step {event.step:,}", event.time)
                )
            case events.CheckpointSaved():
                marks.append(Mark(event.step, "checkpoint", f"checkpoint of step {event.step:,}", event.time))
            case events.Alarm() if event.step is not None:
                marks.append(Mark(event.step, "alarm", f"{event.what}: {event.reason}", event.time))
            case events.StepSkipped():
                text = f"step {event.step:,} skipped: its loss or gradient was not finite"
                marks.append(Mark(event.step, "fault", text, event.time))
            case events.CheckpointSkipped():
                text = f"the checkpoint of step {event.step:,} could not be used: {event.reason}"
                marks.append(Mark(event.step, "fault", text, event.time))
            case events.WorkerFailure() | events.Failure() | events.RunInterrupted() | events.StoodStill():
                waiting.append(event)
            case events.StageStarted():
                marks += [Mark(event.from_step, "fault", f"{_fault(each)}; went on after step {event.from_step:,}",
                               each.time) for each in waiting]  # fmt: skip
                waiting = []
    return marks


def _fault(event: events.Event) -> str:
    match event:
        case events.WorkerFailure():
            return f"{event.what} failure: {event.reason}"
        case events.Failure():
            return event.error
        case events.StoodStill():
            return event.reason
    return "interrupted"


def chart(
    title: str, lines: Sequence[Line], marks: Sequence[Mark], first: int, last: int, *, log: bool = False
) -> Options:
    """Curves over the steps from ``first`` to ``last``, with marks."""
    scale = 2**20 if title.endswith(", MiB") else 1
    series = [
        one for number, line in enumerate(lines) for one in _series(line, COLORS[number % len(COLORS)], scale, log)
    ]
    names = [line.name for line in lines]
    axis_label = {"color": TEXT, "hideOverlap": True}
    return {
        "animation": False,
        "color": list(COLORS),
        "textStyle": {"color": TEXT},
        "aria": {"enabled": True, "label": {"description": _spoken(title, lines, scale)}},
        "grid": {"left": 64, "right": 20, "top": 34 if len(lines) > 1 else 16, "bottom": 28},
        "legend": {"show": len(lines) > 1, "type": "scroll", "top": 0, "textStyle": {"color": TEXT}, "data": names},
        "tooltip": {"trigger": "axis", "renderMode": "richText", "confine": True},
        "xAxis": {
            "type": "value",
            "min": first,
            "max": max(last, first + 1),
            "minInterval": 1,
            "axisLabel": axis_label,
            "splitLine": {"show": False},
            "axisPointer": {"label": {"precision": 0}},
        },
        "yAxis": {
            "type": "log" if log else "value",
            "scale": True,
            "axisLabel": axis_label,
            "splitLine": {"lineStyle": {"color": GRID}},
        },
        # Out of sight: what zooms is dragging over the chart, which this makes possible.
        "toolbox": {"top": -90, "feature": {"dataZoom": {"yAxisIndex": "none"}}},
        "series": [*series, _marked(marks, first, last)],
    }


def _series(line: Line, color: str, scale: int, log: bool) -> list[Options]:
    drawn = [(line.curve, 0.35 if line.smooth else 1.0)] + ([(line.smooth, 1.0)] if line.smooth else [])
    made: list[Options] = [
        {
            "type": "line",
            "name": line.name if curve is line.curve else f"{line.name}, smoothed",
            "data": _points(curve, scale, log),
            "showSymbol": len(curve.steps) < 60,
            "symbolSize": 4,
            "itemStyle": {"color": color},
            "lineStyle": {"width": 1.5, "opacity": opacity},
        }
        for curve, opacity in drawn
    ]
    values = [value for _, value in made[0]["data"]]
    low = min(values, default=1.0)
    made.append(
        {
            "type": "scatter",
            "name": f"{line.name}, not finite",
            "symbol": "triangle",
            "symbolSize": 9,
            "itemStyle": {"color": KIND_COLORS["fault"]},
            "data": [[step, low] for step in line.curve.not_finite.tolist()],
        }
    )
    return made


def _points(curve: Curve, scale: int, log: bool) -> list[list[float]]:
    values = curve.values if scale == 1 else curve.values / scale
    points = zip(curve.steps.tolist(), values.tolist(), strict=True)
    return [[step, value] for step, value in points if value > 0 or not log]


def _marked(marks: Sequence[Mark], first: int, last: int) -> Options:
    data = [
        {"name": mark.text, "xAxis": mark.step, "lineStyle": {"color": KIND_COLORS[mark.kind]}}
        for mark in thinned(marks, first, last)
    ]
    return {
        "type": "line",
        "name": "marks",
        "data": [],
        "markLine": {
            "symbol": ["none", "none"],
            "animation": False,
            "label": {"show": False},
            "lineStyle": {"type": "dashed", "width": 1},
            "tooltip": {"trigger": "item", "formatter": "{b}"},
            "data": data,
        },
    }


def thinned(marks: Sequence[Mark], first: int, last: int) -> list[Mark]:
    """The marks within some steps; of a kind that has too many, one for each hundredth that has any."""
    shown = [mark for mark in marks if first <= mark.step <= last]
    kept: list[Mark] = []
    for kind in KIND_COLORS:
        of_kind = [mark for mark in shown if mark.kind == kind]
        if len(of_kind) <= MARKS_SHOWN:
            kept += of_kind
            continue
        by_place: dict[int, list[Mark]] = {}
        for mark in of_kind:
            by_place.setdefault((mark.step - first) * MARKS_SHOWN // (last + 1 - first), []).append(mark)
        for mark, *more in by_place.values():
            text = f"{mark.text}, and {len(more):,} more close by" if more else mark.text
            kept.append(Mark(mark.step, kind, text, mark.time))
    return kept


def _spoken(title: str, lines: Sequence[Line], scale: int) -> str:
    """What a reader of the screen says."""
    told = [f"{line.name}, last {line.curve.values[-1] / scale:.4g}" for line in lines if len(line.curve.values)]
    return f"{title}: {'; '.join(told) or 'no value'}"


def graph(stages: Mapping[str, tuple[str, Sequence[str]]]) -> Options:
    """The stages of a run as a graph: by name its state and the stages that it needs, which stand left of it."""
    depth = _depths(stages)
    places = list(depth.values())
    nodes = [
        {
            "name": name,
            "value": [depth[name], places[:number].count(depth[name])],
            "itemStyle": {"color": STATE_COLORS.get(state, TEXT)},
        }
        for number, (name, (state, _)) in enumerate(stages.items())
    ]
    links = [
        {"source": need, "target": name, "lineStyle": {"curveness": 0.08 if depth[name] - depth[need] > 1 else 0}}
        for name, (_, needs) in stages.items()
        for need in needs
        if need in depth
    ]
    told = [f"{name} is {state}" + (f" and needs {', '.join(needs)}" if needs else "")
            for name, (state, needs) in stages.items()]  # fmt: skip
    return {
        "animation": False,
        "aria": {"enabled": True, "label": {"description": "; ".join(told)}},
        "grid": {"left": 50, "right": 50, "top": 10, "bottom": 10},
        "xAxis": {"show": False, "type": "value", "min": 0, "max": max([1, *places])},
        "yAxis": {"show": False, "type": "value", "min": -1, "max": rows_of(stages) - 0.3, "inverse": True},
        "series": [
            {
                "type": "graph",
                "coordinateSystem": "cartesian2d",
                "symbolSize": 20,
                "label": {"show": True, "position": "bottom", "color": TEXT, "width": 110, "overflow": "truncate"},
                "edgeSymbol": ["none", "arrow"],
                "edgeSymbolSize": 8,
                "lineStyle": {"color": TEXT, "opacity": 0.8},
                "data": nodes,
                "links": links,
            }
        ],
    }


def rows_of(stages: Mapping[str, tuple[str, Sequence[str]]]) -> int:
    """How many rows their graph has."""
    return max(Counter(_depths(stages).values()).values(), default=1)


def _depths(stages: Mapping[str, tuple[str, Sequence[str]]]) -> dict[str, int]:
    """How many stages each hangs on, one after another; those that are needed stand before."""
    depths: dict[str, int] = {}
    for name, (_, needs) in stages.items():
        depths[name] = 1 + max((depths[need] for need in needs if need in depths), default=-1)
    return depths
