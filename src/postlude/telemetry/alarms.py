"""Rules for alarms at work: what is measured, line by line, becomes alarms that begin and are over.

What comes out follows from the rules and the lines alone, in their order. So a stage that is taken up again shows its
rules the lines that stand there, and tells of the rest what it would have told undisturbed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from postlude.manifest.alarms import MIB, AlarmRule
from postlude.telemetry import events

_TIMED = ("seconds*", "busy*", "*_per_second", "mfu", "memory_bytes", "worker_*")
"""Metrics that follow from the machine: in a replay they are others, and so are their alarms."""
_NORMAL = 1.4826
"""Standard deviations of a normal distribution in its median distance from the median."""


@dataclass(frozen=True)
class Change:
    """An alarm that began, or one that is over."""

    kind: str
    """That of the event: ``alarm`` or ``alarm_over``."""
    what: str
    """The rule, with the metric and the worker where there are several."""
    reason: str
    rule: str
    timed: bool
    """Whether it follows from the machine, and not from what is computed alone."""

    def fields(self, step: int | None) -> dict[str, Any]:
        """Those of the event."""
        timed = {"timed": True} if self.timed else {}
        return {"what": self.what, "reason": self.reason, "rule": self.rule, "step": step, **timed}


RulesByStep = Mapping[int, Sequence[AlarmRule]]
"""The rules that hold from a step on, in the order of steps."""


class Watched:
    """One rule over one series of numbers."""

    def __init__(self, rule: AlarmRule, metric: str, worker: int | None = None) -> None:
        several = [metric] if "*" in rule.metric else []
        several += [f"rank {worker}"] if worker is not None else []
        self.rule, self.metric, self.kind = rule, metric, rule.kind
        self._limit = getattr(rule, rule.kind)
        self.what = ", ".join([rule.called, *several])
        self.is_open = False
        self._past: deque[float] = deque(maxlen=rule.window)
        self._in_a_row = 0
        self._value = self._usual = math.nan
        self._best, self._since = math.inf, 0

    def is_beyond(self, value: float) -> bool:
        """Whether a value is beyond the rule's limit, or while the alarm lasts, nearly. It is then one of the past."""
        kind, limit, self._value = self.kind, self._limit, value
        if kind == "not_finite":
            return not math.isfinite(value)
        if math.isnan(value) or (math.isinf(value) and kind not in ("above", "below")):
            return False
        if kind in ("above", "below"):
            return self._passes(value, limit, kind == "above")
        if kind == "stalls":
            return self._stalls(value)
        past = list(self._past)
        self._past.append(value)
        if kind == "climbs":
            return self._climbs()
        if len(past) < min(self.rule.after, self.rule.window):
            return False
        usual = self._usual = median(past)
        if abs(value - usual) <= self.rule.least:
            return False
        if kind == "deviates":
            deviation = _NORMAL * median(abs(each - usual) for each in past)
            times = abs(value - usual) / deviation if deviation else 0.0  # what never varied says nothing of how far
            return self.rule.direction != ("down" if value > usual else "up") and self._passes(times, limit, above=True)
        return usual > 0 and self._passes(value, limit * usual, kind == "rises")  # else a multiple means nothing

    def hold_to(self, rule: AlarmRule) -> Watched:
        """Go on with the rule as it was amended: what was seen stays, and the next value is held against it."""
        if rule.window != self.rule.window:
            self._best, self._since = math.inf, 0  # it was of other means
        self.rule, self._limit, self._past = rule, getattr(rule, rule.kind), deque(self._past, maxlen=rule.window)
        return self

    def _passes(self, value: float, limit: float, above: bool) -> bool:
        within = self.rule.margin * abs(limit) if self.is_open else 0.0
        return value > limit - within if above else value < limit + within

    def _stalls(self, value: float) -> bool:
        self._past.append(value if self.rule.better == "lower" else -value)
        if len(self._past) == self.rule.window:
            mean = fmean(self._past)
            if mean < self._best - self.rule.least or math.isinf(self._best):
                self._best, self._since = mean, 0
            else:
                self._since += 1
        return self._since >= self._limit

    def _climbs(self) -> bool:
        first, last = self._past[0], self._past[-1]
        rises = len(self._past) == self.rule.window and all(a < b for a, b in pairwise(self._past))
        return rises and last > self._limit * first and last - first > self.rule.least

    def take(self, beyond: bool) -> Change | None:
        """What follows from whether the newest value is beyond the limit."""
        self._in_a_row = self._in_a_row + 1 if beyond != self.is_open else 0
        if self._in_a_row < (self.rule.quiet if self.is_open else self.rule.for_):
            return None
        self.is_open, self._in_a_row = not self.is_open, 0
        kind = "alarm" if self.is_open else "alarm_over"
        return Change(kind, self.what, self._reason(), self.rule.called, self.is_timed)

    def _reason(self) -> str:
        now = f"{self.metric} is {self._shown(self._value)}"
        match self.kind:
            case "above" | "below" if self.is_open:
                return f"{now}, {self.kind} {self._shown(self._limit)}"
            case "climbs" if self.is_open:
                return f"{now}, and grew with each of {self.rule.window} values from {self._shown(self._past[0])}"
            case "stalls":
                best = self._best if self.rule.better == "lower" else -self._best
                return f"{now}; the best was {self._shown(best)}, {self._since:,} values ago"
            case "deviates" | "rises" | "falls":
                return f"{now}, usually {self._shown(self._usual)}"
        return now

    def _shown(self, value: float) -> str:
        is_size = self.metric.endswith("_bytes") and math.isfinite(value)
        return f"{value / MIB:,.0f} MiB" if is_size else f"{value:.4g}"

    @property
    def is_timed(self) -> bool:
        return any(fnmatchcase(self.metric, pattern) for pattern in _TIMED)


