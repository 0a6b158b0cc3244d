"""Commands about a manifest before anything runs."""

from __future__ import annotations

from itertools import chain
from typing import Annotated

import typer

from postlude.cli.arguments import AsJson, ManifestPath, Overrides, StageName
from postlude.cli.output import announce, show, show_json, show_report
from postlude.errors import UserError


def init(
    recipe: Annotated[str, typer.Argument(help="What to do with a model; `postlude recipes` lists them.")] = "sft",
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="The manifest's file. [default: RECIPE.yaml]")
    ] = None,
) -> None:
    """Write a commented manifest that runs as it is."""
    from postlude import storage
    from postlude.manifest.starter import starter

    path = output or f"{recipe}.yaml"
    chosen = starter(recipe, path.removesuffix(".yaml").removesuffix(".yml"))
    files = {path: chosen.text, **chosen.files}
    for taken in filter(storage.exists, files):
        raise UserError(f"'{taken}' is there already. Give another file with -o, or remove it.")
    for name, text in files.items():
        storage.write_text(name, text)
        typer.echo(f"Wrote {name}")
    announce(f"Next: postlude validate {path}, then postlude run {path}")


def validate(
    manifest: ManifestPath,
    overrides: Overrides = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Read only so many records of each data set.", show_default=False)
    ] = None,
    synthetic: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also try so many made-up records, odd ones too, with each data set's format and template.",
            show_default=False,
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also ask the cluster: nodes for the pools, and the network between them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check everything before a run, without a GPU: manifest, data, masks, memory, and one small step per stage."""
    from postlude.workflow import validate as workflow

    report = workflow.validate(manifest, overrides or [], sample=sample, synthetic=synthetic, probe=probe)
    show_report(report, as_json)
    raise typer.Exit(report.exit_code)


def preview(
    manifest: ManifestPath,
    overrides: Overrides = None,
    stage: StageName = None,
    blocks: Annotated[int, typer.Option("-n", "--blocks", min=1, help="How many packed blocks.")] = 1,
    example: Annotated[
        str | None, typer.Option(metavar="ID", help="This example alone, as losses name it.", show_default=False)
    ] = None,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a web page instead of printing.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the packed blocks as they will be trained on, each token marked as trained or not."""
    from postlude.workflow import validate as workflow

    report = workflow.preview(manifest, overrides or [], stage=stage, blocks=blocks, example=example)
    if html is not None:
        from postlude import storage

        storage.write_text(html, report.to_html(manifest))
    if as_json or html is None:
        show_report(report, as_json)


def flow(
    manifest: ManifestPath,
    overrides: Overrides = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The file to write; without it, print.", show_default=False
        ),
    ] = None,
) -> None:
    """Write the graph of stages as a Metaflow flow, whose steps run one stage each."""
    from postlude.workflow import flow as workflow

    text = workflow.flow(manifest, overrides or [], output or "flow.py")
    if output is None:
        typer.echo(text, nl=False)
        return
    from postlude import storage

    storage.write_text(output, text)
    typer.echo(f"Wrote {output}")


def certificates(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where to write them.")],
    hosts: Annotated[list[str], typer.Option("--host", metavar="IP", help="A node's IP address; as often as needed.")],
    days: Annotated[int, typer.Option(min=1, help="How long they are good for.")] = 30,
) -> None:
    """Make certificates with which the nodes of a cluster know each other, and nobody else."""
    from postlude.cluster.certificates import AUTHORITY, make_certificates

    for path in make_certificates(directory, hosts, days):
        typer.echo(f"Wrote {path}")
    announce(
        f"Next: give each node its HOST.pem and HOST.key, and {AUTHORITY}; start its Ray with RAY_USE_TLS=1, "
        "RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT. authority.key goes to nobody."
    )


def explain(
    manifest: ManifestPath,
    key: Annotated[str, typer.Argument(metavar="KEY", help="Such as sft.optimizer.lr, data.chats.format or seed.")],
    overrides: Overrides = None,
) -> None:
    """Tell a key's value, where it comes from, what it took the place of, and what it means."""
    from postlude import storage
    from postlude.manifest import explain, load
    from postlude.telemetry.screen import Fields

    resolved = load.load(storage.read_bytes(manifest), manifest, overrides or [])
    told = explain.explain(resolved, key)
    show(told.head, Fields("", told.rows), *(f"\n{paragraph}" for paragraph in told.meaning))


def access(
    manifest: ManifestPath,
    overrides: Overrides = None,
    probe: Annotated[bool, typer.Option("--probe", help="Try it, with the credentials that a run would have.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --probe: print one JSON document.")] = False,
) -> None:
    """Print the least that AWS has to allow for a manifest, as JSON; or try
    what must work and what must be refused."""
    from postlude.workflow import access as workflow
    from postlude.workflow.manifest import open_manifest

    resolved = open_manifest(manifest, overrides or [])
    if not probe:
        show_json(workflow.access(resolved))
        return
    from postlude.workflow.probe import probe as try_all

    probed = try_all(resolved)
    show_report(probed, as_json)
    raise typer.Exit(probed.exit_code)


def recipes() -> None:
    """List what a manifest can name: recipes, and every other kind of component."""
    from postlude.manifest.catalogue import catalogue
    from postlude.telemetry.screen import Listing

    listings: dict[str, Listing] = {}
    for entry in catalogue():
        listing = listings.setdefault(entry.kind, Listing(entry.kind, {"name": "whole", "what it is": "text"}))
        brought = "" if entry.package == "postlude" else f" (from {entry.package})"
        listing.add_row(entry.name, entry.summary + brought)
    show(*chain.from_iterable((listing, "") for listing in listings.values()))


def schema() -> None:
    """Print the manifest's JSON Schema, for completion in an editor."""
    from postlude.manifest import json_schema

    show_json(json_schema.schema())
