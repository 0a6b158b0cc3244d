"""Each command reads its arguments, calls what does the work, and shows what comes back."""

from __future__ import annotations

import io
import json
import sys
import types
from typing import Any

import pytest

import postlude.workflow
from postlude.cli import main
from postlude.errors import ComputeError, DataError, UserError
from postlude.manifest.problem import ManifestError, Problem
from postlude.manifest.value import Origin

PLAIN_RUN = {"stage": None, "inline": False, "begin": None, "until": None, "wait_seconds": 0.0}


class Outcome:
    """Stands in for whatever report a command shows."""

    def __init__(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code

    def to_json(self) -> dict[str, Any]:
        return {"text": "[not markup] ünïcode", "number": 1e-5}

    def render(self) -> str:
        return "as a table"

    def to_html(self, title: str) -> str:
        return f"<title>{title}</title>"


class Terminal:
    """Runs the command line in this process, in front of stand-ins for the workflow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []
        self.result: Any = Outcome()
        self._monkeypatch, self._capsys = monkeypatch, capsys
        for module, functions in {
            "run": ["run", "dry_run"],
            "validate": ["validate"],
            "preview": ["preview"],
            "status": ["status", "runs"],
            "amend": ["amend"],
            "models": ["generate", "export", "verify"],
        }.items():
            fake = types.ModuleType(f"postlude.workflow.{module}")
            for name in functions:
                setattr(fake, name, self._stand_in(name))
            monkeypatch.setitem(sys.modules, fake.__name__, fake)
            monkeypatch.setattr(postlude.workflow, module, fake, raising=False)

    def _stand_in(self, name: str):
        def call(*positional, **named):
            self.calls.append((name, positional, named))
            if isinstance(self.result, BaseException):
                raise self.result
            return self.result

        return call

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
    listed = [line.split()[1] for line in out.partition("Commands")[2].splitlines()[1:] if line.startswith("│")]
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
            "generate",
            "export",
            "verify",
            "amend",
            "recipes",
            "explain",
            "flow",
            "certificates",
            "schema",
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "result", "call"),
    [
        ("run m.yaml", 0, ("run", ("m.yaml", []), {**PLAIN_RUN})),
        (
            "run m.yaml sft.steps=3 seed=1 --stage sft --inline",
            0,
            ("run", ("m.yaml", ["sft.steps=3", "seed=1"]), {**PLAIN_RUN, "stage": "sft", "inline": True}),
        ),
        ("run --stage sft m.yaml a=-1", 0, ("run", ("m.yaml", ["a=-1"]), {**PLAIN_RUN, "stage": "sft"})),
        (
            "run m.yaml --from a --until b --wait 3",
            0,
            ("run", ("m.yaml", []), {**PLAIN_RUN, "begin": "a", "until": "b", "wait_seconds": 3.0}),
        ),
        (
            "run m.yaml --dry-run --from a",
            None,
            ("dry_run", ("m.yaml", []), {"stage": None, "begin": "a", "until": None}),
        ),
        ("validate m.yaml", None, ("validate", ("m.yaml", []), {"sample": None, "synthetic": None, "probe": False})),
        (
            "validate m.yaml seed=1 --sample 5 --synthetic 7 --json",
            None,
            ("validate", ("m.yaml", ["seed=1"]), {"sample": 5, "synthetic": 7, "probe": False}),
        ),
        ("preview m.yaml", None, ("preview", ("m.yaml", []), {"stage": None, "blocks": 1})),
        ("preview m.yaml a=1 --stage s -n 3", None, ("preview", ("m.yaml", ["a=1"]), {"stage": "s", "blocks": 3})),
        ("status runs/x", None, ("status", ("runs/x",), {})),
        ("runs some/dir", None, ("runs", ("some/dir",), {})),
        ("export runs/x/sft out", None, ("export", ("runs/x/sft", "out"), {"merge": False})),
        ("export runs/x out --merge", None, ("export", ("runs/x", "out"), {"merge": True})),
        ("verify some/model", None, ("verify", ("some/model",), {})),
        ("amend runs/x sft optimizer.lr=1", "done", ("amend", ("runs/x", "sft", "optimizer.lr=1"), {})),
    ],
)
def test_arguments_reach_what_does_the_work(terminal, arguments, result, call):
    terminal.result = Outcome() if result is None else result
    code, out, err = terminal(*arguments.split())
    assert (code, err) == (0, "")
    assert terminal.calls == [call]
    if result == "done":
        assert out == "done\n"


@pytest.mark.parametrize("command", ["validate m", "preview m", "status r", "runs d", "verify m", "run m --dry-run"])
def test_json_is_one_document_and_nothing_else(terminal, command):
    code, out, err = terminal(*command.split(), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == Outcome().to_json()
    assert "as a table" in terminal(*command.split())[1]


@pytest.mark.parametrize(("command", "exit_code"), [("validate m", 3), ("verify m", 1), ("validate m --json", 2)])
def test_a_reports_exit_code_is_the_commands(terminal, command, exit_code):
    terminal.result = Outcome(exit_code)
    assert terminal(*command.split())[0] == exit_code


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


def test_a_preview_is_written_as_a_page(terminal, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = terminal("preview", "m.yaml", "--html", str(page))
    assert (code, out) == (0, "")
    assert page.read_text() == "<title>m.yaml</title>"


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