class Watch:
    """Rules over all series that come."""

    def __init__(self, rules: Iterable[AlarmRule]) -> None:
        self._rules = tuple(rules)
        self._series: dict[tuple[str, int | None], list[Watched]] = {}
        self._known: dict[str, list[AlarmRule]] = {}
        self._seen: set[str] = set()

    def take(self, line: Mapping[str, Any]) -> list[Change]:
        """What changes with the metrics of a step."""
        return self.take_all({None: with_derived(line)})

    def take_all(self, lines: Mapping[int | None, Mapping[str, Any]]) -> list[Change]:
        """What changes with the metrics of several workers at one time."""
        names = dict.fromkeys(name for line in lines.values() for name in line)
        self._seen.update(names)
        changes: list[Change] = []
        for name in names:
            if not self._rules_of(name):
                continue
            numbers = {worker: line[name] for worker, line in lines.items() if _is_number(line.get(name))}
            watched = [self._watched(name, worker) for worker in numbers]
            for of_rule in zip(*watched, strict=True):
                if of_rule[0].rule.without not in self._seen:
                    changes += self._judge(of_rule, list(numbers.values()))
        return changes

    def hold_to(self, rules: Iterable[AlarmRule]) -> list[Change]:
        """Go on with other rules. One that is new has seen nothing yet; the alarm of one that is gone is over."""
        self._rules, self._known = tuple(rules), {}
        changes: list[Change] = []
        for (name, worker), series in self._series.items():
            before = {_identity(each.rule): each for each in series}
            now = [(rule, before.pop(_identity(rule), None)) for rule in self._rules_of(name)]
            self._series[name, worker] = [
                known.hold_to(rule) if known else Watched(rule, name, worker) for rule, known in now
            ]
            changes += [
                Change("alarm_over", gone.what, "its rule was taken away", gone.rule.called, gone.is_timed)
                for gone in before.values()
                if gone.is_open
            ]
        return changes

    def open(self) -> Iterator[Watched]:
        """The alarms that last."""
        return (each for series in self._series.values() for each in series if each.is_open)

    def _judge(self, watched: Sequence[Watched], numbers: Sequence[float]) -> Iterator[Change]:
        """One rule over one metric of all workers."""
        beyond = [each.is_beyond(float(number)) for each, number in zip(watched, numbers, strict=True)]
        if watched[0].kind in ("rises", "falls", "deviates") and len(beyond) > 1 and all(beyond):
            beyond = [False] * len(beyond)  # what all do at once is no fault of one
        for each, is_beyond in zip(watched, beyond, strict=True):
            if change := each.take(is_beyond):
                yield change

    def _watched(self, name: str, worker: int | None) -> list[Watched]:
        if (name, worker) not in self._series:
            self._series[name, worker] = [Watched(rule, name, worker) for rule in self._rules_of(name)]
        return self._series[name, worker]

    def _rules_of(self, name: str) -> list[AlarmRule]:
        if name not in self._known:
            self._known[name] = [rule for rule in self._rules if fnmatchcase(name, rule.metric)]
        return self._known[name]


