"""What is seen of workers becomes alarms by the rules, which are over with the group."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from postlude.cluster.watch import Observer
from postlude.manifest.alarms import MIB, rules_for
from postlude.storage import Journal
from postlude.telemetry.readings import Reading


def test_an_alarm_of_a_worker_is_over_with_its_group(tmp_path: Path) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    journal = Journal(str(tmp_path / "readings.jsonl"))
    observer = Observer(
        journal, lambda kind, **fields: told.append((kind, fields)), 0.0, lambda step: rules_for(None, "sft")
    )
    address: Any = SimpleNamespace(host="here")

    def see(step: int, *sizes_mib: int) -> None:
        for rank, size in enumerate(sizes_mib):
            look: Any = SimpleNamespace(reading=Reading(step, size * MIB))
            observer.saw(rank, address, look, 0.01)

    observer.begin(2)
    for step in range(4):
        see(step, 1000, 1000)
    see(4, 1000, 3000)
    see(5, 1000, 3000)
    assert [(kind, fields["what"], fields["step"]) for kind, fields in told] == [("alarm", "memory spike, rank 1", 4)]
    assert told[0][1]["timed"]
    observer.begin(2)
    assert [(kind, fields["what"]) for kind, fields in told[1:]] == [("alarm_over", "memory spike, rank 1")]
    see(6, 1000, 3000)
    assert len(told) == 2, "what others did before says nothing of this group"
    assert len(journal.read()) == 14
