"""The graph as a Metaflow flow: it runs, to the same artifacts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from postlude.runs import artifact_digest
from postlude.workflow.flow import Branches, take_apart


def test_a_graph_is_taken_apart_into_chains_and_branches() -> None:
    assert take_apart({"a": [], "b": ["a"], "c": ["b"]}) == ["a", "b", "c"]
    assert take_apart({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": ["d"]}) == [
        "a",
        Branches([["b"], ["c"]]),
        "d",
        "e",
    ]
    assert take_apart({"a": [], "x": [], "b": ["a"], "y": ["x"]}) == [Branches([["a", "b"], ["x", "y"]])]
    assert take_apart({"a": [], "b": [], "c": ["a", "b"], "x": []}) == [
        Branches([[Branches([["a"], ["b"]]), "c"], ["x"]])
    ]


@pytest.mark.long
@pytest.mark.capability("The graph of stages as a Metaflow flow")
def test_a_flow_runs_to_the_same_artifacts(project, tmp_path: Path) -> None:
    pytest.importorskip("metaflow")
    project.stage |= {"steps": 1}
    later = {key: value for key, value in project.stage.items() if key not in ("model", "tokenizer")}
    project.manifest["stages"] = {
        "first": project.stage,
        "left-hand": {**later, "model": {"from": "first"}},
        "right": {**later, "model": {"from": "first"}},
        "last": {**later, "model": {"from": "right"}},
    }
    assert project("run", "MANIFEST").exit_code == 0
    names = list(project.manifest["stages"])
    expected = {name: artifact_digest(project.run.stage(name).artifact) for name in names}
    place = tmp_path / "flow.py"
    project.manifest["run_dir"] = str(tmp_path / "flown")  # of its own, so that nothing is taken over
    assert project("flow", "MANIFEST", "-o", str(place)).exit_code == 0
    environment = {
        **os.environ,
        "USER": os.environ.get("USER") or "tester",
        "METAFLOW_USER": "tester",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path / "metaflow"),
        "METAFLOW_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, str(place), "run", "--max-workers", "2"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: artifact_digest(project.run.stage(name).artifact) for name in names} == expected
    assert not project.told("stage_taken_over")
