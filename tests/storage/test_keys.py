"""Master keys: made, used once per folder, refused for a reason that is told, and replaced without touching data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from object_store import ObjectStore
from postlude import storage
from postlude.cli.app import app
from postlude.storage import credentials, data_keys, keys, rewrap, rules
from storage.conftest import encrypt, new_master_key


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    rules.use(())
    data_keys._unwrapped.clear()


def write_run(run: str) -> str:
    """A run with logs, a checkpoint and an artifact, all encrypted. The artifact."""
    stage = f"{run}/stages/sft"
    storage.Journal(f"{stage}/metrics.jsonl").append({"step": 1})
    storage.write_document(f"{stage}/state.json", {"state": "done"})
    for folder in (f"{stage}/checkpoints/step-1", f"{stage}/model"):
        storage.begin(folder)
        digests = {}
        for number in range(5):
            with storage.open_hashed(f"{folder}/part-{number}") as file:
                file.write(b"weights")
            digests[f"part-{number}"] = file.digest
        storage.commit(folder, digests)
    return f"{stage}/model"


def test_a_key_file_is_made_once_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "master.key"
    keys.new_key_file(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    with pytest.raises(storage.StorageError, match="takes with it all that it encrypts"):
        keys.new_key_file(str(path))
    assert path.read_bytes() == before


def test_a_key_file_that_cannot_be_used_is_an_error_that_says_why(tmp_path: Path) -> None:
    key = new_master_key(tmp_path)
    path, run = Path(key.removeprefix("file:")), str(tmp_path / "runs" / "a")
    encrypt(run, key)
    artifact, master = write_run(run), path.read_bytes()
    other = Path(new_master_key(tmp_path).removeprefix("file:")).read_bytes()
    for content, mode, why in (
        (master, 0o640, r"can be used by others than its owner \(mode 0640\)"),
        (other, 0o600, "is not the one that it was encrypted with: that one's fingerprint"),
        (b"short\n", 0o600, "is no key file|cannot be read"),
        (None, 0o600, "There is no key file"),
    ):
        data_keys._unwrapped.clear()
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
            path.chmod(mode)
        for use in (
            lambda: storage.verify(artifact),
            lambda: storage.write_bytes(f"{run}/stages/sft/new.json", b"secret"),
        ):
            with pytest.raises(storage.StorageError, match=why):
                use()
        assert not os.path.exists(f"{run}/stages/sft/new.json")
    path.write_bytes(master)
    path.chmod(0o600)
    storage.verify(artifact)


def test_a_record_that_was_changed_is_refused(tmp_path: Path) -> None:
    encrypt(str(tmp_path / "runs"), new_master_key(tmp_path))
    artifact = write_run(str(tmp_path / "runs" / "a"))
    record = Path(artifact, "KEYS")
    body = json.loads(record.read_text())
    for changed in (
        {**body, "id": "00" * 16},
        {**body, "folder": "other"},
        {**body, "context": {"run": "b", "stage": "sft"}},
        {**body, "context": {"run": "a"}},
        {**body, "wrapped": body["wrapped"][:-8] + "AAAAAAA="},
        {**body, "version": 2},
        [],
    ):
        record.write_text(json.dumps(changed))
        with pytest.raises(storage.StorageError):
            storage.verify(artifact)
    record.write_text(json.dumps({**body, "key": "file:/elsewhere"}))  # which says nothing: the rule does
    storage.verify(artifact)


def test_a_run_that_was_moved_is_refused_until_its_owner_says_so(tmp_path: Path) -> None:
    key = new_master_key(tmp_path)
    encrypt(str(tmp_path / "runs"), key)
    write_run(str(tmp_path / "runs" / "a"))
    os.rename(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    artifact = str(tmp_path / "runs" / "b" / "stages" / "sft" / "model")
    with pytest.raises(storage.CorruptError, match="is of sft of a, and stands where that of sft of b should"):
        storage.verify(artifact)
    assert rewrap.rewrap(str(tmp_path / "runs" / "b"), key) == 3
    storage.verify(artifact)


def test_keys_are_wrapped_anew_and_no_data_is_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = new_master_key(tmp_path), new_master_key(tmp_path)
    run = str(tmp_path / "runs" / "a")
    encrypt(run, old)
    artifact = write_run(run)
    before = {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file() and path.name != "KEYS"}
    app(["keys", "rewrap", run, "--to", new], standalone_mode=False)
    assert {
        path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file() and path.name != "KEYS"
    } == before
    with pytest.raises(storage.StorageError, match="is not the one that it was encrypted with"):
        storage.verify(artifact)
    encrypt(run, new)
    storage.verify(artifact)
    assert storage.Journal(f"{run}/stages/sft/metrics.jsonl").read() == [{"step": 1}]
    capsys.readouterr()
    app(["keys", "show", run, "--json"], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert shown[artifact] == {"key": new, "run": "a", "stage": "sft"}
    assert len(shown) == 3


def test_a_key_that_no_service_knows_is_refused() -> None:
    for key in ("master.key", "vault:secret", ""):
        with pytest.raises(storage.StorageError, match="cannot be used"):
            keys.service_of(key)
    for key in ("alias/postlude", "arn:aws:kms:eu-west-1:111122223333:key/1234abcd", "kms:alias/a"):
        assert isinstance(keys.service_of(key), keys.KMS)


# --- KMS ------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of KMS, one after another."""
    made: list[str] = []
    call = keys.KMS._call

    def count(self: keys.KMS, rule: rules.Rule, context: keys.Context, what: str, **arguments: Any) -> Any:
        made.append(what)
        return call(self, rule, context, what, **arguments)

    monkeypatch.setattr(keys.KMS, "_call", count)
    return made


