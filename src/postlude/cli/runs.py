"""Commands that run a manifest, and that look at runs or change them."""

from __future__ import annotations

from typing import Annotated

import typer

from postlude.cli.arguments import AsJson, ManifestPath, Overrides, RunPath, StageName
from postlude.cli.output import show


def run(
    manifest: ManifestPath,
    overrides: Overrides = None,
    stage: StageName = None,
    inline: Annotated[bool, typer.Option("--inline", help="Run everything in this process, for a debugger.")] = False,
) -> None:
    """Run the stages of a manifest, or go on with a run where it stopped.

    Finished stages are kept; an unfinished one continues from its last checkpoint.
    """
    from postlude.workflow import run as workflow

    raise typer.Exit(workflow.run(manifest, overrides or [], stage=stage, inline=inline))


def status(run: RunPath, as_json: AsJson = False) -> None:
    """Show the state of a run: each stage, its step, its last checkpoint, and alarms."""
    from postlude.workflow import status as workflow

    show(workflow.status(run), as_json)


def runs(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A folder of runs: a path or a URI.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder."""
    from postlude.workflow import status as workflow

    show(workflow.runs(directory), as_json)


def amend(
    run: RunPath,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage that is running or will go on.")],
    assignment: Annotated[str, typer.Argument(metavar="KEY=VALUE", help="Such as optimizer.lr=5e-6.")],
) -> None:
    """Record a change to a running stage; it holds from the next step on, also when the run is resumed."""
    from postlude.workflow import amend as workflow

    typer.echo(workflow.amend(run, stage, assignment))
