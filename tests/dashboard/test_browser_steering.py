"""A run is steered in a real browser: amended, stopped, its alarms acknowledged; and told why where it may not be."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dashboard.test_browser import Page, browser, loss, page, pressed, shown, until
from postlude.runs import Stage
from postlude.workflow.amend import amend
from workflow.conftest import Project

__all__ = ["browser", "page"]
pytestmark = pytest.mark.long

TIMED = ("seconds", "busy", "tokens_per_second", "memory_bytes", "mfu")
RL = {
    "recipe": "grpo",
    "model": {"from": "sft"},
    "data": {"chats": 1.0},
    "steps": 16,
    "threads": 1,
    "batch": {"tokens": 4096, "block": 128},
    "optimizer": {"lr": 1e-3},
    "checkpoint": {"every": 4},
    "rollout": {"prompts": 4, "max_tokens": 6},
    "group": 4,
    "reward": [{"function": {"name": "regex", "pattern": "[0-9]"}}],
}


def two_stages(folder: Path, name: str, run_dir: Path) -> Project:
    """A run that learns from conversations, and then from its own answers."""
    folder.mkdir(exist_ok=True)
    project = Project(folder)
    project.manifest |= {"name": name, "run_dir": str(run_dir)}
    project.stage |= {"steps": 20, "checkpoint": {"every": 10}}
    project.manifest["stages"]["rl"] = RL
    project.write()
    return project


def start(project: Project) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from postlude.cli import main; main()", "run", str(project.path), "--inline"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def points(stage: Stage) -> list[list[float]]:
    """The curve of the loss, each step once."""
    told = [[line["step"], line["loss"]] for line in stage.metrics.read()]
    assert [step for step, _ in told] == list(range(1, len(told) + 1))
    return told


def made(stage: Stage) -> tuple[list[dict[str, Any]], str]:
    """The metrics without what the machine's mood decides, and what stands for the weights."""
    lines = [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in stage.metrics.read()]
    return lines, hashlib.sha256((Path(stage.artifact) / "model.safetensors").read_bytes()).hexdigest()


def choose(browser: Any, key: str, before: str, value: str) -> None:
    """Take a key out of the list of those that may change, and give it a value."""
    fields = browser.find_elements("css selector", "main input, .q-page input, .nicegui-content input")[:2]
    fields[0].send_keys(key)
    item = f"//*[contains(@class, 'q-menu')]//*[contains(@class, 'q-item__label')][normalize-space(.)='{key}']"
    until(browser, lambda: [browser.find_element("xpath", item).click()])
    until(browser, lambda: fields[1].get_attribute("value") == before)
    fields[1].send_keys("\b" * len(before) + value)


@pytest.mark.capability("The live page: followed, amended, killed and resumed, a run is bitwise that without the kill")
def test_a_run_that_is_amended_and_killed_is_the_calm_one(
    browser: Any, page: Page, tmp_path: Path, after_step: Any
) -> None:
    project = two_stages(tmp_path / "shown", "shown", page.folder)
    sft, rl = (project.run.stage(name) for name in ("sft", "rl"))
    process = start(project)
    try:
        until(browser, lambda: len(sft.metrics.read()) >= 4)
        process.send_signal(signal.SIGSTOP)  # it must not come to its end while the page opens
        browser.get(page.amend)
        browser.get(f"{page.address}/?run=shown&view=stage&stage=sft")
        until(browser, lambda: loss(browser) == points(sft))
        browser.get(f"{page.address}/?run=shown&view=steer&stage=sft")
        shown(browser, "Nothing was amended.")
        shown(browser, "gradients are clipped to it")
        choose(browser, "optimizer.lr", "0.01", "0.002")
        pressed(browser, "Show what it means")
        shown(browser, "+ stages.sft.optimizer.lr: 0.002")
        pressed(browser, "Amend")
        shown(browser, "0: optimizer.lr=0.002")
        process.send_signal(signal.SIGCONT)
        until(browser, lambda: len(rl.metrics.read()) >= 1)
        process.send_signal(signal.SIGSTOP)
        browser.get(f"{page.address}/?run=shown&view=stage&stage=rl")
        until(browser, lambda: loss(browser) == points(rl))
        process.send_signal(signal.SIGCONT)
        until(browser, lambda: len(rl.metrics.read()) >= 6)
        process.send_signal(signal.SIGSTOP)
        until(browser, lambda: loss(browser) == points(rl))
    finally:
        process.kill()
        process.wait()
    assert 6 <= len(rl.metrics.read()) < RL["steps"]
    assert start(project).wait(300) == 0
    until(browser, lambda: loss(browser) == points(rl))
    browser.get(f"{page.address}/?run=shown&view=stage&stage=sft")
    until(browser, lambda: loss(browser) == points(sft))
    assert (len(points(sft)), len(points(rl))) == (20, RL["steps"])

    calm = two_stages(tmp_path / "calm", "calm", tmp_path)
    ((from_step, assignment),) = sft.applied_amendments()

    def ask() -> None:
        if not calm.sft.requests().amendments:  # the other stage comes to such a step, too
            amend(calm.run.uri, "sft", assignment)

    with after_step(from_step - 1, ask):
        assert calm("run", "MANIFEST").exit_code == 0
    assert calm.sft.applied_amendments() == [[from_step, assignment]]
    for name in ("sft", "rl"):
        assert made(project.run.stage(name)) == made(calm.run.stage(name)), name
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
