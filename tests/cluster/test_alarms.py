"""Alarms of a real run, in which a spike, a leak and a collapse were planted, through kills and in a replay."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

PLUGIN = """
import os, threading, time
from pathlib import Path
from postlude.data.formats.messages import Messages
from postlude.manifest.component import register

first_life, held, parsed = Path(__file__).with_name("first_life"), [], []

def leak():
    while first_life.exists() and len(held) < 20:
        held.append(bytes([1]) * 30 * 2**20)
        time.sleep(0.5)

if os.environ.get("RANK") == "1":
    threading.Thread(target=leak, daemon=True).start()

@register("formats", "strange")
class Strange(Messages):
    def parse(self, record):
        parsed.append(record)
        while len(parsed) > LIMIT and first_life.exists():  # the test takes its time
            time.sleep(0.01)
        return super().parse(record)
"""
PLANTED, LIMIT = 100, 300
"""The conversation of the spike, and how many the first life reads."""
RL = {
    "recipe": "grpo",
    "model": {"from": "sft"},
    "data": {"asked": 1.0},
    "steps": 20,
    "threads": 1,
    "batch": {"tokens": 4096, "block": 128},
    "optimizer": {"name": "adamw", "lr": 0.03},
    "schedule": "constant",
    "checkpoint": {"every": 10},
    "rollout": {"prompts": 4, "max_tokens": 6},
    "group": 4,
    "reward": [{"function": {"name": "regex", "pattern": "[0-9]"}}],
}
"""What is rewarded is learned in a few steps: then every answer of every group has it."""
ALIKE = 7
"""So many steps in a row are one too many."""
LEAK, GONE = "growth of host memory, rank 1", "its workers, or its rule, are gone"


def plant(project: Any, folder: Path) -> None:
    (folder / "test_plugin_planted.py").write_text(PLUGIN.replace("LIMIT", str(LIMIT)))
    (folder / "first_life").touch()
    said = [(f"Say {n}.", f"{n}, {n} and {n}.") for n in range(600)]
    said[PLANTED] = "Say it.", "".join(chr(0x4E00 + n * 7919 % 0x4000) for n in range(30))
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in said]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": both}) + "\n" for both in chats))
    data = project.manifest["data"]
    data["asked"] = {**data["chats"], "limit": 20}
    data["chats"]["format"] = "strange"
    project.manifest["plugins"] = ["test_plugin_planted"]
    project.manifest["alarms"] = [
        {"name": "loss spike", "over": 15},
        {"name": LEAK.partition(",")[0], "over": 4, "least": 100.0 * 2**20},
        {"name": "memory spike", "off": True},
        {"name": "groups all alike", "for": ALIKE},
    ]
    project.manifest["compute"]["supervision"] = {"readings_seconds": 0.5}
    project.stage |= {"steps": 45, "batch": {"tokens": 512, "block": 128, "window": 4}, "checkpoint": {"every": 20}}
    project.manifest["stages"]["rl"] = RL


def alarms(project: Any) -> list[tuple[str, str, int]]:
    """Those that a replay has as well."""
    return [(one["stage"], one["what"], one["step"]) for one in project.told("alarm") if "timed" not in one]


def computed(project: Any) -> list[tuple[str, str, int]]:
    """The same, from what was planted and what the run says of its steps."""
    sft, rl = (project.run.stage(name) for name in ("sft", "rl"))
    planted = max(sft.read_examples().to_pylist(), key=lambda row: row["tokens"])
    alike = [line["groups_alike"] > 0.9 for line in rl.metrics.read()]
    collapsed = next(n for n in range(ALIKE, 21) if all(alike[n - ALIKE : n]))
    return [("sft", "loss spike", planted["step"]), ("rl", "groups all alike", collapsed)]


@pytest.mark.capability("A spike, a leak and a collapse in a real run: told once through kills, and again in a replay")
def test_a_spike_a_leak_and_a_collapse_are_told_once_where_they_are(project, tmp_path: Path) -> None:
    plant(project, tmp_path)
    project.start()
    project.until(lambda: len(project.told("alarm")) == 2)
    project.kill()
    (leak,) = [one for one in project.told("alarm") if "timed" in one]
    assert (leak["what"], leak["stage"]) == (LEAK, "sft")
    held = [one for one in project.run.stage("sft").readings.read() if one["rank"] == 1]
    grown = [two["resident_bytes"] - one["resident_bytes"] > 0 for one, two in pairwise(held)]
    first = next(n for n in range(3, len(held)) if all(grown[n - 3 : n]) and grew(held[n - 3], held[n]))
    assert leak["step"] == held[first]["step"]

    (tmp_path / "first_life").unlink()
    project.start(assignments=["--inline"])
    project.until(lambda: any(what == "groups all alike" for _, what, _ in alarms(project)))
    project.kill()
    project.start(assignments=["--inline"])
    project.ended()
    begun = [one["from_step"] for one in project.told("stage_started")]
    told, expected = alarms(project), computed(project)
    assert told == expected
    assert begun[1] < expected[0][2], "the spike came again, and was not told again"
    assert begun[3] < expected[1][2], "nor was the collapse"
    assert [one["what"] for one in project.told("alarm") if "timed" in one] == [LEAK]
    assert [one["reason"] for one in project.told("alarm_over") if one["what"] == LEAK] == [GONE]

    calm = project.called("calm")
    calm.start(assignments=["--inline"])
    calm.ended()
    assert alarms(calm) == told == computed(calm)


def grew(first: dict[str, Any], last: dict[str, Any]) -> bool:
    before, after = first["resident_bytes"], last["resident_bytes"]
    return after > 1.2 * before and after - before > 100 * 2**20
