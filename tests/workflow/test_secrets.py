"""A canary in each place of a manifest that may hold a secret: whatever comes of it, nobody reads it."""

from __future__ import annotations

import http.server
import json
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from postlude.manifest.assignments import HANDED_ON
from postlude.workflow import detached
from postlude.workflow.flow import flow

CANARY = "cAnary0f-1234"
CREDENTIALS = f"user:{CANARY}@"

FAILS = {
    "a password of data": {"data.chats.source.path": f"memory://{CREDENTIALS}nowhere/x.jsonl"},
    "a token of data": {"data.chats.source.path": f"memory://nowhere/x.jsonl?token={CANARY}"},
    "a signature of data": {"data.chats.source.path": f"memory://nowhere/x.jsonl?X-Amz-Signature={CANARY}"},
    "an unknown protocol": {"data.chats.source.path": f"nosuch://{CREDENTIALS}nowhere/x.jsonl"},
    "a refused server": {"data.chats.source.path": f"http://{CREDENTIALS}127.0.0.1:9/x.jsonl"},
    "a query": {"data.chats.source": {"query": f"SELECT * FROM read_json('http://{CREDENTIALS}127.0.0.1:9/x.json')"}},
    "a hub": {"data.chats.source": {"hub": f"https://{CREDENTIALS}127.0.0.1:9/x"}},
    "a template": {"data.chats.template": f"memory://{CREDENTIALS}nowhere/x.jinja"},
    "a model": {"sft.model": {"path": f"memory://{CREDENTIALS}nowhere/model"}},
    "a tokenizer": {"sft.tokenizer": {"path": f"memory://{CREDENTIALS}nowhere/model"}},
    "added tokens": {"sft.add_tokens": {"path": f"memory://{CREDENTIALS}nowhere/tokens"}},
    "a folder of runs": {"run_dir": f"nosuch://{CREDENTIALS}nowhere/runs"},
    "a variable of another type": {"compute.environment.HF_TOKEN": [CANARY]},
    "a cluster": {"compute": {"provider": "ray", "address": f"ray://{CREDENTIALS}127.0.0.1:9"}},
    "the wrong key": {"sft.password": CANARY},
    "a judge": {
        "sft.reward": [{"function": {"name": "judge", "address": f"http://{CREDENTIALS}127.0.0.1:9", "model": "m"}}]
    },
    "a judge's key": {
        "sft.reward": [{"function": {"name": "judge", "address": f"http://h/v1?api_key={CANARY}", "model": "m"}}]
    },
    "an engine": {"sft.rollout": {"engine": {"name": "vllm", "addresses": [f"http://{CREDENTIALS}127.0.0.1:9"]}}},
    "an engine's key": {"sft.rollout": {"engine": {"name": "vllm", "options": {"api-key": CANARY}}}},
    "a sink": {"sinks": [{"name": "tensorboard", "auth_token": CANARY}]},
}
"""What cannot work, by its place: overrides."""


