"""The command ``postlude``: its commands gathered, and what becomes of an error."""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType
from typing import NoReturn

import typer

from postlude.cli import keys, manifests, models, pages, runs
from postlude.cli.output import tell
from postlude.errors import UserError
from postlude.telemetry import openmp
from postlude.telemetry.guard import guarded, shown

app = typer.Typer(
    name="postlude",
    help="Post-training for large language models: one manifest, from supervised fine-tuning to reinforcement "
    "learning, on a laptop or a GPU cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    manifests.init,
    manifests.validate,
    manifests.preview,
    runs.run,
    runs.logs,
    runs.stop,
    runs.status,
    runs.runs,
    pages.dashboard,
    pages.report,
    models.generate,
    models.export,
    models.verify,
    runs.amend,
    runs.checkpoint,
    runs.acknowledge,
    manifests.recipes,
    manifests.explain,
    manifests.flow,
    manifests.access,
    manifests.certificates,
    manifests.schema,
):
    app.command()(guarded(command))
app.add_typer(keys.app, name="keys")


def main() -> NoReturn:
    """Run the command line and exit.

    0 done, 1 failed, 2 manifest or usage wrong, 3 data wrong, 4 compute wrong, 130 interrupted after a checkpoint.
    What the user can mend is told in a paragraph on standard error; any other exception keeps its traceback.
    """
    code: int | str | None
    openmp.wait_shortly()
    sys.excepthook = _tell_fault
    try:
        try:
            app(prog_name="postlude")
            code = 0
        except UserError as error:
            tell(error, as_json="--json" in sys.argv)
            code = error.exit_code
        except OSError as error:
            from postlude.storage import explain

            explained = explain(error)
            if explained is None:
                raise
            tell(explained, as_json="--json" in sys.argv)
            code = explained.exit_code
        except SystemExit as done:
            code = done.code
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has left. The interpreter's own flush on exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _tell_fault(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """What Python itself does with an exception that nobody handles, without what does not belong on a terminal."""
    sys.stderr.write(shown("".join(traceback.format_exception(kind, fault, trace))))
