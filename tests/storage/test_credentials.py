"""Credentials by rule: roles that are assumed for a prefix, renewed in every process, and kept from everybody."""

from __future__ import annotations

import json
import os
import pickle
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from postlude import storage
from postlude.data.room import Room
from postlude.data.sources.query import Query
from postlude.manifest.storage import Encryption, PlaceRule
from postlude.secrecy import without_secrets
from postlude.storage import credentials
from postlude.storage.policies import session_policy
from postlude.storage.rules import Rule, rules_in, use
from roles import Account, policy

READ = policy("s3:GetObject", "s3:ListBucket")
ALL = policy("s3:*", "kms:*")
PART_BYTES = 5 * 2**20


@pytest.fixture
def assumed(monkeypatch: pytest.MonkeyPatch) -> list[Rule]:
    """The rules whose roles were assumed in this process, one after another."""
    rules: list[Rule] = []
    first = credentials.assume
    monkeypatch.setattr(credentials, "assume", lambda rule: rules.append(rule) or first(rule))
    return rules


@pytest.mark.capability("A role is assumed for each prefix of a store, by each process for itself")
def test_each_prefix_is_spoken_to_with_its_own_role(account: Account, bucket: str, assumed: list[Rule]) -> None:
    account.store.client().put_object(Bucket=bucket, Key="data/a", Body=b"text")
    places = {
        f"s3://{bucket}/data/": PlaceRule(role=account.role("reader", READ), read_only=True),
        f"s3://{bucket}/runs/": PlaceRule(role=account.role("trainer", ALL)),
        f"s3://{bucket}/weak/": PlaceRule(role=account.role("weak", READ)),
    }
    use(rules_in(places, "my run"))
    with account.enforced():
        assert storage.read_bytes(f"s3://{bucket}/data/a") == b"text"
        assert storage.list_directory(f"s3://{bucket}/data") == ["a"]
        storage.write_bytes(f"s3://{bucket}/runs/b", b"mine")
        assert storage.read_bytes(f"s3://{bucket}/runs/b") == b"mine"
        with pytest.raises(storage.StorageError):
            storage.write_bytes(f"s3://{bucket}/weak/c", b"mine")
        with pytest.raises(storage.StorageError):
            storage.read_bytes(f"s3://{bucket}/elsewhere")
    assert [rule.prefix for rule in assumed] == [f"s3://{bucket}/{name}" for name in ("data", "runs", "weak")]


@pytest.mark.parametrize("read_only", [False, True])
def test_a_session_is_narrowed_to_its_prefix(read_only: bool) -> None:
    key = Encryption(key="alias/a")
    of_bucket, of_objects, of_key = session_policy(
        Rule(prefix="s3://b/data", read_only=read_only, encrypt=key, role="arn:aws-cn:iam::1:role/r")
    )["Statement"]
    assert of_objects["Resource"] == ["arn:aws-cn:s3:::b/data", "arn:aws-cn:s3:::b/data/*"]
    assert of_bucket["Resource"] == ["arn:aws-cn:s3:::b"]
    assert of_bucket["Condition"] == {"StringLike": {"s3:prefix": ["data", "data/*"]}}
    assert of_key["Condition"] == {"ForAnyValue:StringEquals": {"kms:ResourceAliases": "alias/a"}}
    actions = {action for each in (of_bucket, of_objects, of_key) for action in each["Action"]}
    reads = {"s3:ListBucket", "s3:GetObject", "kms:Decrypt"}
    assert actions == reads if read_only else actions > {*reads, "s3:PutObject", "s3:DeleteObject"}
    long = session_policy(Rule(prefix="s3://" + "b" * 63 + "/" + "f" * 250, encrypt=key))
    assert len(json.dumps(long, separators=(",", ":"))) <= 2048, "what AWS takes"