def test_kms_makes_one_key_for_each_folder_and_unwraps_it_once(
    object_store: ObjectStore, tmp_path: Path, calls: list[str]
) -> None:
    kms = object_store.client("kms")
    arn = kms.create_key()["KeyMetadata"]["Arn"]
    kms.create_alias(AliasName=f"alias/{tmp_path.name}", TargetKeyId=arn)
    run = str(tmp_path / "runs" / "a")
    for key in (arn, f"alias/{tmp_path.name}"):
        storage.remove(run)
        calls.clear()
        encrypt(str(tmp_path / "runs"), key)
        artifact = write_run(run)
        assert calls == ["generate_data_key"] * 3  # logs, checkpoint, artifact, and not their twelve files
        data_keys._unwrapped.clear()  # as another process has it
        storage.verify(artifact)
        assert calls == ["generate_data_key"] * 3 + ["decrypt"]
    record = json.loads(Path(artifact, "KEYS").read_text())
    with pytest.raises(storage.StorageError, match="does not unwrap this data key for run 'b'"):
        keys.service_of(arn).unwrap(record["wrapped"], {"run": "b"}, rules.NO_RULE)
    encrypt(run, "alias/not-there")
    with pytest.raises(storage.StorageError, match="KMS has no key 'alias/not-there'"):
        storage.write_bytes(f"{run}/new/file.json", b"secret")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("DisabledException", "is disabled"),
        ("KMSInvalidStateException", "cannot be used as it is"),
        ("IncorrectKeyException", "is not the one that wrapped"),
        ("InvalidCiphertextException", "for run 'a', stage 'sft'"),
        ("AccessDeniedException", "kms:Decrypt, context run 'a', stage 'sft'"),
        ("NotFoundException", "KMS has no key"),
        ("ThrottlingException", "KMS refused kms:Decrypt"),
    ],
)
def test_what_kms_refuses_is_told(monkeypatch: pytest.MonkeyPatch, code: str, words: str) -> None:
    class Refusing:
        def decrypt(self, **arguments: Any) -> None:
            raise ClientError({"Error": {"Code": code, "Message": ""}}, "Decrypt")

    monkeypatch.setattr(credentials, "client", lambda *arguments, **named: Refusing())
    with pytest.raises(storage.StorageError, match=words):
        keys.service_of("alias/postlude").unwrap("YQ==", {"run": "a", "stage": "sft"}, rules.NO_RULE)
