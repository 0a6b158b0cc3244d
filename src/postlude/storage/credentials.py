"""What a rule asks of the connection to a store: where it is, and with whose credentials it is spoken to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from postlude.manifest.storage import S3
from postlude.storage.rules import Rule


@dataclass(frozen=True)
class Connection:
    """What sets one connection apart from another. Places that differ in nothing of it share one."""

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    checksums: str | None = None
    role: str | None = None
    role_seconds: int | None = None
    prefix: str = ""
    """Where a role is named: its session is for this prefix alone."""
    read_only: bool = False


def connection_of(rule: Rule) -> Connection:
    """The connection that a rule asks for."""
    of_store = Connection(rule.endpoint, rule.region, rule.profile, rule.checksums)
    if rule.role is None:
        return of_store
    return replace(
        of_store, role=rule.role, role_seconds=rule.role_seconds, prefix=rule.prefix, read_only=rule.read_only
    )


def options(protocol: str, connection: Connection) -> dict[str, Any]:
    """What fsspec is to make the file system of a protocol with."""
    if protocol not in S3 or connection == Connection():
        return {}
    given = {"endpoint_url": connection.endpoint, "profile": connection.profile}
    client = {"region_name": connection.region}
    config = {"request_checksum_calculation": connection.checksums}
    return {
        "client_kwargs": {key: value for key, value in client.items() if value is not None},
        "config_kwargs": {key: value for key, value in config.items() if value is not None},
        **{key: value for key, value in given.items() if value is not None},
    }
