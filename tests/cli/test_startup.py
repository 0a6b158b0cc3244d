"""The command line answers before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "duckdb", "ray", "pandas")
LIST_MODULES = "import sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has imported after running the code."""
    program = f"import atexit\natexit.register(lambda: exec({LIST_MODULES!r}))\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.capability("postlude --help answers at once, without importing torch")
@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["run", "--help"], ["validate", "--help"], ["generate", "--help"]]
)
def test_help_imports_neither_the_libraries_nor_the_schema(arguments):
    imported = modules_after(
        f"import sys\nsys.argv = ['postlude', *{arguments!r}]\nfrom postlude.cli import main\nmain()"
    )
    assert "typer" in imported
    assert not imported & {*HEAVY, "ruamel"}
    if len(arguments) < 2:  # typer itself reads a command's arguments with pydantic
        assert "pydantic" not in imported


def test_a_manifest_is_loaded_explained_and_locked_without_the_libraries():
    imported = modules_after(
        "from postlude.manifest import load, explain, lock, json_schema, catalogue\n"
        "from postlude.manifest.starter import starter\n"
        "resolved = load.load(starter('sft', 'x').text, 'x.yaml', ['sft.steps=3'])\n"
        "explain.explain(resolved, 'sft.steps'); lock.dump_lock(lock.lock(resolved))\n"
        "list(catalogue.catalogue()); json_schema.schema()\n"
    )
    assert "pydantic" in imported
    assert not imported & set(HEAVY)


def test_what_controls_the_workers_of_a_run_imports_neither_torch_nor_transformers():
    code = "import postlude.workflow.run, postlude.cluster.supervisor, postlude.cluster.keeper"
    assert not modules_after(code) & {"torch", "transformers", "datasets"}


# An error as JSON is less than a buffer, and reaches the pipe only at the end.
FAILS = """
import sys
from postlude.cli import app
from postlude.errors import UserError

def fails(json: bool = False) -> None:
    raise UserError("it went wrong")

app.app.command()(fails)
sys.argv = ["postlude", "fails", "--json"]
app.main()
"""


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["-m", "postlude", "schema"], b""),
        (["-m", "postlude", "recipes"], b""),
        (["-c", FAILS], b"Error: it went wrong\n"),
    ],
)
def test_a_reader_that_leaves_is_no_complaint(monkeypatch, command, told):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, complaint = process.communicate()
    assert complaint == told
    assert process.returncode == 1
