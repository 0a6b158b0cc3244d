"""Rules by prefix: which one a place falls under, and what their manifest refuses."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postlude import storage
from postlude.cluster.worker import WorkerSetup
from postlude.data.room import Room
from postlude.manifest.component import Component
from postlude.manifest.explain import explain
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError
from postlude.manifest.storage import Encryption, PlaceRule
from postlude.rollout.reward_pool import RewardPool, Task
from postlude.storage import files, rules
from postlude.storage.rules import NO_RULE, Rule, rule_of, rules_in, use

ROLE = "arn:aws:iam::123456789012:role/reader"


@pytest.fixture(autouse=True)
def _no_rules_afterwards() -> Iterator[None]:
    yield
    use(())


def prefix_of(uri: str) -> str:
    return rule_of(uri).prefix


def test_the_longest_prefix_that_fits_is_the_rule_of_a_place() -> None:
    use(rules_in({"s3://": PlaceRule(), "s3://data/": PlaceRule(), "s3://data/private": PlaceRule(read_only=True)}))
    assert prefix_of("s3://other/x") == "s3:"
    assert prefix_of("s3://data") == prefix_of("s3://data/privately/x") == prefix_of("s3a://data/x") == "s3://data"
    assert rule_of("s3://data/private/x").read_only
    assert rule_of("gs://data/private/x") is rule_of("data/private") is NO_RULE


def test_local_prefixes_hold_by_every_name_of_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    use(rules_in({"runs/": PlaceRule(encrypt=Encryption(key="file:key"))}))
    for name in ("runs/a/b", "./runs", f"file://{tmp_path}/runs/a", str(tmp_path / "x" / ".." / "runs"), "link/new"):
        assert rule_of(name).encrypt == Encryption(key="file:key"), name
    assert rule_of("runs2/a") is rule_of("x/runs") is NO_RULE
    use(rules_in({"link": PlaceRule(read_only=True)}))
    assert rule_of("runs/a").read_only
    os.chdir("/")
    assert rule_of(str(tmp_path / "runs")).read_only, "a rule holds wherever a process goes"


def test_rules_travel_between_processes() -> None:
    use(rules_in({"s3://data/": PlaceRule(role=ROLE, region="eu-west-1"), "runs": PlaceRule(read_only=True)}))
    there = pickle.loads(pickle.dumps(rules.current()))
    assert there == rules.current()
    use(there)
    assert rule_of("s3://data/x") == Rule(prefix="s3://data", role=ROLE, region="eu-west-1")


MANIFEST = """\
name: a
stages: {s: {recipe: sft, model: {path: m}, data: {d: 1.0}, steps: 1}}
data: {d: {source: {path: d.jsonl}, format: text}}
storage:
"""


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ('"s3://a/": {rol: x}', "m.yaml:5:15: storage.s3://a/.rol: unknown key. Did you mean 'role'?"),
        ('"s3://a/": {role: reader}', "'reader' is no role; its ARN reads arn:aws:iam::ACCOUNT:role/NAME"),
        (
            f'data/: {{role: "{ROLE}"}}',
            "m.yaml:5:11: storage.data/.role: only places of S3 have this key, and 'data/' is a",
        ),
        (f'"gs://a/": {{role: "{ROLE}"}}', "storage.gs://a/.role: only places of S3 have this key, and 'gs://a/' is"),
        (f'"s3://": {{role: "{ROLE}"}}', "storage.s3://.role: a role is for a bucket or a part of one"),
        ('"s3://a/": {}\n  s3a://a: {}', "m.yaml:6:3: storage.s3a://a: the same place as 's3://a/': give it once"),
        (
            "runs: {read_only: true}",
            "m.yaml:5:10: storage.runs.read_only: the run is written below it: run_dir is 'runs'",
        ),
        (". : {read_only: true}", "storage...read_only: the run is written below it: run_dir is 'runs'"),
        ('"s3:/a/": {}', "storage.s3:/a/: it is no prefix: give a folder, s3://BUCKET/ or s3://BUCKET/FOLDER/"),
        ('"s3://a/": {endpoint: localhost:9000}', "it must begin with https:// or http://, and name a host"),
        ('"s3://a/": {endpoint: "http://me:hunter22@host"}', "an address holds no user, password or key. Name a prof"),
        ('"s3://me:hunter22@a/": {}', "m.yaml:4:1: storage: a prefix holds no user, password or key. Name a profile"),
        ('"s3://a/": {role_seconds: 900}', "it is how long a session of a role lasts, and no role is named"),
        ('"s3://a/": {encrypt: {}}', "storage.s3://a/.encrypt.key: this key is missing"),
        ('"s3://a/": {checksums: never}', "must be 'when_required'"),
        ("[]", "storage: must be a mapping, found a list"),
    ],
)
def test_wrong_rules_are_refused_with_their_place(storage: str, said: str) -> None:
    with pytest.raises(ManifestError) as refused:
        load(MANIFEST + "  " + storage, "m.yaml")
    text = " ".join(str(refused.value).split())
    assert said in text
    assert "hunter22" not in text


def test_a_manifest_with_rules_is_loaded_with_them() -> None:
    manifest = load(MANIFEST + f'  "s3://a/": {{role: "{ROLE}", read_only: true}}\n  runs: {{}}', "m.yaml").manifest
    assert rules_in(manifest.storage)[0] == Rule(prefix="s3://a", role=ROLE, read_only=True)


# --- what a rule forbids ------------------------------------------------------------------------------------


def _fill(uri: str) -> None:
    with storage.new_folder(uri) as folder:
        storage.write_text(f"{folder}/new", "new")


def _open(uri: str) -> None:
    with storage.open_file(uri, "wb") as file:
        file.write(b"new")


WRITES: dict[str, Callable[[str], object]] = {
    "write_bytes": lambda uri: storage.write_bytes(uri, b"new"),
    "open_file": _open,
    "create": lambda uri: storage.create(uri, b"new"),
    "remove": storage.remove,
    "new_folder": _fill,
    "begin": storage.begin,
    "commit": lambda uri: storage.commit(uri, {}),
    "discard": storage.discard,
    "journal": lambda uri: storage.Journal(uri).append({"new": 1}),
    "cut": lambda uri: storage.Journal(uri).cut(lambda entry: False),
    "lock": lambda uri: storage.lock(f"{uri}/run.lock", "run"),
    "copy_file": lambda uri: storage.copy_file(__file__, uri),
    "write_document": lambda uri: storage.write_document(uri, {"new": 1}),
    "set_aside": lambda uri: storage.set_aside(uri) if storage.exists(uri) else storage.remove(uri),
    "make_folders": lambda uri: storage.make_folders(uri) if storage.is_local(uri) else storage.begin(uri),
}


@pytest.mark.parametrize("near_place", ["local", "memory"], indirect=True)
@pytest.mark.capability("Nothing is written to places that the manifest has as read-only")
@pytest.mark.parametrize("below", ["file", "folder/deep/new"])
@pytest.mark.parametrize("write", WRITES)
def test_nothing_is_written_to_what_is_read_only(near_place: str, write: str, below: str) -> None:
    uri = storage.join(near_place, "file")
    storage.write_bytes(uri, b'{"old": 1}\n')
    use(rules_in({near_place: PlaceRule(read_only=True)}))
    with pytest.raises(storage.NotWritable, match="read-only"):
        WRITES[write](storage.join(near_place, below))
    assert files.files_below(near_place) == ["file"]
    assert storage.read_bytes(uri) == b'{"old": 1}\n'
    use(())
    WRITES["write_bytes"](uri)


# --- where rules go -----------------------------------------------------------------------------------------


def _prefix_there(*uri: str) -> str:
    return rule_of(uri[-1]).prefix


def test_processes_that_work_for_this_one_have_its_rules() -> None:
    use(rules_in({"s3://data/": PlaceRule(role=ROLE)}))
    pool = RewardPool(1, 60.0)
    try:
        assert pool.run(_prefix_there, Component(), "r", [Task("id", ("s3://data/x",))], "it") == ["s3://data"]
    finally:
        pool.close()
    assert Room(_prefix_there, "it")("s3://data/x") == "s3://data"
    assert Room(_entered, "it")(pickle.dumps(WorkerSetup("s", 1, {}))) == "s3://data"


def _entered(setup: bytes) -> str:
    use(())
    pickle.loads(setup).enter()
    return _prefix_there("s3://data/x")


def test_a_command_that_is_given_a_run_alone_takes_rules_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.cli.app import app

    rules_file = tmp_path / "storage.yaml"
    rules_file.write_text('storage: {"s3://a/": {region: eu-west-1}}')
    lock = tmp_path / "lock.yaml"
    lock.write_text('hash: x\nmanifest: {name: a, storage: {"s3://b/": {region: eu-west-2}}}')
    for file, uri in ((rules_file, "s3://a/x"), (lock, "s3://b/x")):
        app(["runs", str(tmp_path), "--storage", str(file)], standalone_mode=False)
        assert rule_of(uri).region is not None
    rules_file.write_text('storage:\n  "s3://a/": {regio: eu-west-1}\n  s3://a: {}')
    with pytest.raises(ManifestError) as refused:
        app(["runs", str(tmp_path), "--storage", str(rules_file)], standalone_mode=False)
    assert "storage.yaml:2:15: storage.s3://a/.regio: unknown key. Did you mean 'region'?" in str(refused.value)
    assert "storage.yaml:3:3: storage.s3://a: the same place as 's3://a/'" in str(refused.value)
    rules_file.write_text("name: x")
    with pytest.raises(ManifestError, match="no key 'storage'"):
        app(["runs", str(tmp_path), "--storage", str(rules_file)], standalone_mode=False)


def test_explain_says_which_rule_a_place_falls_under() -> None:
    text = (
        MANIFEST.replace("d.jsonl", "[s3://a/d.jsonl, e.jsonl]") + f'  "s3://a/": {{role: "{ROLE}", read_only: true}}'
    )
    resolved = load(text, "m.yaml")
    under = f"under 's3://a/': role {ROLE}, read-only"
    assert ("data.d.source.path.0: s3://a/d.jsonl", under) in explain(resolved, "storage").rows
    assert ("data.d.source.path.1: e.jsonl", "under no rule") in explain(resolved, "data.d").rows
    assert ("storage", "under no rule") in explain(resolved, "run_dir").rows
    assert not any("under" in said for _, said in explain(resolved, "seed").rows)
