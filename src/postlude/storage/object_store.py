"""S3, and what speaks it, as a file system of fsspec: s3fs, with what it leaves open closed.

- Nothing is taken from a listing or a size that was looked up before.
- What may pass (503, 409, a time-out, an endpoint that is away) is tried again, for a while, and told once; botocore's
  own tries, which nobody sees, are off. An answer that got lost does not make a conditional write of ours look like
  another's: each carries a token by which it is known again.
- A conditional write is one request at any size: s3fs drops ``If-Match`` where it sends an object in parts.
- Removing many objects fails if one of them stays.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from postlude.storage.refusals import code_of, in_words, is_passing

RETRY_SECONDS = 60.0
"""So long a store that has answered before is asked again."""
TRIES = 3
"""So often one is asked that never has."""
CALL_SECONDS = 30.0
"""What one request may take beside what it carries. The time-outs below do not hold while a store is waited for to say
that it wants what is sent (``Expect: 100-continue``)."""
SLOWEST_BYTES_PER_SECOND = 2**18
_TIMEOUTS = {"connect_timeout": 5, "read_timeout": 15}
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 8.0
_TOKEN = "postlude-write"
_LARGEST_PUT_BYTES = 5 * 2**30

_log = logging.getLogger(__name__)


class ObjectStore(S3FileSystem):
    """S3 with the credentials and the endpoint that ``options`` give."""

    cachable = False
    retries = 1

    def __init__(self, **options: Any) -> None:
        config = {**_TIMEOUTS, "retries": {"total_max_attempts": 1}, **options.pop("config_kwargs", {})}
        super().__init__(use_listings_cache=False, config_kwargs=config, **options)
        self._has_answered = False
        self._told: set[tuple[str, str]] = set()
        self._tokens: dict[str, str] = {}
        """Of uploads in parts, by their id."""

    # --- requests -------------------------------------------------------------------------------------------

    async def _call_s3(self, method: str, *given: Any, **kwargs: Any) -> Any:
        token = secrets.token_hex(8)
        if method == "create_multipart_upload" or ({"IfMatch", "IfNoneMatch"} & set(kwargs) and method == "put_object"):
            kwargs["Metadata"] = {**kwargs.get("Metadata", {}), _TOKEN: token}
        elif method == "complete_multipart_upload":
            token = self._tokens.pop(kwargs["UploadId"], token)
        own = super()._call_s3

        async def was_ours() -> Any:
            """The answer that got lost, where a try before has succeeded."""
            if method not in ("put_object", "complete_multipart_upload"):
                return None
            try:
                head = await own("head_object", Bucket=kwargs["Bucket"], Key=kwargs["Key"])
            except FileNotFoundError:
                return None
            return head if head["Metadata"].get(_TOKEN) == token else None

        async def call() -> Any:
            try:
                return await own(method, *given, **kwargs)
            except Exception as error:
                fuller = await self._reason(error, method, kwargs, own)
                if fuller is error:
                    raise
                raise fuller from fuller.__cause__

        size = memoryview(kwargs.get("Body") or b"").nbytes
        answer = await self._persist(call, kwargs.get("Bucket", ""), size, was_ours)
        if method == "create_multipart_upload":
            self._tokens[answer["UploadId"]] = token
        return answer

    call_s3 = sync_wrapper(_call_s3)

    async def _reason(self, error: Exception, method: str, kwargs: dict[str, Any], own: Any) -> Exception:
        """What is wrong in full: the answer to a HEAD has no body to say it."""
        if code_of(error) not in ("400", "403", "301"):
            return error
        try:
            if method == "head_object":
                await own("get_object", Bucket=kwargs["Bucket"], Key=kwargs["Key"], Range="bytes=0-0")
            elif method == "head_bucket":
                await own("list_objects_v2", Bucket=kwargs["Bucket"], MaxKeys=1)
        except Exception as fuller:
            return fuller if code_of(fuller) not in ("NoSuchKey", "InvalidRange") else error
        return error

    async def _persist(
        self,
        call: Callable[[], Awaitable[Any]],
        bucket: str,
        size: int | None,
        was_ours: Callable[[], Awaitable[Any]] | None = None,
    ) -> Any:
        """Call until it succeeds, fails for good, or was tried for long enough. ``size`` is what a call carries, in
        bytes, if that is known."""
        began, tries = time.monotonic(), 0
        limit = None if size is None else CALL_SECONDS + size / SLOWEST_BYTES_PER_SECOND
        while True:
            try:
                answer = await asyncio.wait_for(call(), limit)
            except Exception as error:
                tries += 1
                if code_of(error):
                    self._has_answered = True
                if not is_passing(error):
                    is_refused = code_of(error) in ("PreconditionFailed", "412", "NoSuchUpload", "404", "NoSuchKey")
                    # Of a connection that broke, aiohttp itself has tried once more, unseen.
                    if was_ours and is_refused and (answer := await was_ours()) is not None:
                        return answer
                    raise
                seconds = time.monotonic() - began
                if seconds > RETRY_SECONDS or (tries >= TRIES and not self._has_answered):
                    raise
                self._tell(bucket, error)
                pause = min(_PAUSE_SECONDS * 2 ** (tries - 1), _LONGEST_PAUSE_SECONDS)
                await asyncio.sleep(pause * random.uniform(0.7, 1.3))
            else:
                self._has_answered = True
                return answer

    def _tell(self, bucket: str, error: Exception) -> None:
        what, _ = in_words(error) or (f"{type(error).__name__}: {error}", "")
        kind = bucket, code_of(error) or type(error).__name__
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("'s3://%s': %s. Trying again, for up to %.0f seconds.", bucket, what, RETRY_SECONDS)

    # --- objects --------------------------------------------------------------------------------------------

    async def _get(self, path: str, start: int | None, end: int | None, tag: str | None = None) -> bytes:
        """An object, or what it has of a range; only the one with this tag."""
        bucket, key, _ = self.split_path(path)
        how: dict[str, Any] = {} if tag is None else {"IfMatch": tag}
        if start is not None or end is not None:
            how["Range"] = f"bytes={start or 0}-" + ("" if end is None else str(end - 1))
        own = super()._call_s3

        async def call() -> bytes:
            answer = await own("get_object", Bucket=bucket, Key=key, **how)
            try:
                return await answer["Body"].read()
            finally:
                answer["Body"].close()

        if end is not None and end <= (start or 0):
            return b""
        try:
            return await self._persist(call, bucket, None if end is None else end - (start or 0))
        except OSError as error:
            if code_of(error) in ("InvalidRange", "416"):
                return b""
            raise

    get_range = sync_wrapper(_get)

    async def _cat_file(self, path: str, version_id: Any = None, start: Any = None, end: Any = None, **_: Any) -> bytes:
        if (start or 0) < 0 or (end or 0) < 0:
            size = (await self._info(path))["size"]
            start, end = (None if at is None else max(0, size + at) if at < 0 else at for at in (start, end))
        return await self._get(path, start, end)

    async def _put(self, path: str, content: bytes, **condition: str) -> str:
        """Put an object under a condition: its tag. FileExistsError where the condition does not hold."""
        if len(content) > _LARGEST_PUT_BYTES:
            raise ValueError(f"'s3://{path}' is too large for a write under a condition: {len(content)} bytes.")
        bucket, key, _ = self.split_path(path)
        try:
            return (await self._call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition))["ETag"]
        except OSError as error:
            is_gone = "IfMatch" in condition and code_of(error) in ("NoSuchKey", "404")
            if is_gone or code_of(error) in ("PreconditionFailed", "412"):
                raise FileExistsError(f"s3://{path}") from error
            raise

    put_if = sync_wrapper(_put)

    async def _exists(self, path: str) -> bool:
        try:
            await self._info(path)
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchBucket":
                raise
            return False
        return True

    exists = sync_wrapper(_exists)

    async def _ls(self, path: str, detail: bool = False, refresh: bool = False, versions: bool = False) -> list[Any]:
        path = self._strip_protocol(path).rstrip("/")
        if "/" not in path:
            return await super()._ls(path, detail, refresh, versions)
        entries = await self._lsdir(path, refresh, versions=versions)
        if not entries:
            entries = [await self._info(path)]
            if entries[0]["type"] != "file":
                entries = []  # it has come since
        return entries if detail else sorted(entry["name"] for entry in entries)

    async def _bulk_delete(self, pathlist: list[str], **kwargs: Any) -> list[str]:
        if not pathlist:
            return []
        bucket = self.split_path(pathlist[0])[0]
        names = {"Objects": [{"Key": self.split_path(path)[1]} for path in pathlist], "Quiet": True}
        answer = await self._call_s3("delete_objects", kwargs, Bucket=bucket, Delete=names)
        for failed in answer.get("Errors", ()):
            kind = PermissionError if failed.get("Code") == "AccessDenied" else OSError
            error = kind(f"s3://{bucket}/{failed.get('Key')}: {failed.get('Code')}: {failed.get('Message')}")
            error.response = {"Error": failed}  # type: ignore[attr-defined]
            raise error
        return pathlist

    # --- uploads in parts -----------------------------------------------------------------------------------

    async def _abort_uploads(self, path: str, before: datetime) -> list[str]:
        """Abort the uploads below a folder that were begun before: the paths that they were for."""
        bucket, key, _ = self.split_path(path)
        aborted: list[str] = []
        markers: dict[str, str] = {}
        while True:
            page = await self._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/", **markers)
            for upload in page.get("Uploads", ()):
                if upload["Key"].startswith(f"{key}/") and upload["Initiated"] < before:
                    await self._abort_mpu(bucket, upload["Key"], upload["UploadId"])
                    aborted.append(f"{bucket}/{upload['Key']}")
            if not page.get("IsTruncated"):
                return aborted
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    abort_uploads = sync_wrapper(_abort_uploads)
