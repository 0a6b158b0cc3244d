"""Rules by prefix: which one a place falls under, and what their manifest refuses."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError
from postlude.manifest.storage import Encryption, PlaceRule
from postlude.storage import rules
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
