"""From losses by example, rollouts and readings to what ECharts draws, and tokens to what the browser shows: pure
functions.

Texts of data and of models stand in options and labels alone, and in :func:`tokens_html` escaped, so that none of them
can become markup."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from postlude.dashboard.charts import COLORS, GRID, TEXT, Options
from postlude.runs.columns import Curve
from postlude.runs.losses import History, SourceLosses
from postlude.runs.tokens import Tokens
from postlude.runs.workers import PHASES, REST
from postlude.telemetry.readings import Reading, measures

Colouring = Literal["ratio", "entropy", "version", "mask"]
COLOURINGS: tuple[Colouring, ...] = ("ratio", "entropy", "version", "mask")

PHASE_COLORS = {
    "data_wait": COLORS[1],
    "forward": COLORS[0],
    "backward": COLORS[7],
    "optimizer": COLORS[2],
    "checkpoint": COLORS[3],
    "rest": "#8a8a8a",
}
_VALUES = {"type": "value", "axisLabel": {"color": TEXT}, "splitLine": {"lineStyle": {"color": GRID}}}
PHASE_NAMES = {"data_wait": "data", "optimizer": "optimiser", "rest": "wait and the rest"}


def frame(x: Literal["value", "time"], series: Sequence[Options], spoken: str, **more: Any) -> Options:
    """What all of these have in common."""
    return {
        "animation": False,
        "color": list(COLORS),
        "textStyle": {"color": TEXT},
        "aria": {"enabled": True, "label": {"description": spoken}},
        "grid": {"left": 64, "right": 20, "top": 34, "bottom": 28},
        "legend": {"type": "scroll", "top": 0, "textStyle": {"color": TEXT}},
        "tooltip": {"trigger": "axis", "renderMode": "richText", "confine": True},
        "xAxis": {"type": x, "scale": True, "axisLabel": {"color": TEXT, "hideOverlap": True}},
        "yAxis": {
            "type": "value",
            "scale": True,
            "axisLabel": {"color": TEXT},
            "splitLine": {"lineStyle": {"color": GRID}},
        },
        "series": list(series),
        **more,
    }


def line(name: str, x: np.ndarray, y: np.ndarray, **more: Any) -> Options:
    """A curve; what is not finite is a gap."""
    data = [[at, value if np.isfinite(value) else None] for at, value in zip(x.tolist(), y.tolist(), strict=True)]
    return {"type": "line", "name": name, "data": data, "showSymbol": len(data) < 60, "symbolSize": 4, **more}


# --- workers ------------------------------------------------------------------------------------------------


def phases(reading: Mapping[str, Any]) -> dict[str, float]:
    """The phases of a worker's step, as it last told them."""
    seconds = reading.get("seconds") or {}
    told = {phase: seconds[f"seconds_{phase}"] for phase in PHASES if f"seconds_{phase}" in seconds}
    if "seconds" in seconds:
        told[REST] = max(seconds["seconds"] - sum(told.values()), 0.0)
    return told


def behind(newest: Mapping[int, Mapping[str, Any]]) -> dict[int, float | None]:
    """How many times each worker takes what the others take by themselves; 0 where the step does not feel it."""
    names = ("step", "resident_bytes", "device_bytes", "seconds")
    readings = {rank: Reading(**{key: line[key] for key in names if key in line}) for rank, line in newest.items()}
    return {rank: told["worker_behind"] for rank, told in measures(readings).items() if rank is not None}


def over_time(title: str, curves: Mapping[str, Curve], scale: float) -> Options:
    """A number of each worker over time."""
    series = [line(name, curve.steps, curve.values / scale, lineStyle={"width": 1}) for name, curve in curves.items()]
    most = max((float(curve.values.max()) / scale for curve in curves.values() if len(curve.values)), default=None)
    spoken = f"{title} of {len(curves)} workers" + ("" if most is None else f", at most {most:.4g}")
    return frame("time", series, spoken)


def bands(workers: Mapping[str, Mapping[str, float]]) -> Options:
    """Of each worker the phases of its step, one behind the other, in seconds. What was not measured is left out."""
    names = list(workers)
    phases = [phase for phase in PHASE_COLORS if any(phase in told for told in workers.values())]
    series = [
        {
            "type": "bar",
            "stack": "step",
            "name": PHASE_NAMES.get(phase, phase),
            "itemStyle": {"color": PHASE_COLORS[phase]},
            "data": [workers[name].get(phase) for name in names],
        }
        for phase in phases
    ]
    spoken = f"Phases of a step of {len(names)} workers; the table below says the same in numbers"
    y = {"type": "category", "data": names, "inverse": True, "axisLabel": {"color": TEXT}}
    return frame("value", series, spoken, xAxis=dict(_VALUES), yAxis=y)


