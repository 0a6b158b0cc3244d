"""Commands about the models that runs leave behind, and about any other model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import typer

from postlude.cli.arguments import AsJson, Model
from postlude.cli.output import say_answer, show_report
from postlude.cli.storage import with_storage


@with_storage
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="What to answer; without it, talk.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="What sampling follows from.")] = 0,
) -> None:
    """Talk to a model: an artifact, a checkpoint or a model directory."""
    from postlude.workflow import models

    def answer(messages: str | Sequence[dict[str, str]]) -> Iterator[str]:
        return models.generate(model, messages, max_tokens=max_tokens, temperature=temperature, seed=seed)

    if prompt is None and sys.stdin.isatty():
        converse(answer)
        return
    for piece in answer(sys.stdin.read().removesuffix("\n") if prompt is None else prompt):
        say_answer(piece)
    say_answer("\n")


def converse(answer: Callable[[Sequence[dict[str, str]]], Iterator[str]]) -> None:
    """Read a line, print the answer as it comes, and so on until the end of input. An empty line forgets all."""
    from postlude.telemetry.screen import open_console

    console = open_console()
    console.print("Type a message; an empty line starts anew, Ctrl-D ends.", style="dim")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = console.input("[bold]> [/bold]")
        except EOFError:
            console.print()
            return
        if not line.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        reply = ""
        for piece in answer(list(messages)):
            reply += piece
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
        messages.append({"role": "assistant", "content": reply})


@with_storage
def export(
    artifact: Annotated[str, typer.Argument(metavar="RUN[/STAGE]", help="A run, or one of its stages.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base model.")] = False,
) -> None:
    """Write a stage's model as a Hugging Face directory, or its adapter as PEFT has it."""
    from postlude.storage import is_encrypted
    from postlude.workflow import models

    models.export(artifact, output, merge=merge)
    in_clear = is_encrypted(artifact) and not is_encrypted(output)
    typer.echo(f"Wrote {output}{', in clear: the artifact is encrypted, and this copy is not' * in_clear}")


@with_storage
def verify(model: Model, as_json: AsJson = False) -> None:
    """Compare packed logits with those of transformers, and what a model holds with what its source says."""
    from postlude.workflow import models

    report = models.verify(model)
    show_report(report, as_json)
    raise typer.Exit(report.exit_code)
