"""Trying what a manifest needs of AWS, with the credentials that a run would have: what must work, and what must be
refused. It leaves nothing behind where it may remove what it has made."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from postlude.errors import ComputeError
from postlude.manifest.load import Resolved
from postlude.storage import StorageError, credentials, policies
from postlude.storage.keys import service_of
from postlude.storage.rules import Rule, current
from postlude.telemetry.screen import Listing
from postlude.workflow.access import Need, needs_of

PART_BYTES = 5 * 2**20
"""The least that S3 takes for a part that is not the last."""
SHORT_SECONDS = 1800
"""Sessions of less are warned about."""
_CODES = {
    "403 of S3": ("AllAccessDisabled",),
    "404": ("NoSuchBucket", "NoSuchKey", "404"),
    "wrong region": (
        *("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
        *("TemporaryRedirect", "301", "307"),
    ),
    "expired credentials": ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"),
    "skewed clock": ("RequestTimeTooSkewed",),
    "unknown credentials": ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidClientTokenId", "InvalidToken"),
}


@dataclass(frozen=True)
class Trial:
    """What was tried, and how it ended."""

    place: str
    what: str
    verdict: Literal["good", "WRONG", "warned"]
    why: str = ""


@dataclass(frozen=True)
class Probed:
    """All that was tried."""

    trials: list[Trial]

    @property
    def exit_code(self) -> int:
        return 4 if any(trial.verdict == "WRONG" for trial in self.trials) else 0

    def require(self) -> None:
        """ComputeError if something is wrong."""
        if wrong := [f"  {each.place}: {each.what}: {each.why}" for each in self.trials if each.verdict == "WRONG"]:
            raise ComputeError("\n".join(["What the run needs of its storage is refused:", *wrong]))

    def to_json(self) -> dict[str, Any]:
        return {"good": not self.exit_code, "trials": [vars(trial) for trial in self.trials]}

    def render(self) -> Listing:
        listing = Listing("access", {"place": "text", "what": "text", "is": "whole", "why": "text"})
        for trial in self.trials:
            style = {"good": None, "WRONG": "red", "warned": "yellow"}[trial.verdict]
            listing.add_row(trial.place, trial.what, trial.verdict, trial.why, style=style)
        return listing


def probe(resolved: Resolved) -> Probed:
    """Try what a manifest needs. Nothing is raised for what is refused: it is in what comes back."""
    trials = [trial for need in needs_of(resolved) for trial in _of_place(need)]
    keys = {rule.encrypt.key: rule for rule in current() if rule.encrypt}
    return Probed([*trials, *(trial for rule in keys.values() for trial in _of_key(rule, resolved.manifest.name))])


def _of_place(need: Need) -> Iterator[Trial]:
    if len(_refusals()) == 1:
        yield Trial(need.uri, "reach it", "WRONG", "it needs a package: pip install 'postlude[s3]'")
        return
    if need.rule.role is not None:
        yield _try(need.uri, "assume its role", lambda: credentials.assume(need.rule))
        if 0 < (need.rule.role_seconds or 0) < SHORT_SECONDS:
            why = f"sessions of {need.rule.role_seconds} seconds are renewed often, by each process; give them 3600"
            yield Trial(need.uri, "length of sessions", "warned", why)
    place = _Place(need)
    if need.writes:
        yield from place.writing()
    else:
        yield from place.reading()


class _Place:
    """A folder with a client that has the credentials of its rule."""

    def __init__(self, need: Need) -> None:
        self.need, self._clients = need, dict[Rule, Any]()
        self.bucket, _, folder = need.uri.partition("://")[2].partition("/")
        self.folder = f"{folder}/" if folder else ""
        self.key = f"{self.folder}.postlude-probe-{secrets.token_hex(8)}"

    def reading(self) -> Iterator[Trial]:
        yield self.attempt("list", policies.LIST, self._list)
        yield self.attempt("read", policies.READ, lambda: self._read(self._first()))
        if self.need.rule.role or self.need.rule.read_only:
            yield self._denied()

    def writing(self) -> Iterator[Trial]:
        put = self._call
        yield self.attempt("list", policies.LIST, self._list)
        made = self.attempt("create only", policies.WRITE, lambda: put("put_object", Body=b"1", IfNoneMatch="*"))
        yield made
        yield self.attempt("read", policies.READ, lambda: self._read(self.key if made.verdict == "good" else None))
        if made.verdict == "good":
            yield self._refused("create over it", lambda: put("put_object", Body=b"2", IfNoneMatch="*"))
            yield self._refused("replace another", lambda: put("put_object", Body=b"3", IfMatch='"0"'))
            yield self.attempt("abort an upload", policies.PARTS, self._abort)
        yield self.attempt("upload two parts", policies.WRITE, self._upload)
        yield self.attempt("list uploads", policies.UPLOADS, self._uploads)
        removed = self.attempt("remove", policies.REMOVE, lambda: put("delete_object"))
        left = f" '{self.key}' was left there." if removed.verdict != "good" and made.verdict == "good" else ""
        yield Trial(removed.place, removed.what, removed.verdict, removed.why + left)

    def attempt(self, what: str, actions: tuple[str, ...], call: Callable[[], Any]) -> Trial:
        return _try(self.need.uri, what, call, actions)

    def client(self, rule: Rule) -> Any:
        from botocore.config import Config

        if rule in self._clients:
            return self._clients[rule]

        config = {"request_checksum_calculation": rule.checksums} if rule.checksums else {}
        limits = Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 2}, **config)
        client = self._clients[rule] = credentials.client("s3", rule, endpoint_url=rule.endpoint, config=limits)
        return client

    def _call(self, what: str, **arguments: Any) -> Any:
        return getattr(self.client(self.need.rule), what)(Bucket=self.bucket, Key=self.key, **arguments)

    def _list(self) -> Any:
        return self.client(self.need.rule).list_objects_v2(Bucket=self.bucket, Prefix=self.folder, MaxKeys=10)

    def _first(self) -> str | None:
        with suppress(*_refusals()):  # which the attempt before has told
            return next((each["Key"] for each in self._list().get("Contents", ()) if each["Size"]), None)
        return None

    def _read(self, key: str | None) -> None:
        """Read a byte of an object. Where none is known: one that is not there, which only who may read is told."""
        from botocore.exceptions import ClientError

        client = self.client(self.need.rule)
        try:
            client.get_object(Bucket=self.bucket, Key=key or self.key, Range="bytes=0-0")["Body"].read()
        except ClientError as error:
            if key is not None or error.response["Error"]["Code"] != "NoSuchKey":
                raise

    def _upload(self) -> None:
        upload = self._call("create_multipart_upload")["UploadId"]
        try:
            parts = []
            for number, size in enumerate((PART_BYTES, 1), 1):
                answer = self._call("upload_part", UploadId=upload, PartNumber=number, Body=bytes(size))
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            self._call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
        except Exception:
            with suppress(Exception):  # what stopped it is told
                self._call("abort_multipart_upload", UploadId=upload)
            raise

    def _uploads(self) -> Any:
        return self.client(self.need.rule).list_multipart_uploads(Bucket=self.bucket, Prefix=self.folder)

    def _abort(self) -> None:
        upload = self._call("create_multipart_upload")["UploadId"]
        try:
            self._call("list_parts", UploadId=upload)
        finally:
            self._call("abort_multipart_upload", UploadId=upload)

    def _refused(self, what: str, call: Callable[[], Any]) -> Trial:
        """A condition that does not hold, with which the store must not write."""
        try:
            call()
        except _refusals() as error:
            if kind_of(error) in ("PreconditionFailed", "412"):
                return Trial(self.need.uri, f"{what}: is refused", "good")
            return Trial(self.need.uri, f"{what}: is refused", "WRONG", explain(error, policies.WRITE))
        why = "the store heeds no conditions: two processes could write a run at once. Choose one that does"
        return Trial(self.need.uri, f"{what}: is refused", "WRONG", why)

    def _denied(self) -> Trial:
        """A write that the credentials must not be able to make: asked of the role itself, since its session is
        narrowed anyway."""
        what, rule = "write: is denied", self.need.rule.model_copy(update={"read_only": False})
        try:
            self.client(rule).put_object(Bucket=self.bucket, Key=self.key, Body=b"1")
        except _refusals() as error:
            denied = kind_of(error) in ("403 of S3", "403 of KMS")
            return Trial(self.need.uri, what, "good" if denied else "WRONG", "" if denied else explain(error))
        left = f" '{self.key}' was left there."
        with suppress(*_refusals()):
            self.client(rule).delete_object(Bucket=self.bucket, Key=self.key)
            left = ""
        why = f"{self.need.who} may write what is only read: take {policies.WRITE[0]} from it.{left}"
        return Trial(self.need.uri, what, "warned", why)


def _of_key(rule: Rule, run: str) -> Iterator[Trial]:
    assert rule.encrypt is not None
    key, context, held = rule.encrypt.key, {"run": run, "stage": "probe"}, []
    made = _try(key, "make a data key", lambda: held.append(service_of(key).generate(context, rule)), policies.ENCRYPT)
    yield made
    if made.verdict != "good":
        return
    secret, wrapped = held[0]
    yield _try(
        key, "unwrap it", lambda: _same(service_of(key).unwrap(wrapped, context, rule), secret), policies.DECRYPT
    )
    try:
        service_of(key).unwrap(wrapped, {**context, "run": f"{run}-other"}, rule)
    except StorageError:
        yield Trial(key, "unwrap it for another run: is refused", "good")
    else:
        why = "it unwraps a data key for whatever run: use a service that heeds the context"
        yield Trial(key, "unwrap it for another run: is refused", "WRONG", why)


def _same(one: bytes, other: bytes) -> None:
    if one != other:
        raise StorageError("What comes back is another key. Use another service of keys.")


def _refusals() -> tuple[type[Exception], ...]:
    """What is raised where something is refused."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return (StorageError,)
    return StorageError, BotoCoreError, ClientError


