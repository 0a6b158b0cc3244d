"""Roles for tests: users and roles of an object store that enforces what its policies say."""

from __future__ import annotations

import json
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from object_store import ObjectStore
from postlude.storage import credentials, files
from postlude.storage.rules import use

ACCOUNT = "123456789012"


class Account:
    """Roles in an account, and a user who may do nothing but assume them."""

    def __init__(self, store: ObjectStore) -> None:
        self.store, self._mark = store, uuid.uuid4().hex[:12]
        self._iam = store.client("iam")
        self.user = f"user-{self._mark}"
        self._iam.create_user(UserName=self.user)
        self.key = self._iam.create_access_key(UserName=self.user)["AccessKey"]
        self._allow_user("sts:AssumeRole", f"arn:aws:iam::{ACCOUNT}:role/*{self._mark}")

    def _allow_user(self, action: str, resource: str) -> None:
        statement = {"Effect": "Allow", "Action": action, "Resource": resource}
        document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        self._iam.put_user_policy(UserName=self.user, PolicyName=action.replace(":", "-"), PolicyDocument=document)

    def role(self, name: str, policy: Mapping[str, Any] | None = None) -> str:
        """The ARN of a role that may do what a policy says; made, or given another policy."""
        whole = f"{name}-{self._mark}"
        principal = {"AWS": f"arn:aws:iam::{ACCOUNT}:user/{self.user}"}
        trust = {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}
        if whole not in [role["RoleName"] for role in self._iam.list_roles()["Roles"]]:
            document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
            self._iam.create_role(RoleName=whole, AssumeRolePolicyDocument=document)
        if policy is not None:
            self._iam.put_role_policy(RoleName=whole, PolicyName="p", PolicyDocument=json.dumps(policy))
        return f"arn:aws:iam::{ACCOUNT}:role/{whole}"

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Have policies hold in the block."""
        self._count("0")
        try:
            yield
        finally:
            self._count("inf")

    def _count(self, free: str) -> None:
        asked = urllib.request.Request(f"{self.store.endpoint}/moto-api/reset-auth", free.encode())
        asked.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(asked).close()


def for_moto(document: Mapping[str, Any]) -> dict[str, Any]:
    """A policy that is enough for moto, too: for DeleteObjects it asks of the bucket what AWS asks of each object."""
    statements = [
        {**each, "Resource": [*each["Resource"], each["Resource"][0].partition("/")[0]]}
        if each["Sid"] == "Remove"
        else each
        for each in document["Statement"]
    ]
    return {**document, "Statement": statements}


def policy(*actions: str, resources: Sequence[str] = ("*",)) -> dict[str, Any]:
    statement = {"Effect": "Allow", "Action": [*actions], "Resource": [*resources]}
    return {"Version": "2012-10-17", "Statement": [statement]}


@pytest.fixture
def account(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    """An account whose user is who this process and its children are."""
    account = Account(object_store)
    lines = (
        f"aws_access_key_id = {account.key['AccessKeyId']}\naws_secret_access_key = {account.key['SecretAccessKey']}"
    )
    (tmp_path / "user-credentials").write_text(f"[default]\n{lines}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "user-credentials"))
    for cache in (files._filesystem, credentials._session):
        cache.cache_clear()
    yield account
    use(())
    for cache in (files._filesystem, credentials._session):
        cache.cache_clear()
