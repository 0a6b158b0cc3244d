"""Commands that show runs in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from postlude.cli.arguments import AsJson, RunPath
from postlude.cli.output import announce, show_address
from postlude.cli.storage import with_storage

_PEM = "A file in PEM."


@with_storage
def dashboard(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A folder of runs, or a run.")] = "runs",
    host: Annotated[str, typer.Option(help="Where it listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8080,
    behind_proxy: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="What browsers open, where a proxy encrypts.", show_default=False),
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(metavar="FILE", help=_PEM, show_default=False)] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help=_PEM, show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a live page of the runs in a folder.

    It prints two addresses, each with a token: one that may amend runs, and
    one that only looks.
    """
    from postlude.dashboard.server import serve

    serve(
        directory,
        host,
        port,
        proxy=behind_proxy,
        certificate=tls_cert,
        key=tls_key,
        opened=lambda place, tokens: show_address(place.address, tokens.amend, tokens.read, as_json),
    )


@with_storage
def report(
    run: RunPath,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE.html", help="Where to write it.")],
) -> None:
    """Write the page of a run as one file, which opens without a network."""
    from postlude.dashboard.report import write_report

    announce(write_report(run, output))
