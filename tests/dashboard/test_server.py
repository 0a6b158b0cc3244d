"""Where the server cannot or may not listen it says so, and nothing has begun."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from postlude.dashboard.server import serve
from postlude.errors import UserError
from postlude.storage import NotFound


def refuse(*_: object) -> None:
    raise AssertionError("it listens")


def start(folder: Path | str, host: str = "127.0.0.1", port: int = 0, **options: Any) -> None:
    serve(str(folder), host, port, **options, opened=refuse)


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: Address already in use"):
            start(tmp_path, port=port)


def test_what_cannot_be_served_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match="There is no folder"):
        start(tmp_path / "none")
    with pytest.raises(UserError, match="--tls-cert"):
        start(tmp_path, host="0.0.0.0")
    with pytest.raises(UserError, match="needs its key"):
        start(tmp_path, certificate="x.pem")
    with pytest.raises(UserError, match="no certificate with its key"):
        start(tmp_path, certificate="x.pem", key="y.pem")
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(UserError, match=r"postlude\[dashboard\]"):
        start(tmp_path)
