"""A run whose data and run directory are on an object store, each with a role of its own, under enforced policies."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from postlude import storage
from postlude.storage import files
from roles import Account

_ALWAYS_RENEWED = '''
"""Sessions of roles are renewed after two seconds, and every secret of theirs is written down for the test."""

from pathlib import Path

from postlude.storage import credentials

credentials.RENEWED_BEFORE = 1 - 2 / 900
_assume = credentials.assume


def assume(rule):
    given = _assume(rule)
    with open(Path(__file__).with_suffix(".secrets"), "a") as file:
        file.write(f"{given['secret_key']}\\n{given['token']}\\n")
    return given


credentials.assume = assume
'''


@contextmanager
def watched(secrets: Callable[[], set[str]]) -> Iterator[list[str]]:
    """Where secrets are seen in the block: among arguments and variables of the processes below this one, and in what
    Ray writes down of them."""
    found: list[str] = []
    over = threading.Event()
    places: set[Path] = set()

    def watch() -> None:
        while not over.wait(0.5):
            looked_at = [Path(f"/proc/{process.pid}") for process in psutil.Process().children(recursive=True)]
            files = [folder / part for folder in looked_at for part in ("cmdline", "environ")]
            files += Path(tempfile.gettempdir()).glob("postlude-ray-*/r/session_*/logs/*.*")
            for file in files:
                with suppress(OSError):
                    content = file.read_text(errors="replace")
                    places.add(file)
                    found.extend(str(file) for secret in secrets() if secret in content)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
    assert {"cmdline", "environ"} < {place.name for place in places}
    assert any("logs" in place.parts for place in places)


@pytest.fixture
def on_roles(project: Any, account: Account, bucket: str) -> Any:
    """A project whose data and runs are in a bucket, the latter encrypted, with roles that may do what ``access``
    prints and nothing else."""
    data, runs, key = f"s3://{bucket}/data", f"s3://{bucket}/runs", f"alias/{bucket}"
    kms = account.store.client("kms")
    kms.create_alias(AliasName=key, TargetKeyId=kms.create_key()["KeyMetadata"]["KeyId"])
    account.store.client().put_object(Bucket=bucket, Key="data/chats.jsonl", Body=project.chats.read_bytes())
    project.data["source"] = {"path": f"{data}/chats.jsonl"}
    project.manifest["run_dir"] = runs
    project.manifest["storage"] = {
        f"{data}/": {"role": account.role("reader"), "read_only": True, "role_seconds": 900},
        f"{runs}/": {"role": account.role("trainer"), "role_seconds": 900, "encrypt": {"key": key}},
    }
    printed = project("access", "MANIFEST").json
    for name, part in (("reader", "data"), ("trainer", "run")):
        account.role(name, printed[part][account.role(name)])
    return project


@pytest.mark.capability("Sessions of roles are renewed in every process of a run; no step is lost and no secret left")
@pytest.mark.long
def test_sessions_that_end_all_the_time_lose_no_step_and_leave_no_secret(
    on_roles: Any, account: Account, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").mkdir()
    plain = type(on_roles)(tmp_path / "plain")
    assert plain("run", "MANIFEST").exit_code == 0
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "always_renewed.py").write_text(_ALWAYS_RENEWED)
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setattr("postlude.storage.credentials.RENEWED_BEFORE", 0.25)
    monkeypatch.setattr("postlude.storage.credentials.assume", sys.modules["postlude.storage.credentials"].assume)
    on_roles.manifest |= {
        "plugins": ["always_renewed"],
        "compute": {"pools": {"train": {"workers": 1}}},
        "sinks": [{"name": "lines", "path": str(tmp_path / "told.txt")}],
    }
    written = modules / "always_renewed.secrets"

    def secrets() -> set[str]:
        return {account.key["SecretAccessKey"], *(written.read_text().split() if written.exists() else ())}

    with account.enforced(), watched(secrets) as found:
        done = on_roles("run", "MANIFEST")
        assert done.exit_code == 0, done.err
        assert on_roles.lines() == plain.lines()
        storage.verify(on_roles.sft.artifact)
        below = files.files_below(on_roles.run.uri)
        kept = [storage.read_bytes(storage.join(on_roles.run.uri, name)) for name in below]  # as clear text
    assert (tmp_path / "told.txt").read_text().splitlines() == [f"sft {step}" for step in range(1, 5)]
    assert len(secrets()) > 10, "so often was a role assumed anew"
    assert found == []
    client = account.store.client()
    kept += [client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in account.store.keys(bucket)]
    beside = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in ("", ".secrets")]
    kept += [path.read_bytes() for path in beside if path.name != "user-credentials"]
    said = b"".join(kept) + (done.out + done.err).encode()
    assert on_roles.manifest["run_dir"].encode() in said, "the search finds what is there"
    assert [secret for secret in secrets() if secret.encode() in said] == []
