"""What AWS has to allow for a place: the statements of IAM's documents, by what is done there.

Each statement has a name (its Sid), and is needed: without it something of a run is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from postlude.storage.rules import Rule

LIST = ("s3:ListBucket",)
READ = ("s3:GetObject",)
WRITE = ("s3:PutObject",)
REMOVE = ("s3:DeleteObject",)
UPLOADS = ("s3:ListBucketMultipartUploads",)
PARTS = ("s3:AbortMultipartUpload", "s3:ListMultipartUploadParts")
DECRYPT = ("kms:Decrypt",)
ENCRYPT = ("kms:GenerateDataKey",)
ASSUME = ("sts:AssumeRole",)

_NAMES = {
    LIST: "List",
    READ: "Read",
    WRITE: "Write",
    REMOVE: "Remove",
    UPLOADS: "Uploads",
    PARTS: "Parts",
    DECRYPT: "Decrypt",
    ENCRYPT: "Encrypt",
    ASSUME: "Assume",
}

Statement = dict[str, Any]


def session_policy(rule: Rule) -> dict[str, Any]:
    """What a session of the rule's role may do, whatever else the role may. What holds for the same resources stands
    together: AWS takes 2,048 characters."""
    merged: dict[str, Statement] = {}
    for each in (*of_place(rule.prefix, rule.read_only, rule.partition), *of_key(rule)):
        rest = {key: value for key, value in each.items() if key not in ("Sid", "Action")}
        known = merged.setdefault(repr(rest), {**rest, "Action": []})
        known["Action"] += each["Action"]
    return document(merged.values())


def document(statements: Iterable[Statement]) -> dict[str, Any]:
    """A policy of IAM."""
    return {"Version": "2012-10-17", "Statement": list(statements)}


def of_place(uri: str, read_only: bool, partition: str = "aws") -> list[Statement]:
    """What is done to the objects below a place of S3, which is ``s3://BUCKET`` or ``s3://BUCKET/FOLDER``."""
    bucket, _, folder = uri.partition("://")[2].strip("/").partition("/")
    arn = f"arn:{partition}:s3:::{bucket}"
    objects = [f"{arn}/{folder}", f"{arn}/{folder}/*"] if folder else [f"{arn}/*"]
    within = {"Condition": {"StringLike": {"s3:prefix": [folder, f"{folder}/*"]}}} if folder else {}
    statements = [allow(LIST, [arn], within), allow(READ, objects)]
    if not read_only:
        statements += [
            allow(WRITE, objects),
            allow(REMOVE, objects),
            allow(UPLOADS, [arn], within),
            allow(PARTS, objects),
        ]
    return statements


def of_key(rule: Rule, context: dict[str, Any] | None = None) -> list[Statement]:
    """What is done with the master key of a place, where that is one of KMS; only with this encryption ``context``."""
    key = rule.encrypt.key.removeprefix("kms:") if rule.encrypt else ""
    if not (key.startswith(("arn:", "alias/")) or (key and ":" not in key)):
        return []
    named = {"ForAnyValue:StringEquals": {"kms:ResourceAliases": key}} if key.startswith("alias/") else {}
    condition = {**named, **({"StringLike": context} if context else {})}
    where = {"Condition": condition} if condition else {}
    resources = [
        key
        if key.startswith("arn:")
        else "*"
        if key.startswith("alias/")
        else f"arn:{rule.partition}:kms:*:*:key/{key}"
    ]
    statements = [allow(DECRYPT, resources, where)]
    return statements if rule.read_only else [*statements, allow(ENCRYPT, resources, where)]


def name_of(actions: tuple[str, ...]) -> str:
    """What the statement is called that allows these."""
    return _NAMES.get(actions, "")


def allow(actions: tuple[str, ...], resources: list[str], more: Statement | None = None) -> Statement:
    """A statement that allows actions on resources, named for what they are."""
    statement = {"Sid": name_of(actions), "Effect": "Allow", "Action": [*actions], "Resource": resources}
    return {**statement, **(more or {})}
