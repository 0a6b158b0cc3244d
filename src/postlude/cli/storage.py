"""The option ``--storage``, for commands that are given a run or a model and no manifest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., Any])
_OPTION = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="FILE",
        help="A manifest, lock or file whose `storage:` says what places need.",
        show_default=False,
    ),
]


def with_storage(command: Command) -> Command:
    """A command that also takes a file with rules of storage, and works by them."""

    @wraps(command)
    def work(*arguments: Any, storage: str | None = None, **options: Any) -> Any:
        if storage is not None:
            from postlude.workflow.manifest import use_places_of

            use_places_of(storage)
        return command(*arguments, **options)

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("storage", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_OPTION)
    parameters = [*signature.parameters.values(), option]
    work.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    work.__annotations__ = {each.name: each.annotation for each in parameters}
    return work  # type: ignore[return-value]
