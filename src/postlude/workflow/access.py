"""``postlude access``: the least that AWS has to allow for a manifest.

What a manifest names is grouped by who speaks to it (a role, or the credentials of the machine) and by what is done
there: data are read, the run directory is written. Each group is one policy of IAM with named statements;
:mod:`postlude.workflow.probe` tries them, and says which is missing.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from postlude.manifest.load import Resolved
from postlude.manifest.storage import is_below, places_in, plain
from postlude.storage import policies, uris
from postlude.storage.rules import Rule, rule_of

_FILE = re.compile(r"\.(jsonl|ndjson|json|parquet|csv|tsv|txt|log|jinja|gz|bz2|xz|zst|zstd)$", re.IGNORECASE)
DAYS = 7
"""After so many days S3 throws away what was uploaded of an object that nobody has completed."""


@dataclass(frozen=True)
class Need:
    """A folder on S3 that a run reads or writes."""

    uri: str
    writes: bool
    rule: Rule
    run: str

    @property
    def who(self) -> str:
        """With whose credentials it is spoken to."""
        profile = f"the profile {self.rule.profile}" if self.rule.profile else "the machine"
        return self.rule.role or f"credentials of {profile}"

    @property
    def statements(self) -> list[policies.Statement]:
        """What IAM has to allow."""
        return [*policies.of_place(self.uri, not self.writes, self.rule.partition), *self.of_key]

    @property
    def of_key(self) -> list[policies.Statement]:
        """What the master key has to allow; what is written with it, for this run alone."""
        context = {"kms:EncryptionContext:run": self.run} if self.writes else None
        return policies.of_key(self.rule.model_copy(update={"read_only": not self.writes}), context)


def needs_of(resolved: Resolved) -> list[Need]:
    """The folders on S3 that a manifest reads or writes, the run directory first. What stands below another that is
    listed is part of that."""
    run_dir, name = plain(resolved.manifest.run_dir), resolved.manifest.name
    needs = [Need(run_dir, True, rule_of(run_dir), name)] if run_dir.startswith("s3://") else []
    read = {_folder(plain(uri)) for _, uri in places_in(resolved.tree) if plain(uri).startswith("s3://")}
    for folder in sorted(read):
        if not any(is_below(folder, need.uri) for need in needs):
            needs.append(Need(folder, False, rule_of(folder), name))
    return needs


def _folder(uri: str) -> str:
    """The folder that a file is in, or what a pattern matches; a folder is itself."""
    while glob.has_magic(uri):
        uri = uris.parent(uri).rstrip("/")
    return uris.parent(uri).rstrip("/") if _FILE.search(uri) else uri


def access(resolved: Resolved) -> dict[str, Any]:
    """The least policies that a manifest needs, as plain data: for data and for the run by whom they are for, for the
    credentials that assume their roles, for the keys, and the rule by which a bucket throws away what is left of
    uploads."""
    needs = needs_of(resolved)
    roles = sorted({need.rule.role for need in needs if need.rule.role})
    return {
        "data": _by_whom(need for need in needs if not need.writes),
        "run": _by_whom(need for need in needs if need.writes),
        "machine": policies.document([policies.allow(policies.ASSUME, roles)] if roles else []),
        "key": {need.rule.encrypt.key: _of_key(need) for need in needs if need.rule.encrypt and need.of_key},
        "lifecycle": {need.uri.split("/")[2]: _lifecycle(need.uri) for need in needs if need.writes},
    }


def _by_whom(needs: Iterable[Need]) -> dict[str, policies.Statement]:
    statements: dict[str, list[policies.Statement]] = {}
    for need in needs:
        statements.setdefault(need.who, []).extend(need.statements)
    return {who: policies.document(_numbered(each)) for who, each in statements.items()}


def _numbered(statements: Iterable[policies.Statement]) -> Iterable[policies.Statement]:
    """Statements whose names differ, as IAM asks for."""
    seen: Counter[str] = Counter()
    for each in statements:
        seen[each["Sid"]] += 1
        yield {**each, "Sid": each["Sid"] + (str(seen[each["Sid"]]) if seen[each["Sid"]] > 1 else "")}


def _of_key(need: Need) -> policies.Statement:
    """What the policy of the key itself has to say of who uses it; who administers it is for its account to say."""
    who = {"AWS": need.rule.role or f"arn:{need.rule.partition}:iam::ACCOUNT:role/ROLE"}
    kept = ({key: value for key, value in each.items() if key != "Resource"} for each in need.of_key)
    return policies.document({**each, "Principal": who, "Resource": "*"} for each in kept)


def _lifecycle(uri: str) -> dict[str, Any]:
    folder = uri.partition("://")[2].partition("/")[2]
    rule = {"ID": "postlude-uploads", "Status": "Enabled", "Filter": {"Prefix": f"{folder}/" if folder else ""}}
    return {"Rules": [{**rule, "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": DAYS}}]}
