"""The page in a real browser: Debian's chromium, driven by selenium (`make browser` installs it)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashboard.conftest import make_steps, new_run
from postlude.dashboard.report import write_report
from postlude.runs import Run, tokens
from postlude.telemetry import events
from workflow.conftest import Project

pytestmark = pytest.mark.long

SCRIPT = '<img src=x onerror="window.taken=1"><script>window.taken=1</script>'
WAIT_SECONDS = 60
CHART = "const chart = getElement(Number(arguments[0])).chart; return chart.getOption().series.map(s => s.data);"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A window of 1440 x 1000 pixels, without a network but this machine's."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        text = "There is no chromium with its driver: `make browser` installs them."
        if "CI" in os.environ:
            pytest.fail(text)
        pytest.skip(text)
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,1000", alone):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@dataclass(frozen=True)
class Page:
    """A server over a folder of runs."""

    folder: Path
    address: str
    amend: str
    read: str
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("runs")
    run = new_run(folder, "small")
    run.stage("sft").enter("running")
    make_steps(run, range(1, 21))
    command = [sys.executable, "-c", "from postlude.cli import main; main()"]
    command += ["dashboard", str(folder), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        addresses = json.loads(process.stdout.readline())
        address = addresses["amend"].partition("/?")[0]
        yield Page(folder, address, addresses["amend"], addresses["read"], process)
    finally:
        process.terminate()
        _, said = process.communicate(timeout=30)
    tokens = [each.partition("token=")[2] for each in (addresses["amend"], addresses["read"])]
    assert "Traceback" not in said
    assert not any(token in said for token in tokens)


def until(browser: Any, found: Callable[[], Any]) -> Any:
    """What is found at last; it may take as long as a loaded machine needs."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait

    patient = WebDriverWait(browser, WAIT_SECONDS, ignored_exceptions=[WebDriverException, IndexError])
    return patient.until(lambda _: found())


def shown(browser: Any, text: str) -> None:
    until(browser, lambda: text in browser.find_element("tag name", "body").text)


def loss(browser: Any) -> list[list[float]]:
    """The points of the first curve on the page, as the browser has them."""
    charts = browser.find_elements("css selector", ".nicegui-echart")
    data = browser.execute_script(CHART, charts[0].get_attribute("id").removeprefix("c"))
    points: list[list[float]] = data[0]
    return points


