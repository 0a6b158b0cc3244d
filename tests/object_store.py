"""An object store for tests: S3, KMS and STS as moto has them, in a process of its own, which ends with the tests.

A child process finds the credentials as a user's would: in the files that ``AWS_CONFIG_FILE`` and
``AWS_SHARED_CREDENTIALS_FILE`` name.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from store_proxy import Proxy, proxy_before

REGION = "us-east-1"
KEY, SECRET = "AKIAPOSTLUDETESTS000", "the-secret-of-the-tests"

_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class ObjectStore:
    """A server of S3, KMS and STS."""

    endpoint: str

    def client(self, service: str = "s3", **options: Any) -> Any:
        """A client of boto3's, apart from the code that is tested."""
        import boto3

        account = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": REGION}
        return boto3.client(service, **{"endpoint_url": self.endpoint, **account, **options})

    def keys(self, bucket: str) -> list[str]:
        """The keys of all objects in a bucket."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def uploads(self, bucket: str) -> list[str]:
        """The keys of the uploads in parts that nobody has completed."""
        return [upload["Key"] for upload in self.client().list_multipart_uploads(Bucket=bucket).get("Uploads", ())]


@pytest.fixture(scope="session")
def object_store_server() -> Iterator[ObjectStore]:
    pytest.importorskip("moto", reason="no stand-in for object stores: install 'moto[server]'")
    command, pipe = [sys.executable, "-c", _SERVE], subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    assert port, "the stand-in for object stores does not start"
    yield ObjectStore(f"http://127.0.0.1:{port}")
    server.communicate("")


def write_profiles(folder: Path, endpoint: str) -> dict[str, str]:
    """A user's two files of AWS, and the environment that names them."""
    config, credentials = folder / "aws-config", folder / "aws-credentials"
    config.write_text(f"[default]\nregion = {REGION}\nendpoint_url = {endpoint}\n")
    credentials.write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    return {"AWS_CONFIG_FILE": str(config), "AWS_SHARED_CREDENTIALS_FILE": str(credentials)}


@pytest.fixture
def object_store(
    object_store_server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    """The server, which this process and its children find without being told where it is."""
    from postlude.storage import files

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in write_profiles(tmp_path, object_store_server.endpoint).items():
        monkeypatch.setenv(name, value)
    files._filesystem.cache_clear()
    yield object_store_server
    files._filesystem.cache_clear()


@pytest.fixture
def proxy(object_store: ObjectStore) -> Iterator[Proxy]:
    """What stands before the server from now on, for this process and its children."""
    from postlude.storage import files

    config = Path(os.environ["AWS_CONFIG_FILE"])
    with proxy_before(object_store.endpoint) as before:
        config.write_text(config.read_text().replace(object_store.endpoint, before.endpoint))
        files._filesystem.cache_clear()
        yield before


@pytest.fixture
def bucket(object_store: ObjectStore) -> str:
    """The name of a bucket that is empty."""
    name = f"test-{uuid.uuid4().hex}"
    object_store.client().create_bucket(Bucket=name)
    return name
