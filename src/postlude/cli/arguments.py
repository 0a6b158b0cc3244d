"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

ManifestPath = Annotated[str, typer.Argument(metavar="MANIFEST", help="The manifest: a path or a URI.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values in place of the manifest's: sft.optimizer.lr=1e-4, defaults.batch.block=512, seed=3.",
        show_default=False,
    ),
]
StageName = Annotated[str | None, typer.Option("--stage", help="One stage instead of all.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory: a path or a URI.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub name, a path, or RUN/STAGE.")]