@pytest.mark.capability("The live page: a run is followed in a browser, each step once, also after a resume")
def test_a_run_is_followed_live_and_has_each_step_once(browser: Any, page: Page) -> None:
    run = Run(str(page.folder / "small"))
    browser.get(page.amend)
    shown(browser, "small")
    assert "token" not in browser.current_url
    browser.get(f"{page.address}/?run=small&view=stage&stage=sft")
    until(browser, lambda: loss(browser) == [[step, 5 / step] for step in range(1, 21)])
    make_steps(run, range(21, 31))
    until(browser, lambda: loss(browser)[-1] == [30, 5 / 30])
    run.stage("sft").cut_back(25)
    events.record(run.events, "worker_failure", "sft", what="process", reason="killed by signal 9")
    events.record(run.events, "stage_started", "sft", from_step=25)
    make_steps(run, range(26, 41))
    until(browser, lambda: loss(browser) == [[step, 5 / step] for step in range(1, 41)])
    browser.get(f"{page.address}/?run=small&view=events")
    shown(browser, "sft went on after step 25")
    browser.get(f"{page.address}/?run=small&view=stage&stage=sft&from=10&to=12&over=2")
    until(browser, lambda: [step for step, _ in loss(browser)] == [10, 11, 12])
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.capability("The live page: a run that is killed and resumed has each step once")
def test_a_run_that_is_killed_is_followed_through_its_resume(browser: Any, page: Page, tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.manifest |= {"name": "killed", "run_dir": str(page.folder)}
    project.stage |= {"steps": 40, "checkpoint": {"every": 5}}
    project.write()
    command = [sys.executable, "-c", "from postlude.cli import main; main()", "run", str(project.path), "--inline"]
    stage = Run(str(page.folder / "killed")).stage("sft")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(browser, lambda: len(stage.metrics.read()) >= 8)
        first.send_signal(signal.SIGSTOP)  # it must not come to its end while the page opens
        browser.get(page.amend)
        browser.get(f"{page.address}/?run=killed&view=stage&stage=sft")
        until(browser, lambda: len(loss(browser)) >= 8)
    finally:
        first.kill()
        first.wait()
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told = [[line["step"], line["loss"]] for line in stage.metrics.read()]
    assert [step for step, _ in told] == list(range(1, 41))
    until(browser, lambda: loss(browser) == told)
    browser.get(f"{page.address}/?run=killed&view=events")
    shown(browser, "ended without a word")


@pytest.mark.capability("The live page: scripts in names and texts of runs are shown as text")
def test_scripts_in_a_run_are_shown_as_text(browser: Any, page: Page) -> None:
    name = SCRIPT.replace("/", "")
    run = new_run(page.folder, name)
    run.stage("sft").enter("running")
    make_steps(run, range(1, 6), **{SCRIPT: 1.0, ":x": 2.0})
    events.record(run.events, "alarm", "sft", what=SCRIPT, reason=SCRIPT, step=3)
    events.record(run.events, "failure", "sft", error=SCRIPT)
    browser.get(page.amend)
    shown(browser, name)
    browser.find_element("link text", name).click()
    shown(browser, SCRIPT)
    here = browser.current_url
    for view in ("stage&stage=sft", "events"):
        browser.get(f"{here}&view={view}")
        shown(browser, SCRIPT)
        assert browser.execute_script("return window.taken") is None
        assert browser.find_elements("css selector", "img[src=x]") == []
    for key in (
        "run",
        "run=small&stage",
        "run=small&view",
        "run=small&view=stage&search",
        "compare",
        "search",
        "theme",
    ):
        told = urllib.parse.quote("</title></script>" + SCRIPT + "`${window.taken=1}`{{window.taken=1}}")
        browser.get(f"{page.address}/?{key}={told}")
        until(browser, lambda: len(browser.find_element("tag name", "body").text) > 40)
        assert browser.execute_script("return window.taken") is None, key
    browser.get(f"{page.address}/?compare=small/{urllib.parse.quote(name)}")
    shown(browser, name)
    assert browser.execute_script("return window.taken") is None


def write_records(run: Run) -> None:
    """A stage with losses by example, rollouts and readings, whose texts are scripts."""
    stage = run.stage("sft")
    stage.enter("running")
    make_steps(run, range(1, 4))
    writer = stage.examples_writer()
    for step, loss in enumerate((4.0, 1.0, 3.0), 1):
        writer.write(step, 0, [(f"chats:{SCRIPT}", "chats", loss * 2, 2), ("chats:b", "chats", 1.5, 1)])
    writer.flush()
    one = np.array([-1.0])
    kept = tokens.told([SCRIPT, "seven"], [False, True], [0], one, one + np.log(1.25), one * -2)
    for sample, more in enumerate(({**kept, "completion": "seven"}, {"turns": [SCRIPT, "b"], "replies": [SCRIPT]})):
        line = {"step": 1, "issue": 0, "prompt_id": f"chats:{SCRIPT}", "sample": sample, "prompt": SCRIPT}
        stage.rollouts.append({**line, "reward": 1.0, "rewards": {SCRIPT: 1.0}, "outcome": "trained", **more})
    engine = {"version": 2, "requests": 4, "tokens": 80, "seconds": 2.0}
    for rank in range(2):
        reading = {"rank": rank, "host": SCRIPT, "round_trip_seconds": 0.001, "step": 3, "resident_bytes": 2**27}
        seconds = {"seconds": 2.0, "seconds_forward": 0.5 + rank}
        told = {"seconds": seconds, "engines": {SCRIPT: engine}, "time": "2026-01-01T00:00:00.000+00:00"}
        stage.readings.append({**reading, **told})


@pytest.mark.capability("The live page: workers, examples and rollouts of a run, their texts as text")
def test_workers_data_and_rollouts_are_shown(browser: Any, page: Page) -> None:
    write_records(new_run(page.folder, "records"))
    browser.get(page.amend)
    shown(browser, "records")
    quoted = urllib.request.quote(f"chats:{SCRIPT}")  # type: ignore[attr-defined]
    for view, texts in {
        "workers": [SCRIPT, "128 MiB", "No worker has told what of a GPU it uses", "40"],
        f"data&example={quoted}": [SCRIPT, "its loss by token, of 3 times", "Show its trained tokens".upper()],
        "data&order=forgotten": [f"chats:{SCRIPT}", "Choose an example"],
        f"rollouts&issue=0&prompt={quoted}": [SCRIPT, "seven", "was replied", "all alike", "reward 1"],
    }.items():
        browser.get(f"{page.address}/?run=records&stage=sft&view={view}")
        for text in texts:
            shown(browser, text)
        assert browser.execute_script("return window.taken") is None
        assert browser.find_elements("css selector", "img[src=x]") == []
    assert browser.find_element("xpath", "//span[text()='seven']").get_attribute("title").startswith("ratio 1.2500")
    for view, text in {"data": "No loss of an example", "rollouts": "no rollouts", "workers": "No worker"}.items():
        browser.get(f"{page.address}/?run=small&stage=more&view={view}")
        shown(browser, text)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.capability("The live page: without a token, or with another host or origin, it is refused")
def test_who_has_no_token_or_comes_from_elsewhere_is_refused(browser: Any, page: Page) -> None:
    browser.delete_all_cookies()
    browser.get(page.address)
    shown(browser, "A token is needed")
    browser.get(f"{page.address}/?token=wrong{page.amend[-20:]}")
    shown(browser, "is not, or is no longer, this server's")
    browser.get(page.read)
    shown(browser, "only looking")
    cookie = "; ".join(f"{one['name']}={one['value']}" for one in browser.get_cookies())
    assert all(one["httpOnly"] and one["sameSite"] == "Lax" for one in browser.get_cookies())
    assert browser.execute_script("return document.cookie") == ""
    for headers, status in (({}, 200), ({"Origin": "http://evil.example"}, 403), ({"Host": "evil.example"}, 403)):
        assert answer(page.address, {"Cookie": cookie, **headers}) == status
    port = int(page.address.rpartition(":")[2])
    for origin, expected in ((page.address, "101"), ("http://evil.example", "403"), (None, "403")):
        assert handshake(port, cookie, origin) == expected
    assert handshake(port, "", page.address) == "403"
    assert answer(f"{page.address}/healthz", {}) == 200


def answer(address: str, headers: dict[str, str]) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def handshake(port: int, cookie: str, origin: str | None) -> str:
    """The status with which a websocket is answered."""
    lines = ["GET /_nicegui_ws/socket.io/?EIO=4&transport=websocket HTTP/1.1", f"Host: 127.0.0.1:{port}"]
    lines += ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    lines += ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", f"Cookie: {cookie}"] + [f"Origin: {origin}"] * bool(origin)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return connection.recv(1000).decode("latin-1").split()[1]


@pytest.mark.capability("A report: one file that opens in a browser without a network")
def test_a_report_opens_from_disk_and_shows_the_same_curves(browser: Any, tmp_path: Path) -> None:
    run = new_run(tmp_path, SCRIPT.replace("/", ""))
    make_steps(run, range(1, 31), **{SCRIPT: 1.0})
    events.record(run.events, "failure", "sft", error=SCRIPT)
    write_report(run.uri, str(tmp_path / "out.html"))
    browser.get_log("browser")  # what earlier tests were refused
    browser.get((tmp_path / "out.html").as_uri())
    until(browser, lambda: len(browser.find_elements("css selector", ".chart canvas")) > 3)
    options = json.loads(browser.execute_script("return document.getElementById('charts').textContent"))
    points = [one["data"] for each in options.values() for one in each["series"] if one.get("name") == "loss"]
    assert points == [[[step, 5 / step] for step in range(1, 31)]]
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in asked if not name.startswith(("data:", "blob:"))] == []
    assert browser.execute_script("return window.taken") is None
    shown(browser, SCRIPT)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def pressed(browser: Any, text: str) -> None:
    """A button with this text is there, and is pressed."""
    path = f"//button[normalize-space(.)='{text}' or .//*[normalize-space(.)='{text}']]"
    until(browser, lambda: [browser.execute_script("arguments[0].click()", browser.find_elements("xpath", path)[-1])])


