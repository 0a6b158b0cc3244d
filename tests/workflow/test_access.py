"""The least policies of a manifest, and the probe that tries them: against a store that enforces what policies say."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from postlude.storage import StorageError, policies
from postlude.storage.keys import new_key_file
from postlude.workflow.probe import explain, kind_of
from roles import Account, policy


@pytest.fixture
def granted(project: Any, account: Account, bucket: str) -> Any:
    """A project on roles, and how a role is given what ``access`` prints for it."""
    client = account.store.client()
    client.put_object(Bucket=bucket, Key="data/chats.jsonl", Body=project.chats.read_bytes())
    kms, key = account.store.client("kms"), f"alias/{bucket}"  # of a key's ARN moto knows nothing when it authorises
    kms.create_alias(AliasName=key, TargetKeyId=kms.create_key()["KeyMetadata"]["KeyId"])
    roles = {name: account.role(name) for name in ("reader", "trainer")}
    project.data["source"] = {"path": f"s3://{bucket}/data/chats.jsonl"}
    project.manifest["run_dir"] = f"s3://{bucket}/runs"
    project.manifest["storage"] = {
        f"s3://{bucket}/data/": {"role": roles["reader"], "read_only": True},
        f"s3://{bucket}/runs/": {"role": roles["trainer"], "encrypt": {"key": key}},
    }
    printed = project("access", "MANIFEST").json
    documents = {"reader": printed["data"][roles["reader"]], "trainer": printed["run"][roles["trainer"]]}

    def give(name: str, without: str | None = None) -> None:
        statements = [each for each in documents[name]["Statement"] if each["Sid"] != without]
        account.role(name, policies.document(statements))

    project.printed, project.documents, project.give = printed, documents, give
    give("reader")
    give("trainer")
    return project


def wrong(done: Any) -> dict[str, str]:
    return {trial["what"]: trial["why"] for trial in done.json["trials"] if trial["verdict"] == "WRONG"}


@pytest.mark.capability(
    "The least policies of a manifest are printed, and tried: what is missing, and what is too much"
)
@pytest.mark.long
def test_the_printed_policies_are_enough_and_each_statement_is_needed(
    granted: Any, account: Account, bucket: str
) -> None:
    with account.enforced():
        done = granted("access", "MANIFEST", "--probe", "--json")
        assert done.exit_code == 0, done.out
        assert {trial["verdict"] for trial in done.json["trials"]} == {"good"}
    assert account.store.keys(bucket) == ["data/chats.jsonl"], "nothing is left behind"
    assert account.store.uploads(bucket) == []
    tried = 0
    for name, document in granted.documents.items():
        for statement in [each["Sid"] for each in document["Statement"]]:
            granted.give(name, without=statement)
            with account.enforced():
                done = granted("access", "MANIFEST", "--probe", "--json")
            assert done.exit_code == 4, (name, statement)
            assert any(f"the statement {statement} is missing" in why for why in wrong(done).values()), (name, done.out)
            assert not any("statement" in why and f" {statement} " not in why for why in wrong(done).values()), done.out
            tried += 1
        granted.give(name)
    assert tried == 2 + 8


def test_a_data_role_that_is_too_strong_is_warned_about(granted: Any, account: Account, bucket: str) -> None:
    account.role("reader", policy("s3:*"))
    with account.enforced():
        done = granted("access", "MANIFEST", "--probe")
    assert done.exit_code == 0
    said = " ".join(done.out.split())
    assert "warned" in said
    assert "take s3:PutObject from it" in said
    assert account.store.keys(bucket) == ["data/chats.jsonl"]
    assert max(map(len, done.out.splitlines())) <= 80


def test_what_is_printed_beside_the_roles(granted: Any, bucket: str) -> None:
    printed, storage = granted.printed, granted.manifest["storage"]
    roles = sorted(rule["role"] for rule in storage.values())
    (assume,) = printed["machine"]["Statement"]
    assert (assume["Action"], assume["Resource"]) == (["sts:AssumeRole"], roles)
    (key,) = printed["key"].values()
    for statement in key["Statement"]:
        assert statement["Principal"] == {"AWS": storage[f"s3://{bucket}/runs/"]["role"]}
        assert statement["Condition"]["StringLike"] == {"kms:EncryptionContext:run": "small"}
    (rule,) = printed["lifecycle"][bucket]["Rules"]
    assert rule["Filter"] == {"Prefix": "runs/"}
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    assert "Write" not in json.dumps(printed["data"])


@pytest.mark.long
def test_validate_probes_too(granted: Any, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postlude.workflow.validate.workers_for", lambda manifest: nullcontext())
    granted.give("trainer", without="Remove")
    with account.enforced():
        done = granted("validate", "MANIFEST", "--probe")
    assert done.exit_code == 4
    assert "the statement Remove is missing" in " ".join(done.err.split() + done.out.split())


def test_a_probe_without_the_package_says_so_and_tries_what_it_can(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("boto3", "botocore", "botocore.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    new_key_file(str(tmp_path / "key"))
    project.data["source"] = {"path": "s3://bucket/chats.jsonl"}
    project.manifest["storage"] = {str(tmp_path / "runs"): {"encrypt": {"key": f"file:{tmp_path / 'key'}"}}}
    done = project("access", "MANIFEST", "--probe", "--json")
    assert wrong(done) == {"reach it": "it needs a package: pip install 'postlude[s3]'"}
    assert [trial["verdict"] for trial in done.json["trials"]] == ["WRONG", "good", "good", "good"]
    (tmp_path / "key").chmod(0o644)
    assert "can be used by others" in wrong(project("access", "MANIFEST", "--probe", "--json"))["make a data key"]


def refusal(code: str, operation: str = "PutObject", message: str = "said", **headers: str) -> ClientError:
    response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPHeaders": headers}}
    return ClientError(response, operation)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (refusal("AccessDenied"), "403 of S3"),
        (refusal("AccessDenied", message="not authorized to perform: kms:GenerateDataKey on"), "403 of KMS"),
        (refusal("KMS.DisabledException"), "403 of KMS"),
        (refusal("AccessDeniedException", "Decrypt"), "403 of KMS"),
        (refusal("AccessDenied", "AssumeRole"), "403 of STS"),
        (refusal("NoSuchBucket"), "404"),
        (refusal("NoSuchKey"), "404"),
        (refusal("PermanentRedirect"), "wrong region"),
        (refusal("AuthorizationHeaderMalformed"), "wrong region"),
        (refusal("ExpiredToken"), "expired credentials"),
        (refusal("ExpiredTokenException", "Decrypt"), "expired credentials"),
        (refusal("RequestTimeTooSkewed"), "skewed clock"),
        (refusal("InvalidSignatureException", "Decrypt", "Signature expired: 1 is now earlier than 2"), "skewed clock"),
        (refusal("SignatureDoesNotMatch", message="Signature not yet current: 1"), "skewed clock"),
        (refusal("SignatureDoesNotMatch", message="does not match"), "unknown credentials"),
        (refusal("Other"), "Other"),
        (NoCredentialsError(), "NoCredentialsError"),
    ],
)
def test_what_is_refused_is_told_apart(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind
    assert explain(error, policies.WRITE).startswith(f"{kind}: ")
    wrapped = StorageError("In words of ours.")
    wrapped.__cause__ = error
    assert explain(wrapped).startswith(f"{kind}: ")
    assert explain(wrapped).endswith("In words of ours.")


def test_a_region_that_the_store_names_is_the_remedy() -> None:
    error = refusal("PermanentRedirect", **{"x-amz-bucket-region": "eu-west-1"})
    assert "give its rule the region eu-west-1" in explain(error)
