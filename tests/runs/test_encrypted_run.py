"""What would write beside an encrypted run in clear is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from postlude import storage
from postlude.cluster.providers.local import Local
from postlude.errors import UserError
from postlude.runs import Run
from postlude.storage import rules
from postlude.telemetry.sinks.tensorboard import TensorBoard
from storage.conftest import new_master_key


def test_what_writes_in_clear_beside_an_encrypted_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encrypt = rules.Encryption(key=new_master_key(tmp_path))
    places = [rules.Rule(prefix="memory://encrypted", encrypt=encrypt)]
    places.append(rules.Rule(prefix=str(tmp_path / "runs"), encrypt=encrypt))
    try:
        rules.use(places)
        with pytest.raises(storage.StorageError, match="what this machine keeps of it is not"):
            _ = Run("memory://encrypted/a").cache
        rules.use([*places, rules.Rule(prefix=str(tmp_path / "cache"), encrypt=encrypt)])
        assert Run("memory://encrypted/a").cache.startswith(str(tmp_path / "cache"))
        run = Run(str(tmp_path / "runs" / "a"))
        with pytest.raises(UserError, match="a local path that is not encrypted"):
            TensorBoard().check(run.uri)
        with pytest.raises(UserError, match="Run it without --detach"):
            Local().submit(run, ["--help"])
        assert not Path(run.uri).exists()
    finally:
        rules.use(())
