"""Commands that run a manifest, and that look at runs or change them."""

from __future__ import annotations

from typing import Annotated

import typer

from postlude.cli.arguments import AsJson, ManifestPath, Overrides, RunPath
from postlude.cli.output import announce, show_report
from postlude.cli.storage import with_storage


def run(
    manifest: ManifestPath,
    overrides: Overrides = None,
    stage: Annotated[
        str | None, typer.Option("--stage", help="This stage and what it needs.", show_default=False)
    ] = None,
    begin: Annotated[
        str | None,
        typer.Option("--from", help="Run this stage again, and what hangs on it.", show_default=False),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(help="This stage and what it needs; with --from a stretch.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would run and why.")] = False,
    inline: Annotated[bool, typer.Option("--inline", help="Run everything in this process, for a debugger.")] = False,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for a process that holds the run.")
    ] = 0.0,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return at once; `postlude logs` and `postlude stop` reach the run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON document.")] = False,
) -> None:
    """Run the stages of a manifest, or go on with a run where it stopped.

    Finished stages are kept, unless something that they follow from has
    changed; an unfinished one continues from its last checkpoint. Stages that
    do not need each other run side by side where their pools differ.
    """
    from postlude.workflow import run as workflow

    if dry_run:
        show_report(workflow.dry_run(manifest, overrides or [], stage=stage, begin=begin, until=until), as_json)
        return
    if as_json:
        raise typer.BadParameter("it tells what would run, so it needs --dry-run", param_hint="--json")
    if detach:
        if inline:
            raise typer.BadParameter("a debugger needs the terminal that --detach leaves", param_hint="--inline")
        from postlude.workflow import detached

        chosen = {"--stage": stage, "--from": begin, "--until": until}
        options = [part for name, value in chosen.items() if value is not None for part in (name, value)]
        started, holder = detached.detach(manifest, overrides or [], options)
        announce(f"Started {started.uri} as {holder}.")
        return
    code = workflow.run(
        manifest, overrides or [], stage=stage, inline=inline, begin=begin, until=until, wait_seconds=wait
    )
    raise typer.Exit(code)


@with_storage
def logs(
    run: RunPath,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run ends.")] = False,
) -> None:
    """Show what a detached run has said."""
    from postlude.workflow import detached

    for text in detached.logs(run, follow):
        typer.echo(text, nl=False)


@with_storage
def stop(
    run: RunPath,
    now: Annotated[bool, typer.Option("--now", help="Kill it, without a checkpoint.")] = False,
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How long it may take.")] = 600.0,
) -> None:
    """Ask a run to stop with a checkpoint, and wait until it has."""
    from postlude.workflow import detached

    announce(detached.stop(run, now, wait))


@with_storage
def status(run: RunPath, as_json: AsJson = False) -> None:
    """Show the state of a run: each stage, its step, its last checkpoint, and alarms."""
    from postlude.workflow import status as workflow

    show_report(workflow.status(run), as_json)


@with_storage
def runs(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A folder of runs: a path or a URI.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder."""
    from postlude.workflow import status as workflow

    show_report(workflow.runs(directory), as_json)


@with_storage
def acknowledge(
    run: RunPath,
    alarms: Annotated[list[str] | None, typer.Argument(metavar="[ALARM]...", help="By default all.")] = None,
) -> None:
    """Say that an alarm of a run is known: it is shown no more once it is over."""
    from postlude.workflow import acknowledge as workflow

    announce(workflow.acknowledge(run, alarms or []))


@with_storage
def amend(
    run: RunPath,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage that is running or will go on.")],
    assignment: Annotated[
        str | None, typer.Argument(metavar="KEY=VALUE", help="Such as optimizer.lr=5e-6.", show_default=False)
    ] = None,
    undo: Annotated[
        int | None,
        typer.Option("--undo", metavar="NUMBER", help="Give the key of this amendment its value before."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what it would mean.")] = False,
    as_json: AsJson = False,
) -> None:
    """Record a change to a running stage; it holds from the next step on, also
    when the run is resumed. Without KEY=VALUE, tell what may be changed and
    what was."""
    from postlude.workflow import amend as workflow

    if undo is not None and assignment is not None:
        raise typer.BadParameter("it knows the value that comes back: leave KEY=VALUE out", param_hint="--undo")
    if undo is not None:
        told = workflow.preview_undo(run, stage, undo) if dry_run else workflow.undo(run, stage, undo)
    elif assignment is not None:
        told = workflow.preview(run, stage, assignment) if dry_run else workflow.amend(run, stage, assignment)
    else:
        show_report(workflow.look(run, stage), as_json)
        return
    show_report(told, as_json)


@with_storage
def checkpoint(
    run: RunPath,
    stage: Annotated[
        str | None, typer.Argument(metavar="STAGE", help="By default all that train.", show_default=False)
    ] = None,
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How long it may take.")] = 600.0,
) -> None:
    """Have a running stage save its state after the step in progress."""
    from postlude.workflow import checkpoint as workflow

    announce(workflow.checkpoint(run, stage, wait))