def _identity(rule: AlarmRule) -> tuple[str, str, str]:
    """What an amendment leaves of a rule that it does not replace by another."""
    return rule.called, rule.metric, rule.kind


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def with_derived(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics with what is made of several: ``trained_share`` of the tokens, and ``engine_gap_share`` of what
    the precision explains."""
    derived = {}
    for name, of, whole in (
        ("trained_share", "trained_tokens", "tokens"),
        ("engine_gap_share", "engine_gap", "engine_gap_explained"),
    ):
        if _is_number(line.get(of)) and line.get(whole):
            derived[name] = line[of] / line[whole]
    return {**line, **derived}


class StageWatch:
    """The rules over a stage's lines of metrics, taken up where the lines and the events of the run stand.

    An alarm is told once, though a stage that goes back to a checkpoint comes to it again.
    """

    def __init__(self, rules: RulesByStep, stage: str, happened: Sequence[events.Event]) -> None:
        self._watch, self._rules, self._step = Watch(()), dict(rules), 0
        names = {rule.called for held in rules.values() for rule in held if not rule.of_workers}
        self._told: dict[int | None, dict[tuple[str, str], str]] = {}
        """What was told with each step, and by which rule."""
        for event in since_begun(happened, stage):
            if isinstance(event, events.Alarm | events.AlarmOver) and event.rule in names:
                told = self._told.setdefault(event.step, {})
                if event.kind == "alarm" or told.pop(("alarm", event.what), None) is None:  # else it was taken back
                    told[event.kind, event.what] = event.rule

    def hold_to(self, rules: RulesByStep) -> None:
        """Rules were amended: those of the steps that are to come."""
        self._rules = {step: held for step, held in rules.items() if step > self._step}

    def take(self, line: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events that are to be told with a line, each as its kind and fields."""
        step, changes = line["step"], list[Change]()
        self._step = step
        for begins in [first for first in self._rules if first <= step]:
            held = self._rules.pop(begins)
            changes += self._watch.hold_to(rule for rule in held if not rule.of_workers)
        changes += self._watch.take(line)
        told = self._told.pop(step, {})
        for change in changes:
            if told.pop((change.kind, change.what), None) is None:
                yield change.kind, change.fields(step)
        for (kind, what), rule in told.items():
            if kind == "alarm":  # of a life that went otherwise
                reason = "it did not come again when the step was repeated"
                yield "alarm_over", {"what": what, "reason": reason, "rule": rule, "step": step}


def since_begun(happened: Sequence[events.Event], stage: str) -> list[events.Event]:
    """The events of a stage since its present revision began."""
    of_stage = [event for event in happened if event.stage == stage]
    last = max((n for n, event in enumerate(of_stage) if isinstance(event, events.StageSetAside)), default=-1)
    return of_stage[last + 1 :]


def left_behind(
    rules: Iterable[AlarmRule], stage: str, happened: Sequence[events.Event]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events that say that alarms are over to whose end nobody looks any more, while nothing works on the stage:
    those of workers, and of rules that are no more. ``rules`` are those that hold."""
    watched = {rule.called for rule in rules if not rule.of_workers}
    for each in standing(since_begun(happened, stage)):
        alarm = each.alarm
        if alarm.rule and each.over is None and alarm.rule not in watched:
            reason = "its workers, or its rule, are gone"
            yield "alarm_over", {"what": alarm.what, "reason": reason, "rule": alarm.rule, "step": None, "timed": True}


# --- what stands ----------------------------------------------------------------------------------------------


@dataclass
class Standing:
    """An alarm that a person should know of: it lasts, or nobody has acknowledged it yet."""

    alarm: events.Alarm
    over: events.AlarmOver | None = None
    acknowledged: bool = False

    def to_json(self) -> dict[str, Any]:
        """As objects that JSON knows."""
        fields = self.alarm.model_dump(mode="json", exclude_none=True, exclude={"kind", "timed"})
        over = self.over.time if self.over else None
        return {**fields, "over": over, "acknowledged": self.acknowledged}


def standing(happened: Sequence[events.Event]) -> list[Standing]:
    """The alarms that last or are not acknowledged, in order. Those of a revision that was set aside are gone; what is
    no rule's does not last."""
    known: dict[tuple[str | None, str], Standing] = {}
    for event in happened:
        match event:
            case events.StageSetAside():
                known = {key: each for key, each in known.items() if key[0] != event.stage}
            case events.Alarm():
                known.pop((event.stage, event.what), None)  # the newest goes last
                known[event.stage, event.what] = Standing(event)
            case events.AlarmOver() if (event.stage, event.what) in known:
                known[event.stage, event.what].over = event
            case events.AlarmAcknowledged() if (event.stage, event.what) in known:
                known[event.stage, event.what].acknowledged = True
    return [each for each in known.values() if not each.acknowledged or (each.alarm.rule and each.over is None)]