@pytest.mark.capability("The live page: an amendment is made, told with what it means, and undone")
def test_a_stage_is_amended_in_the_page_and_by_nobody_who_only_looks(browser: Any, page: Page) -> None:
    run = new_run(page.folder, "steered")
    run.stage("sft").enter("running")
    make_steps(run, range(1, 6))
    browser.get(page.amend)
    browser.get(f"{page.address}/?run=steered&view=steer&stage=sft")
    shown(browser, "Nothing was amended.")
    shown(browser, "gradients are clipped to it")
    key, value = browser.find_elements("css selector", "main input, .q-page input, .nicegui-content input")[:2]
    key.send_keys("optimizer.lr")
    shown(browser, "optimizer.lr")
    # The list is still that of all keys for a moment.
    item = "//*[contains(@class, 'q-menu')]//*[contains(@class, 'q-item__label')][normalize-space(.)='optimizer.lr']"
    until(browser, lambda: [browser.find_element("xpath", item).click()])
    until(browser, lambda: value.get_attribute("value") == "0.0001")
    value.send_keys("\b" * 8 + "-1")
    pressed(browser, "Show what it means")
    shown(browser, "must be greater than 0, found -1")
    value.send_keys("\b" * 8 + "0.5")
    pressed(browser, "Show what it means")
    shown(browser, "+ stages.sft.optimizer.lr: 0.5")
    shown(browser, "From the next step on, step 1 at the earliest: the schedule multiplies it.")
    assert not run.stage("sft").requests().amendments
    pressed(browser, "Amend")
    shown(browser, "0: optimizer.lr=0.5")
    (asked,) = run.stage("sft").requests().amendments.values()
    assert asked.assignment == "optimizer.lr=0.5"
    pressed(browser, "Undo")
    shown(browser, "+ stages.sft.optimizer.lr: 0.0001")
    pressed(browser, "Amend")
    shown(browser, "1: optimizer.lr=0.0001")
    shown(browser, "undoes 0")
    pressed(browser, "Checkpoint now")
    shown(browser, "trains no such stage at the moment")
    browser.get(page.read)
    browser.get(f"{page.address}/?run=steered&view=steer&stage=sft")
    shown(browser, "undoes 0")
    shown(browser, "This address only looks")
    texts = [button.text.lower() for button in browser.find_elements("tag name", "button")]
    assert not {"undo", "amend", "checkpoint now", "show what it means"} & set(texts)
