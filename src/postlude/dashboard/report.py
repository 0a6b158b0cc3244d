"""``postlude report``: the page of a run as one file that opens from disk, with what draws it inside."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from postlude import storage
from postlude.dashboard import charts
from postlude.dashboard.followed import Followed
from postlude.errors import UserError
from postlude.runs import open_run
from postlude.secrecy import without_secrets
from postlude.telemetry.progress import duration
from postlude.workflow.drawing import draw
from postlude.workflow.incidents import incidents

WIDTH = 600
"""Pixel columns of a curve."""
_STYLE = Path(__file__).with_name("report.css")
_EXPORTS = re.compile(r"export\s*\{([^{}]*)\};?\s*(//# sourceMappingURL=\S*\s*)?$")
_DRAW = """
const shown = JSON.parse(document.getElementById("charts").textContent);
for (const [id, options] of Object.entries(shown)) {
  const place = document.getElementById(id);
  const chart = echarts.init(place, null, {renderer: "canvas"});
  chart.setOption(options);
  chart.group = "report";
  chart.dispatchAction({type: "takeGlobalCursor", key: "dataZoomSelect", dataZoomSelectActive: true});
  place.addEventListener("dblclick", () => chart.dispatchAction({type: "dataZoom", start: 0, end: 100}));
  new ResizeObserver(() => chart.resize()).observe(place);
}
echarts.connect("report");
"""


def write_report(place: str, output: str) -> str:
    """Write the report of a run into a file, and say what was written. UserError if there is no run, or NiceGUI, which
    has the library that draws, is not installed."""
    run = open_run(place)
    library = echarts_script()
    followed = Followed(run)
    followed.update()
    if followed.status is None:
        raise UserError(followed.troubles["run"])
    content = report(followed, library).encode("utf-8", "replace")
    storage.write_bytes(output, content)
    return f"Wrote {output}, {len(content) / 2**20:.1f} MiB. It opens from disk, without a network."


def report(followed: Followed, library: str) -> str:
    """The report as HTML. Every text of the run is escaped, what is drawn is JSON that no text can end."""
    body: list[str] = []
    drawn: dict[str, charts.Options] = {}
    for part in _parts(followed):
        if isinstance(part, tuple):
            options, height = part
            drawn[f"chart{len(drawn)}"] = options
            label = escape(options["aria"]["label"]["description"], quote=True)
            place = f'id="chart{len(drawn) - 1}" class="chart" style="height: {height}px"'
            part = f'<div {place} role="img" aria-label="{label}"></div>'
        body.append(part)
    name = escape(followed.run.name)
    return "\n".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"content-security-policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; img-src data: blob:\">",
        f"<title>{name} - Postlude</title><style>{_STYLE.read_text('utf-8')}</style></head><body>",
        *body,
        f'<script type="application/json" id="charts">{safe_json(drawn)}</script>',
        f'<script type="module">{library}\n{_DRAW}</script></body></html>',
    ])  # fmt: skip


def safe_json(document: Any) -> str:
    """JSON for the inside of a script element, which nothing in it can end."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def echarts_script() -> str:
    """The library that draws, as a module which ends with the name ``echarts``: it comes with NiceGUI."""
    found = find_spec("nicegui")
    if found is None or found.origin is None:
        raise UserError(
            "A report is drawn by what comes with NiceGUI. Install it with: pip install 'postlude[dashboard]'."
        )
    folder = Path(found.origin).parent / "elements" / "echart" / "dist"
    entry = (folder / "index.js").read_text("utf-8")
    source = re.match(r'\s*import\s*\{([^{}]*)\}\s*from\s*"\./([^"]+)"', entry)
    names = _EXPORTS.search(entry)
    if source is None or names is None:
        raise UserError(
            f"The charts of this version of NiceGUI are packed in another way: {folder}. Install nicegui 3.18."
        )
    text = (folder / source[2]).read_text("utf-8")
    exports = _EXPORTS.search(text)
    assert exports is not None
    name = _aliases(exports[1])[_aliases(source[1])[_aliases(names[1])["echarts"]]]
    return f"{text[: exports.start()]};const echarts={name};".replace("</script", "<\\/script")


def _aliases(names: str) -> dict[str, str]:
    """What stands between the braces of an export or an import: each name by that which it is given."""
    pairs = [name.strip().partition(" as ")[::2] for name in names.split(",")]
    return {other or own: own for own, other in pairs}


# --- its parts ----------------------------------------------------------------------------------------------


def _parts(followed: Followed) -> Iterator[str | tuple[charts.Options, int]]:
    """Pieces of HTML, and charts with their heights in pixels."""
    status = followed.status
    assert status is not None
    yield f"<h1>{escape(followed.run.name)}</h1>"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    yield f"<p>{escape(without_secrets(followed.run.uri))}: {status.state}. Written {now}.</p>"
    stages = {each.summary.stage: each for each in status.stages}
    needs = {name: (each.summary.state, each.needs) for name, each in stages.items()}
    yield charts.graph(needs), 20 + 70 * charts.rows_of(needs)
    rows = []
    for name, branch, _ in draw({name: each.needs for name, each in stages.items()}):
        summary = stages[name].summary
        loss = "" if summary.last_loss is None else f"{summary.last_loss:z.4f}"
        made_by = stages[name].taken_over_from
        state = f"{summary.state}, from {made_by}" if made_by else summary.state
        rows.append([branch, state, f"{summary.steps:,}", loss, f"{summary.tokens:,}", duration(summary.seconds)])
    yield table(["stage", "state", "steps", "last loss", "tokens", "time"], rows)
    for damage in [*followed.troubles.values(), *(line for each in status.stages for line in each.damages)]:
        yield f'<p class="damage">{escape(damage)}</p>'
    happened = followed.events()
    for name in stages:
        yield from _stage(followed, name, charts.marks_of(happened, name))
    yield "<h2>What failed</h2>"
    failed = [[each.time[:19].replace("T", " "), each.stage or "", each.what, each.recovered or "not",
               "" if each.seconds is None else duration(each.seconds)] for each in incidents(happened)]  # fmt: skip
    yield table(["when, UTC", "stage", "what", "how it went on", "time"], failed) if failed else "<p>Nothing.</p>"


def _stage(followed: Followed, name: str, marks: Sequence[charts.Mark]) -> Iterator[str | tuple[charts.Options, int]]:
    columns = followed.columns(name)
    steps, names = columns.steps, columns.names
    if not len(steps):
        return
    first, last = int(steps[0]), int(steps[-1])
    yield f"<h2>{escape(name)}</h2>"
    drawn = [(title, found) for title, found, _ in charts.grouped(names) if found]
    rest = [(metric, [metric]) for metric in charts.others(names)]
    for heading, groups in (("", drawn), ("Every other metric", rest)):
        yield f"<details><summary>{heading}</summary>" if heading else ""
        yield '<div class="charts">'
        for title, found in groups:
            lines = [charts.Line(metric, followed.curve(name, metric, WIDTH)) for metric in found]
            yield f"<figure><figcaption>{escape(title)}</figcaption>"
            yield charts.chart(title, lines, marks, first, last), 220
            yield "</figure>"
        yield "</div>" + ("</details>" if heading else "")
    if marks:
        rows = [[f"{mark.step:,}", mark.kind, mark.text] for mark in charts.thinned(marks, first, last)]
        yield "<details><summary>Marks on the curves</summary>" + table(["step", "kind", "what"], rows) + "</details>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    lines = ["<tr>" + "".join(f"<td>{escape(without_secrets(text))}</td>" for text in row) + "</tr>" for row in rows]
    return f'<div class="table"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
