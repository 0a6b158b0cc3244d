"""What a policy answered: groups of samples to choose among, and one of them with its rewards, turns and tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from nicegui import ui

from postlude.dashboard import charts_records, frame
from postlude.dashboard.charts_records import COLOURINGS, Colouring
from postlude.dashboard.followed import Followed
from postlude.dashboard.kept import kept
from postlude.dashboard.views.browse import Browse
from postlude.dashboard.views.tables import Cell, Link, Table
from postlude.runs import Stage
from postlude.runs.samples import Group, Rollouts, Sort
from postlude.runs.tokens import Tokens

ROWS = 25
ANY = "any"
_HEADS = ["prompt", "step", "samples", "reward", "from", "to", "most advantage", "tokens", "stale", "outcome", "why"]


@dataclass(frozen=True)
class _Told:
    """What the view shows."""

    lines: int
    became: Mapping[tuple[str | None, str | None], int]
    count: int
    page: Sequence[Group]
    group: Group | None
    samples: Sequence[Mapping[str, Any]]
    journey: Sequence[Group]
    """All draws of the group's prompt."""


def _reader(stage: Stage) -> Rollouts:
    return Rollouts(stage.rollouts)


def _drawn(rollouts: Rollouts, view: dict[str, str]) -> _Told:
    count, page = rollouts.groups(
        _sort(view),
        "rising" not in view,
        (frame.number(view, "page") or 0) * ROWS,
        ROWS,
        outcome=view.get("outcome"),
        reason=view.get("reason"),
        alike=True if "alike" in view else None,
    )
    issue, prompt_id = frame.number(view, "issue"), view.get("prompt")
    number = None if issue is None else rollouts.number(issue, prompt_id)
    group = None if number is None else rollouts.group(number)
    samples = [] if number is None else rollouts.samples(number)
    journey = rollouts.groups(prompt_id=prompt_id, descending=False, count=ROWS)[1] if group and prompt_id else []
    return _Told(len(rollouts), rollouts.became(), count, page, group, samples, journey)


class _RolloutsPage(Browse[Rollouts, _Told]):
    def __init__(self, followed: Followed, stage: str, view: dict[str, str]) -> None:
        super().__init__(kept(followed, stage, _reader), view)
        self.shown: tuple[Any, ...] | None = None
        self.none = frame.nothing("Reading ...")
        with ui.column().classes("w-full gap-4") as self.all:
            ui.label("Where the prompts went").classes("font-bold")
            self.became = Table(["outcome", "why", "prompts"])
            self.no_group = frame.nothing("")
            self.group = ui.column().classes("w-full gap-2")
            ui.label("Groups").classes("font-bold")
            self._controls()
            self.no_groups = frame.nothing("No group is so: take a filter away.")
            self.table = Table(_HEADS)
            with ui.row().classes("items-center gap-2"):
                self.before = ui.button("Before", on_click=lambda: self._turn(-1)).props("flat dense")
                self.where = ui.label()
                self.after = ui.button("After", on_click=lambda: self._turn(1)).props("flat dense")

    def _controls(self) -> None:
        view = self.view
        with ui.row().classes("items-center gap-x-4 gap-y-1 w-full"):
            sort = ui.select(list(get_args(Sort)), value=_sort(view), label="Sorted by")
            sort.props("dense").classes("w-32")
            sort.on_value_change(lambda event: self._set(sort=None if event.value == "step" else event.value))
            rising = ui.switch("Least first", value="rising" in view)
            rising.on_value_change(lambda event: self._set(rising="1" if event.value else None))
            self.filters = {}
            for key in ("outcome", "reason"):
                chosen = view.get(key, ANY)
                self.filters[key] = ui.select([*dict.fromkeys([ANY, chosen])], value=chosen, label=key.capitalize())
                self.filters[key].props("dense").classes("w-40").on_value_change(
                    lambda event, key=key: self._set(**{key: None if event.value == ANY else event.value})
                )
            alike = ui.switch("All alike", value="alike" in view)
            alike.on_value_change(lambda event: self._set(alike="1" if event.value else None))
            colours = ui.select(list(COLOURINGS), value=_colouring(view), label="Tokens coloured by")
            colours.props("dense").classes("w-40")
            colours.on_value_change(lambda event: self._set(tokens=None if event.value == "ratio" else event.value))

    def _read(self, reader: Rollouts, view: dict[str, str]) -> _Told:
        return _drawn(reader, view)

    def _show(self, told: _Told) -> None:
        self.all.set_visibility(bool(told.lines))
        self.none.set_visibility(not told.lines)
        self.none.set_text("There are no rollouts: this stage has no policy that answers, or has made no round yet.")
        self.became.show(
            {
                f"{outcome} {reason}": [outcome or "left out of its prompt", reason or "", f"{count:,}"]
                for (outcome, reason), count in sorted(told.became.items(), key=lambda item: -item[1])
            }
        )
        for place, key in enumerate(self.filters):
            words = [pair[place] for pair in told.became if pair[place] is not None]
            chosen = self.view.get(key, ANY)
            self.filters[key].set_options([*dict.fromkeys([ANY, chosen, *words])], value=chosen)
        self.table.show({f"{group.number}": _row(group, self.view) for group in told.page})
        self.no_groups.set_visibility(not told.page)
        first = (frame.number(self.view, "page") or 0) * ROWS
        self.where.set_text(f"{first + 1:,} to {min(first + ROWS, told.count):,} of {told.count:,}")
        self.before.set_visibility(first > 0)
        self.after.set_visibility(first + ROWS < told.count)
        self._show_group(told)

    def _show_group(self, told: _Told) -> None:
        colouring = _colouring(self.view)
        if (told.group, colouring, told.journey) == self.shown:
            return
        self.shown = told.group, colouring, told.journey
        self.no_group.set_visibility(told.group is None)
        is_asked = "issue" in self.view
        self.no_group.set_text(
            "This group is not there any more: the stage has gone back." if is_asked else "Choose a prompt to read it."
        )
        self.group.clear()
        if told.group is None:
            return
        with self.group:
            ui.label(f"{told.group.prompt_id or 'A prompt'}, draw {told.group.issue}").classes("font-bold break-all")
            if len(told.journey) > 1:
                ui.label("This prompt in every draw")
                Table(_HEADS).show({f"{group.number}": _row(group, self.view) for group in told.journey})
            if told.samples and told.samples[0].get("prompt") is not None:
                _said("asked", _as_text(told.samples[0]["prompt"]))
            for line in told.samples:
                _sample(line, colouring)


