"""The server behind ``postlude dashboard``: where it listens, what it serves, and the one task that reads runs."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from postlude.dashboard.access import Door, Place, Tokens
from postlude.dashboard.followed import LOOK_SECONDS, Following
from postlude.dashboard.memory import spare
from postlude.errors import UserError

CONNECT_SECONDS = 30.0
"""A browser that asked for a page has so long to open its socket; before, nothing of a run is read for it."""


def serve(
    folder: str,
    host: str,
    port: int,
    *,
    proxy: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
    opened: Callable[[Place, Tokens], None],
) -> None:
    """Serve the page of the runs in a folder until the process is asked to stop. ``opened`` is called once it listens.

    UserError if NiceGUI is not installed, the folder is not there, or it cannot listen there or may not.
    """
    try:
        import nicegui  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("The page needs NiceGUI. Install it with: pip install 'postlude[dashboard]'.") from error
    if (certificate is None) != (key is None):
        raise UserError("A certificate needs its key, and a key its certificate: give --tls-cert and --tls-key.")
    if certificate and key:
        _check_certificate(certificate, key)
    spare()
    following = Following(folder)
    following.overview.names()  # tells now of a folder that is not there
    Place.check(host, port, certificate is not None, proxy)
    listening = _listen(host, port)
    place = Place.check(host, listening.getsockname()[1], certificate is not None, proxy)
    tokens = Tokens.make()
    opened(place, tokens)
    with suppress(KeyboardInterrupt):
        _run(following, listening, place, tokens, certificate, key)


def _run(
    following: Following,
    listening: socket.socket,
    place: Place,
    tokens: Tokens,
    certificate: str | None,
    key: str | None,
) -> None:
    import uvicorn
    from fastapi import FastAPI
    from nicegui import app, ui

    from postlude.dashboard.page import build

    @ui.page("/")
    async def page() -> None:
        await build(following)

    async def follow() -> None:
        await asyncio.to_thread(following.update)

    app.timer(LOOK_SECONDS, follow)
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(outer, title="Postlude", dark=None, reconnect_timeout=10.0, show_welcome_message=False)
    config = uvicorn.Config(
        Door(outer, tokens, place),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"There is no address '{host}' on this machine: {error.strerror or error}.") from error
    listening = socket.socket(family, kind)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise UserError(
            f"The page cannot listen on {host}:{port}: {error.strerror}. Choose another port with --port; 0 takes one "
            "that is free."
        ) from error
    return listening


def _check_certificate(certificate: str, key: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"'{certificate}' and '{key}' are no certificate with its key: {error}.") from error
