"""How fast the page shows a very large run (benchmarks/big_run.py), in how much memory, and what it costs a training.

python benchmarks/page.py FOLDER [--share 0.1] --part PART

FOLDER holds the run, which is written there the first time. Each part is measured alone:

- *readers*: what the server reads and sends, without server or browser, view by view;
- *browser*: a server, and chromium at each of its views. *Cold* is from the start of the server's process, *warm* from
  the start of the navigation, until the first chart has a pixel in its curve's colour, and until the last has. Then the
  memory of the server, now and at most. The first look of a browser has nothing in its cache;
- *tensorboard*: until TensorBoard's server has every curve to the last step (without a browser, to its favour), beside
  every chart of the page painted, from the start of its process;
- *training*: steps a second of a tiny model beside which the page is open in chromium, and of the same run without,
  in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import big_run
import page_tensorboard
import psutil

from postlude import storage
from postlude.dashboard.charts import COLORS
from postlude.runs import Run
from postlude.runs.columns import Columns
from postlude.runs.losses import Losses
from postlude.runs.samples import Rollouts
from postlude.runs.workers import Workers

WIDTH = 600
TURNS = 5
LOOK_SECONDS = 120
ROUNDS, ROUND_SECONDS = 8, 15
VIEWS = ("stage&more=60", "workers", "data", "data&example=math:0000000114514fa2", "rollouts", "events", "overview")
PAINTED = """
window.painted = {};
const color = [1, 3, 5].map(at => parseInt("%s".slice(at, at + 2), 16));
const look = () => {
  for (const canvas of document.querySelectorAll(".nicegui-echart canvas")) {
    const id = canvas.closest(".nicegui-echart").id;
    if (id in window.painted || !canvas.width) continue;
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    for (let at = 0; at < data.length; at += 4)
      if (color.every((part, place) => data[at + place] === part)) { window.painted[id] = performance.now(); break; }
  }
  requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""


def timed(name: str, act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    spent = time.perf_counter() - begun
    print(f"  {name}: {spent:.3f} s", flush=True)
    return spent


def read(uri: str) -> None:
    """Read the run as the page's server does, and tell what each view takes."""
    stage = Run(uri).stage("policy")
    columns, losses = Columns(stage.metrics), Losses(stage.examples)
    rollouts, workers = Rollouts(stage.rollouts), Workers(stage.readings)

    def curves() -> int:
        drawn = {name: columns.curve(name, WIDTH) for name in columns.names}
        sent = json.dumps({name: [curve.steps.tolist(), curve.values.tolist()] for name, curve in drawn.items()})
        assert big_run.SPIKE_LOSS in drawn["loss"].values, "the spike is not in the picture"
        return len(sent)

    begun = psutil.Process().create_time()
    timed("metrics, read once", columns.update)
    curves()
    print(f"  cold, since the process began: {time.time() - begun:.1f} s", flush=True)
    timed("warm, curves of every metric", curves)
    best = min(timed("again", curves) for _ in range(TURNS - 1))
    print(f"curves of every metric, warm: {best:.3f} s, {curves() / 2**20:.1f} MiB sent", flush=True)
    timed("losses by example, read once", losses.update)
    worst = losses.ranked("worst", 20)
    timed("the worst, the forgotten, by source", lambda: (losses.ranked("forgotten", 20), losses.by_source()))
    timed("the history of an example", lambda: losses.history(worst[0].example_id))
    timed("nothing new", losses.update)
    timed("rollouts, read once", rollouts.update)
    timed("a first page of groups", rollouts.groups)
    timed("another, by reward", lambda: rollouts.groups("reward", outcome="dropped"))
    timed("the samples of a group", lambda: rollouts.samples(64))
    timed("readings, read once", workers.update)
    timed(
        "every worker",
        lambda: [(workers.curve(r, "resident_bytes", WIDTH), workers.bands(r, WIDTH)) for r in workers.ranks],
    )


# --- with a browser ------------------------------------------------------------------------------------------


@contextmanager
def served(folder: str) -> Iterator[tuple[psutil.Process, str, str]]:
    """A server: its process, its address, and that with the token."""
    command = [sys.executable, "-P", "-m", "postlude", "dashboard", folder, "--port", "0", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        opened = json.loads(server.stdout.readline())["amend"]
        yield psutil.Process(server.pid), opened.partition("/?")[0], opened
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def chromium() -> Iterator[Any]:
    """A new browser, which notes when a chart has a pixel in the colour of the first curve."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": PAINTED % COLORS[0]})
    yield driver
    driver.quit()


def painted(browser: Any, address: str, all_charts: bool = False) -> tuple[float, float]:
    """Seconds from the start of a navigation until a chart was painted, and until the last one was."""
    browser.get(address)
    deadline, times = time.monotonic() + LOOK_SECONDS, {}
    settled = time.monotonic()
    while time.monotonic() < deadline:
        found = browser.execute_script("return window.painted")
        if len(found) > len(times):
            times, settled = found, time.monotonic()
        if times and (not all_charts or time.monotonic() - settled > 2):
            return min(times.values()) / 1000, max(times.values()) / 1000
        time.sleep(0.05)
    raise TimeoutError(f"No chart was painted at {address}.")


def look(folder: str) -> None:
    """How fast each view has its first picture, and what the server holds then."""
    begun = time.time()
    with served(folder) as (server, address, opened):
        with chromium() as browser:
            browser.get(opened)
            painted(browser, f"{address}/?run=big&view=stage&stage=policy")
            print(f"cold: {time.time() - begun:.1f} s since the server began; {told(server)}", flush=True)
            for view in VIEWS:
                spent = time.perf_counter()
                browser.get(f"{address}/?run=big&stage=policy&view={view}")
                while "Reading" in (text := browser.find_element("tag name", "main").text) or len(text) < 200:
                    time.sleep(0.2)
                    if time.perf_counter() - spent > LOOK_SECONDS:
                        raise TimeoutError(f"{view} is not shown.")
                time.sleep(1)
                print(f"  {view}: {time.perf_counter() - spent:.1f} s for the first time; {told(server)}", flush=True)
        with chromium() as browser:
            browser.get(opened)
            looks = [painted(browser, f"{address}/?run=big&view=stage&stage=policy", True) for _ in range(TURNS + 1)]
            for name, (first, last) in zip(("of a new browser", *["again"] * TURNS), looks, strict=True):
                print(f"  warm, {name}: {first:.3f} s, the last chart {last:.3f} s", flush=True)
            middle = statistics.median(first for first, _ in looks[1:])
            print(f"first picture, warm: {middle:.3f} s, {looks[0][0]:.3f} s of a new browser; {told(server)}")


def told(server: psutil.Process) -> str:
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            most = int(line.split()[1]) / 1024
    return f"server {server.memory_info().rss / 2**20:,.0f} MiB, {most:,.0f} at most"


def beside_tensorboard(folder: Path) -> None:
    begun = time.perf_counter()
    with served(str(folder / "big")) as (_, address, opened), chromium() as browser:
        browser.get(opened)
        painted(browser, f"{address}/?run=big&view=stage&stage=policy&more=60", True)
        ours = time.perf_counter() - begun
    columns = Columns(Run(str(folder / "big")).stage("policy").metrics)
    columns.update()
    print(f"the page, cold, all {len(columns.names)} curves of {len(columns.steps):,} steps: {ours:.1f} s", flush=True)
    written = folder / "tensorboard"
    if not written.exists():
        timed("event file, written", lambda: page_tensorboard.write_events(columns, written / "big"))
    theirs = page_tensorboard.compare(written, columns)
    print(f"the page takes {ours / theirs:.3f} of TensorBoard's time to the same curves", flush=True)


# --- beside a training ----------------------------------------------------------------------------------------


def train(folder: Path) -> None:
    """Steps a second without the page and with it, in turns of one run."""
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{n} and {n + 1} are {2 * n + 1}."}) + "\n" for n in range(500)))
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {"new": {"architecture": "llama", "config": size}}
    stage = {"recipe": "sft", "model": model, "tokenizer": {"bytes": True}, "data": {"texts": 1.0}, "threads": 1,
             "steps": 10_000_000, "batch": {"tokens": 1024, "block": 256}}  # fmt: skip
    manifest = {"name": "tiny", "run_dir": str(folder), "stages": {"sft": stage},
                "data": {"texts": {"source": {"path": str(texts)}, "format": "text"}}}  # fmt: skip
    (folder / "tiny.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-P", "-m", "postlude", "run", str(folder / "tiny.json"), "--inline"]
    columns = Columns(Run(str(folder / "tiny")).stage("sft").metrics)
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        with served(str(folder / "tiny")) as (server, address, opened), chromium() as browser:
            browser.get(opened)
            painted(browser, f"{address}/?run=tiny&view=stage&stage=sft")
            without, beside = [], []
            for _ in range(ROUNDS):
                browser.get("about:blank")
                server.suspend()
                without.append(seconds_a_step(columns))
                server.resume()
                painted(browser, f"{address}/?run=tiny&view=stage&stage=sft")
                beside.append(seconds_a_step(columns))
    finally:
        training.kill()
        training.wait()
    for name, rounds in (("without", without), ("beside the page", beside)):
        print(f"{name}: {[f'{1000 * each:.3f}' for each in rounds]} ms a step", flush=True)
    ratios = [b / a for a, b in zip(without, beside, strict=True)]
    drift = [b / a for a, b in pairwise(without)]
    print(f"a step beside the page takes {statistics.median(ratios):.4f} of one without (rounds {min(ratios):.3f} to "
          f"{max(ratios):.3f}; without, one round to the next, {min(drift):.3f} to {max(drift):.3f})")  # fmt: skip


def seconds_a_step(columns: Columns) -> float:
    """The median of the steps of a round."""
    time.sleep(2)  # what was opened or closed has settled
    columns.update()
    before = len(columns.steps)
    time.sleep(ROUND_SECONDS)
    columns.update()
    return float(statistics.median(columns.column("seconds")[1][before:].tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--part", choices=("readers", "browser", "tensorboard", "training"), required=True)
    chosen = parser.parse_args()
    if chosen.part == "training":
        with tempfile.TemporaryDirectory() as folder:
            train(Path(folder))
        return
    run = Run(storage.join(str(chosen.folder), "big"))
    if not run.exists():
        timed("the run, written", lambda: big_run.make(str(chosen.folder), chosen.share))
    match chosen.part:
        case "readers":
            read(run.uri)
        case "browser":
            look(run.uri)
        case "tensorboard":
            beside_tensorboard(chosen.folder)


if __name__ == "__main__":
    main()