def test_a_session_is_renewed_before_it_ends_and_in_the_middle_of_an_upload(
    account: Account, bucket: str, assumed: list[Rule], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(rules_in({f"s3://{bucket}/": PlaceRule(role=account.role("trainer", ALL))}))
    with account.enforced():
        for number in range(3):
            storage.write_bytes(f"s3://{bucket}/{number}", b"x")
        assert len(assumed) == 1
        monkeypatch.setattr(credentials, "RENEWED_BEFORE", 2.0)
        monkeypatch.setattr("s3fs.S3FileSystem.default_block_size", PART_BYTES)
        storage.files._filesystem.cache_clear()
        with storage.open_file(f"s3://{bucket}/large", "wb") as file:
            for _ in range(2):
                file.write(bytes(PART_BYTES))
        assert len(assumed) >= 4, "with the beginning, each part and the end of the upload"
    assert storage.size_bytes(f"s3://{bucket}/large") == 2 * PART_BYTES


@pytest.mark.parametrize("seconds", [800, 500])
def test_a_renewal_that_fails_is_an_error_when_the_time_is_up(
    account: Account,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds: int,
) -> None:
    """A session of an hour, of which so many seconds are left: within a quarter of it, and within a sixth."""
    first, given = credentials.assume, []

    def assume(rule: Rule) -> dict[str, Any]:
        if given:
            raise storage.StorageError("The role cannot be assumed any more.")
        given.append(first(rule))
        return given[0] | {"expiry_time": (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()}

    monkeypatch.setattr(credentials, "assume", assume)
    account.store.client().put_object(Bucket=bucket, Key="a", Body=b"text")
    use(rules_in({f"s3://{bucket}/": PlaceRule(role=account.role("reader", READ))}))
    with account.enforced():
        assert storage.read_bytes(f"s3://{bucket}/a") == b"text"
        if seconds == 800:
            assert storage.read_bytes(f"s3://{bucket}/a") == b"text"
        else:
            with pytest.raises(storage.StorageError, match="cannot be assumed any more"):
                storage.read_bytes(f"s3://{bucket}/a")
    assert caplog.records == []


def test_a_query_reads_with_the_role_of_its_files(
    account: Account, bucket: str, assumed: list[Rule], tmp_path: Path
) -> None:
    account.store.client().put_object(Bucket=bucket, Key="logs/a.csv", Body=b"n\n1\n2\n")
    use(rules_in({f"s3://{bucket}/logs": PlaceRule(role=account.role("reader", READ), read_only=True)}))
    source = Query(query="SELECT sum(n) AS s FROM t", tables={"t": f"s3://{bucket}/logs/*.csv"})
    with account.enforced():
        assert [dict(record) for record in source.open(str(tmp_path)).read(0)] == [{"s": 3}]
    assert len(assumed) == 1


def test_a_store_that_is_not_of_aws_is_found_by_its_rule(
    account: Account, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number, role in enumerate((None, account.role("trainer", ALL))):
        (tmp_path / f"config-{number}").write_text("[profile lab]\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / f"config-{number}"))
        place = PlaceRule(endpoint=account.store.endpoint, region="us-east-1", role=role, checksums="when_required")
        use(rules_in({f"s3://{bucket}/": place}))
        storage.write_bytes(f"s3://{bucket}/a", b"text")
        assert storage.read_bytes(f"s3://{bucket}/a") == b"text"
    given = credentials.options("s3", credentials.connection_of(Rule(prefix="s3://b", checksums="when_required")))
    assert given["config_kwargs"] == {"request_checksum_calculation": "when_required"}
    assert (
        credentials.options("s3", credentials.connection_of(Rule(prefix="s3://b", profile="lab")))["profile"] == "lab"
    )


def _read(uri: str) -> tuple[bytes, int]:
    count = []
    first = credentials.assume
    credentials.assume = lambda rule: count.append(rule) or first(rule)
    return storage.read_bytes(uri), len(count)


def test_a_fork_has_a_session_of_its_own(account: Account, bucket: str) -> None:
    use(rules_in({f"s3://{bucket}/": PlaceRule(role=account.role("trainer", ALL))}))
    with account.enforced():
        storage.write_bytes(f"s3://{bucket}/a", b"text")
        assert Room(_read, "it")(f"s3://{bucket}/a") == (b"text", 1)
        assert storage.read_bytes(f"s3://{bucket}/a") == b"text"


@pytest.mark.parametrize("wrong", ["role", "profile"])
def test_a_role_that_cannot_be_assumed_is_told(account: Account, bucket: str, wrong: str) -> None:
    rule = {"role": PlaceRule(role=f"arn:aws:iam::{123456789012}:role/foreign"), "profile": PlaceRule(profile="nobody")}
    use(rules_in({f"s3://{bucket}/": rule[wrong]}))
    with account.enforced(), pytest.raises(storage.StorageError) as told:
        storage.read_bytes(f"s3://{bucket}/a")
    assert {"role": "cannot be assumed for", "profile": "nobody"}[wrong] in str(told.value)


def test_credentials_are_in_no_text_and_no_pickle(account: Account, bucket: str) -> None:
    use(rules_in({f"s3://{bucket}/": PlaceRule(role=account.role("weak", READ))}))
    connection = credentials.connection_of(storage.rules.rule_of(f"s3://{bucket}/a"))
    with account.enforced():
        with pytest.raises(storage.StorageError) as told:
            storage.write_bytes(f"s3://{bucket}/a", b"x")
        given: Any = credentials._session(connection.rule, os.getpid()).get_credentials().get_frozen_credentials()
    held = [given.secret_key, given.token, account.key["SecretAccessKey"]]
    said = "".join(traceback.format_exception(told.value)) + repr(connection) + repr(pickle.dumps(connection))
    assert not any(secret in said for secret in held)
    assert without_secrets(f"{given.secret_key} {given.token}") == "<SecretAccessKey> <SessionToken>"
    with pytest.raises(Exception, match="pickle"):
        pickle.dumps(storage.files._filesystem("s3", connection, os.getpid()))