def bands_over_time(moments: np.ndarray, phases: Mapping[str, np.ndarray]) -> Options:
    """The phases of one worker's steps over time, in seconds, one above the other."""
    series = [
        line(
            PHASE_NAMES.get(phase, phase),
            moments,
            values,
            stack="step",
            areaStyle={"opacity": 0.7},
            lineStyle={"width": 0},
            itemStyle={"color": PHASE_COLORS[phase]},
        )
        for phase, values in phases.items()
        if np.isfinite(values).any()
    ]
    return frame("time", series, "Phases of the steps of one worker over time")


# --- data ---------------------------------------------------------------------------------------------------


def by_source(sources: Sequence[SourceLosses]) -> Options:
    """The loss of each source over steps."""
    series = [line(source.source, source.steps, source.losses) for source in sources]
    last = [f"{source.source}, last {source.losses[-1]:.4g}" for source in sources if len(source.losses)]
    return frame("value", series, f"Loss by source: {'; '.join(last) or 'no value'}")


def history(told: History) -> Options:
    """The losses of one example over steps."""
    spoken = f"{len(told.steps)} losses of {told.example_id}"
    return frame("value", [line("loss by token", told.steps, told.losses)], spoken, legend={"show": False})


def fill(steps: np.ndarray, tokens: np.ndarray, room: int, name: str) -> Options:
    """How full steps are."""
    options = frame("value", [line(name, steps, tokens / room)], name, legend={"show": False})
    options["yAxis"] |= {"min": 0}
    return options


# --- tokens -------------------------------------------------------------------------------------------------


def tokens_html(tokens: Tokens, colouring: Colouring) -> str:
    """A sample token by token. Pointing at one tells its numbers."""
    parts = []
    versions = sorted(set(tokens.versions[tokens.sampled].tolist()))
    ratios = tokens.ratio
    for place, text in enumerate(tokens.texts):
        if not tokens.sampled[place]:
            parts.append(f'<span style="opacity:0.6" title="given">{html.escape(_visible(text))}</span>')
            continue
        ratio, entropy = float(ratios[place]), float(tokens.entropy[place])
        version = int(tokens.versions[place])
        title = f"ratio {ratio:.4f}, entropy {entropy:.3f}, weights of step {version}"
        match colouring:
            case "ratio":
                color = _diverging(np.log(ratio) if ratio > 0 else -np.inf)
            case "entropy":
                color = _shade(COLORS[1], entropy / 3)
            case "version":
                color = _shade(COLORS[versions.index(version) % len(COLORS)], 0.5)
            case "mask":
                color = _shade(COLORS[2], 0.5)
        parts.append(f'<span style="background:{color}" title="{title}">{html.escape(_visible(text))}</span>')
    return "".join(parts)


def mask_html(tokens: Sequence[Mapping[str, Any]]) -> str:
    """An example token by token, those that are trained coloured. Pointing at one tells its id."""
    color = _shade(COLORS[2], 0.5)
    return "".join(
        f'<span style="{f"background:{color}" if token["trained"] else "opacity:0.6"}" title="{int(token["id"])}">'
        f"{html.escape(_visible(token['text']))}</span>"
        for token in tokens
    )


def _diverging(log_ratio: float) -> str:
    """Red where the trainer finds a token likelier than the engine, blue where less; full from a factor of 1.5 on."""
    share = min(abs(log_ratio) / np.log(1.5), 1.0) if np.isfinite(log_ratio) else 1.0
    return _shade(COLORS[5] if log_ratio > 0 else COLORS[0], share)


def _shade(color: str, share: float) -> str:
    share = min(max(share, 0.0), 1.0) if np.isfinite(share) else 1.0
    return f"{color}{round(share * 200):02x}"


def _visible(text: str) -> str:
    """Line ends and controls as signs, for they would be lost."""
    return "".join(
        "\u21b5\n" if sign == "\n" else sign if sign.isprintable() or sign == "\t" else "\ufffd" for sign in text
    )
