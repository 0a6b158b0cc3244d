"""What a rule asks of the connection to a store: where it is, and with whose credentials it is spoken to.

Where a role is named, each process assumes it by itself, with a policy that narrows the session to the prefix, and
again before the session ends, in the middle of an upload if need be. Else the usual chain of AWS is asked, or a profile
of it. Credentials are in the memory of processes alone: what travels between them is the rule.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from postlude.manifest.storage import S3
from postlude.secrecy import learn
from postlude.storage.errors import StorageError
from postlude.storage.policies import session_policy
from postlude.storage.rules import Rule

ROLE_SECONDS = 3600
"""How long a session of a role lasts where the rule does not say."""
RENEWED_BEFORE = 0.25
"""The share of a session's time that is left when it is renewed."""


@dataclass(frozen=True)
class Connection:
    """What sets one connection apart from another. Places that differ in nothing of it share one."""

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    checksums: str | None = None
    rule: Rule | None = None
    """Where a role is named: its session is for the prefix alone."""


def connection_of(rule: Rule) -> Connection:
    """The connection that a rule asks for."""
    connection = Connection(rule.endpoint, rule.region, rule.profile, rule.checksums)
    return replace(connection, rule=rule) if rule.role else connection


def options(protocol: str, connection: Connection) -> dict[str, Any]:
    """What fsspec is to make the file system of a protocol with."""
    if protocol not in S3 or connection == Connection():
        return {}
    client = {"endpoint_url": connection.endpoint, "region_name": connection.region}
    config = {"request_checksum_calculation": connection.checksums}
    session = {"session": _renewing_session(connection.rule)} if connection.rule else {"profile": connection.profile}
    return {
        "client_kwargs": {key: value for key, value in client.items() if value is not None},
        "config_kwargs": {key: value for key, value in config.items() if value is not None},
        **{key: value for key, value in session.items() if value is not None},
        "skip_instance_cache": True,  # who holds it is asked for it by the rule
    }


def client(service: str, rule: Rule, **given: Any) -> Any:
    """A client of boto3's for a service of AWS, with the credentials of a rule, which renew themselves."""
    given.setdefault("region_name", rule.region)
    return _session(rule, os.getpid()).client(service, **{key: value for key, value in given.items() if value})


@lru_cache
def _session(rule: Rule, pid: int) -> Any:
    import boto3
    import botocore.session
    from botocore.credentials import DeferredRefreshableCredentials

    plain = botocore.session.Session(profile=rule.profile)
    if rule.role:
        credentials = DeferredRefreshableCredentials(lambda: assume(rule), "assume-role")
        plain._credentials = _in_time(credentials, rule)
    return boto3.Session(botocore_session=plain)


def _renewing_session(rule: Rule) -> Any:
    """The same for s3fs."""
    from aiobotocore.credentials import AioDeferredRefreshableCredentials
    from aiobotocore.session import AioSession

    async def renew() -> dict[str, Any]:
        return await asyncio.to_thread(assume, rule)

    session = AioSession(profile=rule.profile)
    session._credentials = _in_time(AioDeferredRefreshableCredentials(renew, "assume-role"), rule)
    return session


def _in_time(credentials: Any, rule: Rule) -> Any:
    """Credentials that are renewed when a share of their time is left; botocore's own 15 minutes are the whole time of
    the shortest session, which would be renewed before each request."""
    for library in ("botocore", "aiobotocore"):  # which would log a traceback for each renewal that fails
        logging.getLogger(f"{library}.credentials").setLevel(logging.CRITICAL)
    left = (rule.role_seconds or ROLE_SECONDS) * RENEWED_BEFORE
    credentials._advisory_refresh_timeout, credentials._mandatory_refresh_timeout = left, left * 2 / 3
    return credentials


def assume(rule: Rule) -> dict[str, Any]:
    """New credentials of the rule's role, as botocore keeps them. StorageError if it cannot be assumed."""
    import botocore.session
    from botocore.exceptions import BotoCoreError, ClientError

    session = botocore.session.Session(profile=rule.profile)
    try:
        sts = session.create_client("sts", region_name=rule.region, endpoint_url=rule.endpoint)
        answer = sts.assume_role(
            RoleArn=rule.role,
            RoleSessionName=session_name(rule.run),
            DurationSeconds=rule.role_seconds or ROLE_SECONDS,
            Policy=json.dumps(session_policy(rule), separators=(",", ":")),
        )["Credentials"]
    except (ClientError, BotoCoreError) as error:
        raise StorageError(
            f"The role '{rule.role}' cannot be assumed for '{rule.prefix}': {str(error).rstrip('.')}. Check that it "
            "trusts the credentials of this machine, that these may do sts:AssumeRole, and that it allows sessions of "
            f"{rule.role_seconds or ROLE_SECONDS} seconds."
        ) from error
    for name in ("SecretAccessKey", "SessionToken"):
        learn(answer[name], name)
    return {
        "access_key": answer["AccessKeyId"],
        "secret_key": answer["SecretAccessKey"],
        "token": answer["SessionToken"],
        "expiry_time": answer["Expiration"].isoformat(),
    }


def session_name(run: str) -> str:
    """What the sessions of a run are called in AWS's records."""
    return re.sub(r"[^\w+=,.@-]", "-", f"postlude-{run}", flags=re.ASCII)[:64].rstrip("-")
