"""Workers are read while they work, and what is wrong with one of them is told."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.long

PLUGIN = """
import os, time
from postlude.data.formats.messages import Messages
from postlude.manifest.component import register

began, held = time.monotonic(), []

@register("formats", "strange")
class Strange(Messages):
    def parse(self, record):
        if os.environ.get("RANK") == "1" and time.monotonic() - began > 8:
            {does}
        return super().parse(record)
"""


@pytest.mark.capability("Readings of each worker, and alarms for a memory spike and a straggler")
@pytest.mark.parametrize(
    ("does", "what"),
    [
        ("pass", None),
        ("held.append(bytes([1]) * 700 * 2**20) if not held else None", "memory spike, rank 1"),
        ("time.sleep(0.02)", "straggler, rank 1"),
    ],
    ids=["healthy", "spike", "straggler"],
)
def test_workers_are_read_and_what_is_wrong_with_one_is_told(project, tmp_path, does, what):
    (tmp_path / "test_plugin_strange.py").write_text(PLUGIN.replace("{does}", does))
    project.manifest["plugins"] = ["test_plugin_strange"]
    project.manifest["data"]["chats"]["format"] = "strange"
    project.manifest["compute"]["supervision"] = {"readings_seconds": 1}
    project.stage |= {"steps": 100000, "checkpoint": {"every": 1000}}
    project.start()

    def readings() -> list[dict]:
        return project.run.stage("sft").readings.read()

    if what is None:
        project.until(lambda: len(readings()) > 16)
        assert project.told("alarm") == []
    else:
        (alarm,) = project.until(lambda: project.told("alarm"))
        assert alarm["what"] == what
    project.kill()
    read = readings()
    assert {one["rank"] for one in read} == {0, 1}
    for one in read[4:]:
        assert one["resident_bytes"] > 2**20
        assert one["round_trip_seconds"] > 0
        assert one["link"]["collective_bytes_per_second"] > 0
        assert one["link"]["rank_round_trip_seconds"] > 0
        assert {"seconds", "seconds_forward", "seconds_data_wait"} <= set(one["seconds"])