def _sample(line: Mapping[str, Any], colouring: Colouring) -> None:
    """One sample of the group."""
    with ui.card().classes("w-full gap-1 p-3 min-w-0"):
        facts = {
            "sample": line.get("sample"),
            "reward": line.get("reward"),
            **(line.get("rewards") or {}),
            "advantage": line.get("advantage"),
            "tokens": line.get("tokens"),
            "ended": line.get("ended"),
            "weights": None if not line.get("versions") else " to ".join(map(str, line["versions"])),
            "outcome": line.get("outcome"),
            "why": line.get("reason"),
            "no reward": line.get("unscored"),
        }
        told = [f"{name} {_short(value)}" for name, value in facts.items() if value is not None]
        ui.label(", ".join(told) or "nothing is told of it").classes("text-sm opacity-80 break-words")
        try:
            tokens = Tokens.of(line)
        except (ValueError, TypeError, KeyError) as error:
            tokens = None
            frame.warn(f"Its tokens cannot be read: {error}")
        if tokens is not None:
            ui.html(charts_records.tokens_html(tokens, colouring), sanitize=False).classes(
                "w-full whitespace-pre-wrap break-words font-mono text-sm"
            )
            return
        turns, replies = line.get("turns"), line.get("replies") or []
        if turns is None:
            _said("answered", line.get("completion") or "")
        for number, turn in enumerate(turns or []):
            _said(f"turn {number + 1}", turn)
            if number < len(replies):
                _said("was replied", _as_text(replies[number]))
        frame.nothing("Of its tokens nothing was kept: rollout.record_tokens says of which prompts it is.")


def _said(who: str, text: str) -> None:
    with ui.row().classes("w-full no-wrap gap-2 items-start"):
        ui.label(who).classes("w-20 shrink-0 text-sm opacity-70")
        ui.label(text).classes("whitespace-pre-wrap break-words font-mono text-sm min-w-0")


def _as_text(asked: Any) -> str:
    """What was asked, or replied: a text, or messages with the calls of tools in them."""
    if isinstance(asked, str):
        return asked
    if not isinstance(asked, list):
        return json.dumps(asked, ensure_ascii=False)
    told = []
    for message in asked:
        if not isinstance(message, Mapping):
            told.append(json.dumps(message, ensure_ascii=False))
            continue
        more = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
        content = message.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        told.append(
            f"{message.get('role', '')}: {text}" + (f"\n{json.dumps(more, ensure_ascii=False)}" if more else "")
        )
    return "\n".join(told)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _sort(view: Mapping[str, str]) -> Sort:
    return next((name for name in get_args(Sort) if name == view.get("sort")), "step")


def _colouring(view: Mapping[str, str]) -> Colouring:
    return next((name for name in COLOURINGS if name == view.get("tokens")), "ratio")


def _row(group: Group, view: dict[str, str]) -> Sequence[Cell]:
    name = group.prompt_id or "never answered"
    here = frame.address(view, issue=group.issue, prompt=group.prompt_id) if group.issue is not None else None
    return [
        Link(name, here) if here else name,
        f"{group.step:,}",
        f"{group.samples}",
        *("" if value is None else f"{value:.4g}" for value in (group.reward, group.least, group.most)),
        "" if group.advantage is None else f"{group.advantage:+.4g}",
        "" if group.tokens is None else f"{group.tokens:,}",
        "" if group.staleness is None else f"{group.staleness} steps",
        (group.outcome or "left out") + (", all alike" if group.is_alike else ""),
        group.reason or "",
    ]


def show(followed: Followed, stage: str | None, view: dict[str, str]) -> None:
    """The rollouts of a stage."""
    if stage is None:
        frame.nothing("No stage has begun yet, so that nothing was answered.")
        return
    frame.refreshed(_RolloutsPage(followed, stage, view).refresh)
