"""S3, by a real server, and a proxy where it must misbehave: what s3fs leaves open does not reach us."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from object_store import ObjectStore
from postlude import storage
from postlude.storage import conditional, files
from postlude.storage import object_store as object_stores
from store_proxy import HANG, LOSE, PASS, Judge, Proxy, Request

Start = Callable[..., BaseProcess]
LARGE = 110 * 2**20
"""More than s3fs sends in one piece where it is given all of it."""
PARTS_BYTES = 12 * 2**20


@pytest.fixture
def place(bucket: str) -> str:
    return f"s3://{bucket}/run"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open file is sent in parts of 5 MiB, and another try comes soon."""
    monkeypatch.setattr(object_stores.ObjectStore, "default_block_size", 5 * 2**20)
    monkeypatch.setattr(object_stores, "_PAUSE_SECONDS", 0.02)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up after a moment."""
    monkeypatch.setattr(object_stores, "RETRY_SECONDS", 0.3)
    monkeypatch.setattr(object_stores, "_TIMEOUTS", {"connect_timeout": 0.5, "read_timeout": 0.5})
    monkeypatch.setattr(object_stores, "CALL_SECONDS", 5.0)


def first(count: int, verdict: object, method: str = "") -> Judge:
    """The first requests, of a method, have this verdict."""
    left = [count]

    def judge(request: Request) -> object:
        if (method and request.method != method) or left[0] <= 0:
            return PASS
        left[0] -= 1
        return verdict

    return judge


# --- what is written ------------------------------------------------------------------------------------------


def _write_and_fail(uri: str, mode: str, content: bytes | str) -> None:
    with storage.open_file(uri, mode) as file:
        file.write(content)
        raise InterruptedError("in the middle")


def _hash_and_fail(uri: str, content: bytes) -> None:
    with storage.open_hashed(uri) as file:
        file.write(content)
        raise InterruptedError("in the middle")


def _let_go(uri: str, content: bytes) -> None:
    file = storage.open_file(uri, "wb")
    file.write(content)
    del file
    gc.collect()
    raise InterruptedError("never closed")


@pytest.mark.capability("A write to an object store that an exception ends leaves the object as it was")
@pytest.mark.parametrize(
    "fail",
    [
        lambda uri: _write_and_fail(uri, "wb", b"half"),
        lambda uri: _write_and_fail(uri, "wb", bytes(PARTS_BYTES)),
        lambda uri: _write_and_fail(uri, "w", "half"),
        lambda uri: _hash_and_fail(uri, b"half"),
        lambda uri: _let_go(uri, b"half"),
    ],
    ids=["short", "in parts", "text", "hashed", "let go"],
)
def test_an_exception_publishes_nothing(
    place: str, bucket: str, object_store: ObjectStore, fail: Callable[[str], None]
) -> None:
    old, new = f"{place}/old", f"{place}/new"
    storage.write_text(old, "whole")
    for uri in (old, new):
        with pytest.raises(InterruptedError):
            fail(uri)
    assert storage.read_text(old) == "whole"
    assert not storage.exists(new)
    assert object_store.uploads(bucket) == []


def test_what_others_write_is_seen_at_once(place: str, bucket: str, object_store: ObjectStore) -> None:
    uri, client = f"{place}/a", object_store.client()
    assert not storage.exists(uri)
    assert storage.list_directory(place) == []
    for size in (1, 20, 3):
        client.put_object(Bucket=bucket, Key="run/a", Body=b"x" * size)
        assert storage.size_bytes(uri) == size
        assert storage.read_bytes(uri) == b"x" * size
        assert storage.list_directory(place) == ["a"]
        assert storage.expand(f"{place}/*") == [uri]
    client.delete_object(Bucket=bucket, Key="run/a")
    assert not storage.exists(uri)
    assert storage.list_directory(place) == []
    assert storage.expand(f"{place}/*") == []


def test_an_object_that_is_replaced_while_it_is_read_is_told(place: str, bucket: str) -> None:
    uri = f"{place}/a"
    storage.write_bytes(uri, bytes(2**20))
    with storage.open_file(uri) as file:
        file.read(10)
        storage.write_bytes(uri, b"1" * 2**20)
        file.seek(2**19)
        with pytest.raises(storage.NotReadable, match="was replaced while it was read"):
            file.read(10)


def test_of_a_large_object_little_more_is_read_than_what_is_asked_for(place: str, proxy: Proxy) -> None:
    content = os.urandom(8 * 2**20)
    storage.write_bytes(f"{place}/a", content)
    asked = []

    def judge(request: Request) -> str:
        if request.method == "GET":
            start, end = request.headers["range"].removeprefix("bytes=").split("-")
            asked.append(int(end) + 1 - int(start))
        return PASS

    proxy.reset(judge)
    with storage.open_file(f"{place}/a") as file:
        file.seek(3_000_000)
        assert file.read(1_000_000) == content[3_000_000:4_000_000]
    assert sum(asked) < 1_020_000
    asked.clear()
    with storage.open_file(f"{place}/a") as file:
        assert b"".join(iter(lambda: file.read(10_000), b"")) == content
    assert sum(asked) == len(content)
    assert len(asked) < 20


def _read(uri: str, answers: str) -> None:
    Path(answers).write_text(storage.read_text(uri))


def test_a_child_that_was_forked_has_a_connection_of_its_own(place: str, tmp_path: Path, start: Start) -> None:
    storage.write_text(f"{place}/a", "from the parent")
    child = start(_read, f"{place}/a", str(tmp_path / "answer"))
    child.join(30)
    assert (tmp_path / "answer").read_text() == "from the parent"
    assert storage.read_text(f"{place}/a") == "from the parent"


def test_removing_says_what_stays(place: str, proxy: Proxy) -> None:
    storage.write_text(f"{place}/a", "x")
    refusal = (
        b"<DeleteResult><Error><Key>run/a</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>"
    )
    proxy.reset(lambda request: (200, refusal) if request.method == "POST" else PASS)
    with pytest.raises(storage.NotWritable, match="does not permit it"):
        storage.remove(place)


# --- conditions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, pytest.param(LARGE, marks=pytest.mark.long)], ids=["empty", "small", "large"])
def test_a_condition_holds_at_any_size(place: str, bucket: str, object_store: ObjectStore, size: int) -> None:
    uri, content = f"{place}/a", bytes(size)
    assert storage.create(uri, content)
    assert not storage.create(uri, content + b"2")
    tag = conditional.tag_of(uri)
    assert conditional.swap(uri, content + b"3", '"another"') is None
    assert storage.size_bytes(uri) == size
    new = conditional.swap(uri, content + b"4", tag)
    assert new == conditional.tag_of(uri) != tag
    assert conditional.swap(uri, content + b"5", tag) is None
    assert storage.size_bytes(uri) == size + 1
    storage.remove(uri)
    assert conditional.swap(uri, content, new) is None
    assert not storage.exists(uri)
    assert object_store.uploads(bucket) == []


@pytest.mark.parametrize("losses", [1, 2])
def test_an_answer_that_is_lost_does_not_make_a_write_anothers(place: str, proxy: Proxy, losses: int) -> None:
    uri = f"{place}/a"
    proxy.reset(first(losses, LOSE, "PUT"))
    assert storage.create(uri, b"mine")
    tag = conditional.tag_of(uri)
    proxy.reset(first(losses, LOSE, "PUT"))
    assert conditional.swap(uri, b"mine again", tag)
    assert storage.read_bytes(uri) == b"mine again"
    proxy.reset(first(1, lambda: storage.write_bytes(uri, b"another's") or LOSE, "PUT"))
    assert conditional.swap(uri, b"mine no more", conditional.tag_of(uri)) is None
    assert storage.read_bytes(uri) == b"another's"


def test_an_upload_whose_last_answer_is_lost_has_succeeded(place: str, proxy: Proxy) -> None:
    posts: list[str] = []

    def judge(request: Request) -> str:
        if request.method == "POST" and "uploadId" in request.path:
            posts.append(request.path)
            return LOSE if len(posts) == 1 else PASS
        return PASS

    proxy.reset(judge)
    with storage.open_hashed(f"{place}/a") as file:
        for _ in range(12):
            file.write(bytes(2**20))
    assert storage.size_bytes(f"{place}/a") == PARTS_BYTES
    assert storage.sha256_of(f"{place}/a") == file.digest.sha256


# --- what a store refuses -------------------------------------------------------------------------------------

REFUSALS = {
    (403, "AccessDenied"): "does not permit it",
    (403, "ExpiredToken"): "credentials have expired.*Renew them",
    (403, "InvalidAccessKeyId"): "does not know the credentials",
    (403, "SignatureDoesNotMatch"): "does not know the credentials",
    (403, "RequestTimeTooSkewed"): "clock of this machine",
    (
        400,
        "AuthorizationHeaderMalformed",
        "wrong",
        "<Region>eu-west-1</Region>",
    ): "another region.*'eu-west-1'",
    (400, "KMS.DisabledException"): "key of KMS",
    (403, "AccessDenied", "not authorized to perform: kms:Decrypt"): "key of KMS",
    (503, "SlowDown"): "asks to come back later",
    (500, "InternalError"): "is in trouble",
    (409, "OperationAborted"): "others write to the same place",
    (507, "InsufficientStorage"): "no room left",
}


@pytest.mark.capability("What an object store refuses is told by its reason")
@pytest.mark.parametrize("verdict", REFUSALS, ids=lambda verdict: f"{verdict[1]}-{len(verdict)}")
def test_a_refusal_is_told_by_its_reason(place: str, proxy: Proxy, soon: None, verdict: tuple) -> None:
    storage.write_text(f"{place}/a", "x")
    proxy.reset(lambda _: verdict)
    for look in (storage.read_bytes, storage.size_bytes, storage.exists, storage.list_directory):
        with pytest.raises(storage.NotReadable, match=f"(?s)'{place}/a' cannot be read: .*{REFUSALS[verdict]}"):
            look(f"{place}/a")
    with pytest.raises(storage.NotWritable, match=f"(?s)'{place}/a' cannot be written: .*{REFUSALS[verdict]}"):
        storage.write_text(f"{place}/a", "y")


def test_a_bucket_that_is_not_there_is_no_file_that_is_not_there(place: str) -> None:
    with pytest.raises(storage.NotFound, match="nothing at"):
        storage.read_bytes(f"{place}/never")
    uri = "s3://a-bucket-that-nobody-made/a"
    for look in (storage.read_bytes, storage.size_bytes, storage.exists, storage.list_directory, storage.expand):
        with pytest.raises(storage.NotReadable, match=r"no such bucket.*check its name"):
            look(uri)
    for write in (storage.write_bytes, storage.create):
        with pytest.raises(storage.NotWritable, match="no such bucket"):
            write(uri, b"x")


def test_credentials_that_are_not_there_are_told(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text("")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(storage.NotReadable, match="no credentials are found"):
        storage.read_bytes(f"{place}/a")


def test_a_store_that_refuses_to_be_spoken_to_is_told(
    place: str, soon: None, monkeypatch: pytest.MonkeyPatch, object_store: ObjectStore
) -> None:
    config = Path(os.environ["AWS_CONFIG_FILE"])
    config.write_text(config.read_text().replace(object_store.endpoint, "http://127.0.0.1:9"))
    files._filesystem.cache_clear()
    with pytest.raises(storage.NotReadable, match=r"does not answer.*Check the endpoint"):
        storage.read_bytes(f"{place}/a")


def test_a_store_that_never_answers_is_told(place: str, proxy: Proxy, soon: None) -> None:
    proxy.reset(lambda _: HANG)
    with pytest.raises(storage.NotReadable, match="does not answer"):
        storage.read_bytes(f"{place}/a")
    with pytest.raises(storage.NotWritable, match="does not answer"):
        storage.write_bytes(f"{place}/a", b"x")


@pytest.mark.parametrize("verdict", [(503, "SlowDown"), (409, "ConditionalRequestConflict"), LOSE], ids=str)
def test_what_may_pass_is_tried_again_and_told_once(
    place: str, proxy: Proxy, verdict: object, caplog: pytest.LogCaptureFixture
) -> None:
    for count in (1, 2, 2):
        proxy.reset(first(count, verdict))
        storage.write_bytes(f"{place}/a", b"x")
        proxy.reset(first(count, verdict))
        assert storage.read_bytes(f"{place}/a") == b"x"
        proxy.reset(first(count, verdict, "PUT"))
        assert storage.create(f"{place}/b", b"x")
        storage.remove(f"{place}/b")
    assert len([line for line in caplog.messages if "Trying again" in line]) <= 2
    assert caplog.messages


def test_a_store_without_conditions_is_refused(place: str, proxy: Proxy) -> None:
    for drops in ({"if-none-match"}, {"if-match"}):
        proxy.drops = frozenset(drops)
        with pytest.raises(storage.StorageError, match=r"cannot make an object only where there is none.*Choose"):
            storage.lock(f"{place}/run.lock")
    proxy.drops = frozenset()
    proxy.reset(lambda request: (501, "NotImplemented") if "if-none-match" in request.headers else PASS)
    with pytest.raises(storage.StorageError, match="cannot make an object only where there is none"):
        storage.lock(f"{place}/run.lock")
    proxy.reset()
    assert storage.list_directory(place) == []
    with storage.lock(f"{place}/run.lock"):
        pass


# --- what killed processes leave ------------------------------------------------------------------------------


def test_the_next_holder_aborts_what_was_left_below_its_folder_alone(
    place: str, bucket: str, object_store: ObjectStore
) -> None:
    client = object_store.client()
    for key in ("run/a", "run/b/c", "run-2/a", "other"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    with storage.lock(f"{place}/run.lock", guarded_folder=place):
        assert sorted(object_store.uploads(bucket)) == ["other", "run-2/a"]


def test_an_upload_that_was_begun_since_is_not_aborted(place: str, proxy: Proxy) -> None:
    """The stand-in gives all uploads one time, so the proxy lists them."""
    storage.write_text(f"{place}/run.lock.00000001", "x")
    stamps = [datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (-60, 60)]
    uploads = "".join(
        f"<Upload><Key>run/{name}</Key><UploadId>{name}</UploadId><Initiated>{stamp:%Y-%m-%dT%H:%M:%S.000Z}</Initiated>"
        "</Upload>"
        for name, stamp in zip(("before", "since"), stamps, strict=True)
    )
    listing = f"<ListMultipartUploadsResult>{uploads}</ListMultipartUploadsResult>".encode()
    aborted: list[str] = []

    def judge(request: Request) -> object:
        if request.method == "DELETE":
            aborted.append(request.path)
            return 204, b""
        return (200, listing) if "uploads" in request.path else PASS

    proxy.reset(judge)
    assert conditional.abort_uploads(place, f"{place}/run.lock.00000001") == [f"{place}/before"]
    assert len(aborted) == 1


def test_uploads_that_may_not_be_listed_are_left_and_told(
    place: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.reset(lambda request: (403, "AccessDenied") if "uploads" in request.path else PASS)
    with storage.lock(f"{place}/run.lock"):
        assert any("Unfinished uploads" in line and "permit" in line for line in caplog.messages)


# --- leases and journals --------------------------------------------------------------------------------------


def test_a_lease_that_was_taken_away_is_not_put_back(place: str) -> None:
    with storage.lock(f"{place}/run.lock") as lease:
        storage.remove(f"{place}/run.lock.00000001")
        with pytest.raises(storage.NotFound):
            lease._renew()
        assert storage.list_directory(place) == []


def test_a_renewal_whose_answer_is_lost_is_no_loss_of_the_lease(place: str, proxy: Proxy, soon: None) -> None:
    with storage.lock(f"{place}/run.lock") as lease:
        proxy.reset(first(9, LOSE, "PUT"))
        lease._record["beat"] = 1
        with pytest.raises(storage.NotWritable):
            lease._renew()
        proxy.reset()
        assert not lease._renew()
        assert lease._renew()
        lease.check(now=True)


def test_a_writer_that_was_held_up_does_not_undo_a_cut(place: str) -> None:
    uri = f"{place}/metrics.jsonl"
    late = storage.Journal(uri)
    for step in range(3):
        late.append({"step": step}, sync=True)
    storage.Journal(uri).cut(lambda entry: entry["step"] < 2)
    with pytest.raises(storage.NotWritable, match="changed by another process"):
        late.append({"step": 3}, sync=True)
    assert [entry["step"] for entry in storage.Journal(uri)] == [0, 1]


def test_a_journal_goes_on_after_answers_that_were_lost(place: str, proxy: Proxy, soon: None) -> None:
    journal = storage.Journal(f"{place}/metrics.jsonl")
    journal.append({"step": 0}, sync=True)
    proxy.reset(first(9, LOSE, "PUT"))
    with pytest.raises(storage.NotWritable):
        journal.append({"step": 1}, sync=True)
    proxy.reset()
    journal.append({"step": 2}, sync=True)
    assert [entry["step"] for entry in storage.Journal(journal.uri)] == [0, 1, 2]
