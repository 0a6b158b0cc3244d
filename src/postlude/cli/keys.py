"""``postlude keys``: master keys, and what they encrypt."""

from __future__ import annotations

from typing import Annotated

import typer

from postlude.cli.arguments import AsJson
from postlude.cli.output import announce, show, show_json
from postlude.cli.storage import with_storage
from postlude.telemetry.guard import guarded

Place = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or any other folder: a path or a URI.")]

app = typer.Typer(no_args_is_help=True, help="Make a master key, wrap data keys anew, tell what is encrypted.")


def new(file: Annotated[str, typer.Argument(metavar="FILE", help="Where to write it.")]) -> None:
    """Make a master key: 256 random bits in a file that only you can read."""
    from postlude.storage.keys import new_key_file

    new_key_file(file)
    typer.echo(f"Wrote {file}")
    announce(
        f"Next: name it in the manifest, storage: {{'runs/': {{encrypt: {{key: 'file:{file}'}}}}}}, and keep a copy "
        "elsewhere: without it, what it encrypts is lost."
    )


@with_storage
def rewrap(
    run: Place,
    to: Annotated[str, typer.Option("--to", metavar="KEY", help="The new master key, as a manifest names it.")],
    old: Annotated[
        str | None,
        typer.Option("--from", metavar="KEY", help="The master key until now, where neither rule nor record names it."),
    ] = None,
) -> None:
    """Wrap the data keys of a run with another master key. No data is read or written."""
    from postlude.storage.rewrap import rewrap as rewrap_below

    count = rewrap_below(run, to, old)
    announce(f"{count} data keys below '{run}' are wrapped by '{to}'. Name it in the manifest before the next run.")


@with_storage
def show_keys(run: Place, as_json: AsJson = False) -> None:
    """Tell what of a run is encrypted, and with which master key."""
    from postlude.storage.rewrap import records_below

    records = records_below(run)
    if as_json:
        show_json({folder: {"key": record.key, **record.context} for folder, record in records.items()})
        return
    for folder, record in records.items():
        show(f"{folder}: {record.key}")
    if not records:
        announce("Nothing is encrypted there.")


for name, command in (("new", new), ("rewrap", rewrap), ("show", show_keys)):
    app.command(name)(guarded(command))
