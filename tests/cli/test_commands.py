"""Each command reads its arguments, calls what does the work, and shows what comes back."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from typing import Any
from unittest.mock import create_autospec

import pytest

from postlude.cli import main
from postlude.errors import ComputeError, DataError, UserError
from postlude.manifest.problem import ManifestError, Problem
from postlude.manifest.value import Origin
from postlude.workflow import models, run, validate

PLAIN_RUN = {"stage": None, "inline": False, "begin": None, "until": None, "wait_seconds": 0.0}


class Report:
    """Stands in for what a command shows."""

    exit_code = 3

    def to_json(self) -> dict[str, Any]:
        return {"text": "[not markup] ünïcode", "number": 1e-5}

    def render(self) -> str:
        return "as a table"


class Terminal:
    """Runs the command line in this process. What does the work is replaced by what takes the same arguments, for the
    tests of arguments, errors and output; ``tests/workflow/test_commands.py`` runs the commands for good."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []
        self.result: Any = 0
        self._monkeypatch, self._capsys = monkeypatch, capsys
        for module, name in ((run, "run"), (validate, "validate"), (models, "generate"), (models, "export")):
            stand_in = create_autospec(getattr(module, name), side_effect=partial(self._call, name))
            monkeypatch.setattr(module, name, stand_in)

    def _call(self, name: str, *positional: Any, **named: Any) -> Any:
        self.calls.append((name, positional, named))
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """The exit code, standard output and standard error."""
        self._monkeypatch.setattr(sys, "argv", ["postlude", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = self._capsys.readouterr()
        return int(done.value.code or 0), out, err


@pytest.fixture
def terminal(monkeypatch, capsys) -> Terminal:
    monkeypatch.setenv("COLUMNS", "200")
    return Terminal(monkeypatch, capsys)


def test_the_commands_are_those_of_the_contract(terminal):
    code, out, _ = terminal("--help")
    assert code == 0
    lines = out.partition("Commands")[2].splitlines()
    listed = [line.split()[1] for line in lines if line.startswith("│ ") and line[2] != " "]
    assert listed == (
        [
            "init",
            "validate",
            "preview",
            "run",
            "logs",
            "stop",
            "status",
            "runs",
            "dashboard",
            "report",
            "generate",
            "export",
            "verify",
            "amend",
            "checkpoint",
            "acknowledge",
            "recipes",
            "explain",
            "flow",
            "access",
            "certificates",
            "schema",
            "keys",
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ("run m.yaml", ("run", ("m.yaml", []), PLAIN_RUN)),
        (
            "run m.yaml sft.steps=3 seed=1 --stage sft --inline",
            ("run", ("m.yaml", ["sft.steps=3", "seed=1"]), {**PLAIN_RUN, "stage": "sft", "inline": True}),
        ),
        ("run --stage sft m.yaml a=-1", ("run", ("m.yaml", ["a=-1"]), {**PLAIN_RUN, "stage": "sft"})),
        (
            "run m.yaml --from a --until b --wait 3",
            ("run", ("m.yaml", []), {**PLAIN_RUN, "begin": "a", "until": "b", "wait_seconds": 3.0}),
        ),
        ("export runs/x out --merge", ("export", ("runs/x", "out"), {"merge": True})),
    ],
)
def test_arguments_reach_what_does_the_work(terminal, arguments, call):
    code, _, err = terminal(*arguments.split())
    assert (code, err) == (0, "")
    assert terminal.calls == [call]


def test_a_report_is_a_table_or_one_document_and_its_exit_code_is_the_commands(terminal):
    terminal.result = Report()
    code, out, err = terminal("validate", "m", "--json")
    assert (code, err) == (3, "")
    assert json.loads(out) == Report().to_json()
    assert terminal("validate", "m") == (3, "as a table\n", "")


@pytest.mark.parametrize("exit_code", [0, 1, 130])
def test_run_exits_as_the_run_did(terminal, exit_code):
    terminal.result = exit_code
    assert terminal("run", "m.yaml")[0] == exit_code


@pytest.mark.capability("An error that a user can cause is one clear paragraph, never a traceback")
@pytest.mark.parametrize(
    ("error", "exit_code"), [(UserError, 1), (ManifestError, 2), (DataError, 3), (ComputeError, 4)]
)
def test_what_the_user_can_mend_is_told_on_standard_error(terminal, error, exit_code):
    terminal.result = error("The file [bold]x[/bold] is wrong: " + "a long explanation " * 20)
    code, out, err = terminal("run", "m.yaml")
    assert (code, out) == (exit_code, "")
    assert err == f"Error: {terminal.result}\n"


def test_who_asks_for_json_gets_errors_as_json_too(terminal):
    problem = Problem(Origin("stage", "x.yaml", 3, 5), "stages.sft.stesp", "unknown key")
    terminal.result = ManifestError("It is wrong.", [problem])
    code, out, err = terminal("validate", "m.yaml", "--json")
    assert (code, err) == (2, "Error: It is wrong.\n")
    described = json.loads(out)["error"]
    assert (described["kind"], described["message"]) == ("ManifestError", "It is wrong.")
    assert described["problems"] == [problem.to_json()]
    assert (described["problems"][0]["line"], described["problems"][0]["key"]) == (3, "stages.sft.stesp")


def test_an_interrupt_exits_130_without_a_traceback(terminal):
    terminal.result = KeyboardInterrupt()
    code, out, err = terminal("run", "m.yaml")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_a_fault_of_ours_keeps_its_traceback(terminal, monkeypatch):
    terminal.result = RuntimeError("a defect")
    monkeypatch.setattr(sys, "argv", ["postlude", "run", "m.yaml"])
    with pytest.raises(RuntimeError, match="a defect"):
        main()


@pytest.mark.parametrize(
    "arguments", ["run", "nothing", "run m.yaml --no-such", "validate m --sample 0", "export x", "run m --json"]
)
def test_wrong_usage_exits_2_and_says_how(terminal, arguments):
    code, out, err = terminal(*arguments.split())
    assert (code, out) == (2, "")
    assert "Usage: postlude" in err
    assert terminal.calls == []


# --- talking ------------------------------------------------------------------------------------------------


def test_an_answer_is_printed_as_it_comes(terminal):
    terminal.result = iter(["[b]one", " two", "\nthree"])
    code, out, _ = terminal(
        "generate", "m", "--prompt", "hi", "--max-tokens", "9", "--temperature", "0.5", "--seed", "3"
    )
    assert (code, out) == (0, "[b]one two\nthree\n")
    assert terminal.calls == [("generate", ("m", "hi"), {"max_tokens": 9, "temperature": 0.5, "seed": 3})]


def test_without_a_terminal_the_prompt_is_what_is_piped_in(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    terminal.result = iter(["answer"])
    assert terminal("generate", "m")[1] == "answer\n"
    assert terminal.calls[0][1] == ("m", "from a pipe")


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_is_a_conversation_that_an_empty_line_begins_anew(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Keyboard("first\nsecond\n\nthird\n"))
    terminal.result = ["[well", "]"]
    code, out, _ = terminal("generate", "m")
    assert code == 0
    assert out.count("[well]") == 3
    asked = [[message["content"] for message in positional[1]] for _, positional, _ in terminal.calls]
    assert asked == [["first"], ["first", "[well]", "second"], ["third"]]