def holds(folder: Path) -> list[str]:
    """The files below a folder in which the canary is."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize("place", FAILS)
@pytest.mark.parametrize("command", ["run", "validate"])
def test_an_error_has_no_secret(project, tmp_path, place, command):
    if "reward" in str(FAILS[place]) or "rollout" in str(FAILS[place]):
        project.stage |= {"recipe": "grpo", "model": {"path": "nowhere"}}
        project.stage.pop("tokenizer")
    overrides = [f"{key}={json.dumps(value)}" for key, value in FAILS[place].items()]
    done = project(command, "MANIFEST", *overrides, *(["--json"] if command == "validate" else []))
    assert done.exit_code in ((1, 2, 3, 4) if command == "run" else (0, 1, 2, 3, 4)), done
    assert "Traceback" not in done.err
    assert CANARY not in done.out + done.err
    assert CANARY[:9] not in done.out + done.err
    assert holds(tmp_path / "runs") == []


@pytest.fixture
def bucket() -> Iterator[Any]:
    """Files in memory under a URI with a password."""
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()


@pytest.mark.capability("Credentials in URIs are stripped wherever they are shown or stored")
def test_a_run_over_uris_with_credentials_keeps_none_of_them(project, tmp_path, bucket):
    uri = f"memory://{CREDENTIALS}bucket/chats.jsonl"
    with bucket.open(uri, "wb") as file:
        file.write(project.chats.read_bytes())
    project.data["source"]["path"] = uri
    project.manifest["compute"] = {"environment": {"HF_TOKEN": CANARY, "MODE": "offline"}}
    project.stage["steps"] = 2
    done = project("run", "MANIFEST", "--inline", "seed=4")
    assert done.exit_code == 0, done.err
    assert CANARY not in done.out + done.err
    assert holds(tmp_path / "runs") == []
    for command in (["status", "RUN", "--json"], ["explain", "MANIFEST", "compute.environment.HF_TOKEN"]):
        assert CANARY not in project(*command).out
    again = project("run", "MANIFEST", "--inline", "seed=4")
    assert "keep" in again.err
    project.data["source"]["path"] = uri.replace(CANARY, "another-one")
    with bucket.open(project.data["source"]["path"], "wb") as file:
        file.write(project.chats.read_bytes())
    (plan,) = project("run", "MANIFEST", "seed=4", "--dry-run", "--json").json["stages"]
    assert [reason.split(":")[0] for reason in plan["reasons"]] == ["the files of data.chats changed"]  # not the key


def test_a_run_that_was_begun_with_a_secret_in_its_identity_goes_on(project, bucket):
    """Before secrets were taken out, they stood in what a stage was begun with."""
    project.data["source"]["path"] = uri = f"memory://{CREDENTIALS}bucket/chats.jsonl"
    with bucket.open(uri, "wb") as file:
        file.write(project.chats.read_bytes())
    assert project("run", "MANIFEST").exit_code == 0
    identity = project.sft.identity()
    files = {what: dict.fromkeys([uri], "1") for what, contents in identity.files.items()}
    now = {what: dict.fromkeys(contents, "1") for what, contents in identity.files.items()}
    before = type(identity)(
        **{**vars(identity), "config": {**identity.config, "data.chats.source.path": uri}, "files": files}
    )
    assert before.changes(type(identity)(**{**vars(identity), "files": now})) == []


@pytest.mark.capability("A secret is named, and its value taken from the environment when processes start")
def test_a_variable_that_is_named_and_not_set_is_told_before_anything_starts(project):
    project.manifest["compute"] = {"environment": {"NOT_SET_ANYWHERE": {"from": "environment"}}}
    for command in (["run", "MANIFEST", "--inline"], ["validate", "MANIFEST"]):
        done = project(*command)
        assert done.exit_code == 4
        told = " ".join((done.out + done.err).split())
        assert "compute.environment.NOT_SET_ANYWHERE is taken from the environment" in told


def test_a_detached_run_and_a_flow_have_no_secret_on_a_command_line(project, monkeypatch):
    started: list[Any] = []
    monkeypatch.setenv(HANDED_ON, "kept")
    monkeypatch.setattr(
        "postlude.cluster.providers.local.Local.submit",
        lambda self, run, command: started.append((command, __import__("os").environ[HANDED_ON])) or "x",
    )
    project.write()
    secret = [
        f"compute.environment.HF_TOKEN={CANARY}",
        f"data.chats.source.path=https://{CREDENTIALS}h/{project.chats}",
    ]
    with pytest.raises(Exception, match="seed"):
        flow(str(project.path), ["seed=x"])
    with pytest.raises(Exception, match="holds a secret"):
        flow(str(project.path), secret[:1])
    detached.detach(str(project.path), ["seed=9", secret[0]], ["--stage", "sft"])
    (command, handed_on) = started[0]
    assert command[-4:] == [str(project.path), "seed=9", "--stage", "sft"]
    assert json.loads(handed_on) == secret[:1]
    project.manifest["compute"] = {"provider": "ray"}
    project.write()
    with pytest.raises(Exception, match="would hold a secret") as raised:
        detached.detach(str(project.path), secret[:1], [])
    assert CANARY not in str(raised.value)


def test_what_a_detached_run_says_is_for_its_owner(project, monkeypatch):
    started = SimpleNamespace(pid=1, poll=lambda: 0)
    monkeypatch.setattr("postlude.cluster.providers.local.subprocess.Popen", lambda *_, **__: started)
    project.write()
    detached.detach(str(project.path), [], [])
    assert stat.S_IMODE(Path(project.run.output).stat().st_mode) == 0o600


# --- redirects ------------------------------------------------------------------------------------------------


@pytest.fixture
def servers() -> Iterator[tuple[str, list[Any]]]:
    """The address of a server that sends its callers to another one, and what that one has seen."""
    seen: list[Any] = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "m"}]}')

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    class Sends(Other):
        def do_GET(self) -> None:
            self.send_response(int(self.path.split("/")[1]))
            self.send_header("Location", f"http://localhost:{other.server_port}{self.path}")
            self.end_headers()

        do_POST = do_GET

    other, sends = (http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Other, Sends))
    for server in (other, sends):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{sends.server_port}", seen
    for server in (other, sends):
        server.shutdown()


@pytest.mark.capability("A judge's key goes to the judge's own address alone")
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_key_is_not_sent_where_a_judge_sends_its_callers(servers, monkeypatch, code):
    from postlude.rollout.rewards.language_judge import LanguageJudge

    address, seen = servers
    monkeypatch.setenv("SOME_VARIABLE", CANARY)
    judge = LanguageJudge(address=f"{address}/{code}", model="m", key_variable="SOME_VARIABLE")
    with pytest.raises(Exception, match="sends the caller to http://localhost"):
        judge.check()
    with pytest.raises(ValueError, match="sends the caller to http://localhost"):
        judge.score("x", "y", {})
    assert seen == []