def _try(place: str, what: str, call: Callable[[], Any], actions: tuple[str, ...] = ()) -> Trial:
    try:
        call()
    except _refusals() as error:
        return Trial(place, what, "WRONG", explain(error, actions))
    return Trial(place, what, "good")


# --- what is wrong --------------------------------------------------------------------------------------------


def kind_of(error: BaseException) -> str:
    """What of all that a store refuses for it is, in the words of :data:`_CODES`; its own where there is none."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "response"):
        cause = cause.__cause__
    if cause is None:
        return type(error.__cause__ or error).__name__
    said = cause.response.get("Error", {})
    code, message = str(said.get("Code", "")), str(said.get("Message", ""))
    operation = getattr(cause, "operation_name", "")
    if "Signature" in code and ("expired" in message.lower() or "not yet current" in message.lower()):
        return "skewed clock"
    if code.startswith(("AccessDenied", "403")):
        of_kms = "kms:" in message or operation in _OF_KMS
        return "403 of STS" if operation == "AssumeRole" else "403 of KMS" if of_kms else "403 of S3"
    if code.startswith("KMS."):
        return "403 of KMS"
    return next((kind for kind, codes in _CODES.items() if code in codes), code)


_OF_KMS = ("GenerateDataKey", "Decrypt", "Encrypt")


def explain(error: BaseException, actions: tuple[str, ...] = ()) -> str:
    """What is wrong and what to do; of a permission, which statement of the policy is missing."""
    kind = kind_of(error)
    said = str(error) if isinstance(error, StorageError) else f"{error}".rpartition("operation: ")[2]
    region = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    remedies = {
        "403 of S3": f"the statement {policies.name_of(actions)} is missing ({', '.join(actions)})",
        "403 of KMS": f"the statement {policies.name_of(actions)} is missing ({', '.join(actions)}), in the role's "
        "policy or the key's",
        "404": "check the name of the bucket, and the folder",
        "wrong region": f"give its rule the region {region.get('x-amz-bucket-region', 'of the bucket')}",
        "expired credentials": "log in anew, or name a role, whose sessions renew themselves",
        "skewed clock": "set the clock of this machine",
        "unknown credentials": "check the profile, or the variables that they come from",
    }
    remedy = remedies.get(kind, "")
    return f"{kind}: {remedy}{': ' if remedy else ''}{said}"
