"""Nothing that others wrote acts on a terminal."""

from __future__ import annotations

import io
import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.live import Live
from rich.text import Text

from postlude.secrecy import learn
from postlude.telemetry import screen
from postlude.telemetry.guard import guarded_streams, shown, visible
from postlude.telemetry.screen import Fields, Listing, open_console, prose

HOSTILE = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202eevil\u2066\x00\x7f[bold]not markup[/bold]\ud800"

texts = st.text(st.characters() | st.sampled_from("\x1b\r\x07\x9b\u202e\x00\t\n[]"), max_size=60)


def acts(text: str) -> list[str]:
    return [
        c for c in text if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t") or c == "\u202e"
    ]


@given(texts)
def test_signs_stand_for_what_acts_and_the_rest_stays(text):
    assert not acts(visible(text))
    assert visible(visible(text)) == visible(text)
    if not acts(text) and "\ufeff" not in text:
        assert visible(text).replace("\\u200b", "") == text.replace("\u200b", "") or re.search(
            "[\u061c\u200b-\u206f\ufff9-\ufffb\U000e0000-\U000e007f]", text
        )


def test_a_sign_tells_which_character_it_was():
    assert shown("a\x1b[2J\u202e\U000e0041 é🙂\tb\n") == "a\\x1b[2J\\u202e\\U000e0041 é🙂\tb\n"


@given(texts)
def test_nothing_that_is_printed_acts(text):
    out = io.StringIO()
    console = open_console()
    console.file = out
    listing = Listing(text, {f"{text}!": "whole", "b": "text"})
    listing.add_row(text, Text(text))
    for part in (Text(text), listing, Fields(text, [(text, text)])):
        console.print(part)
    prose(console, text, warning="Error: ")
    console.print(Text(text), markup=True)
    assert not acts(out.getvalue().replace("\r\n", "\n"))


def test_markup_of_others_is_text():
    out = io.StringIO()
    console = open_console()
    console.file, console.width = out, 200
    prose(console, HOSTILE)
    console.print(Fields("", [("[red]x[/red]", HOSTILE)]))
    assert out.getvalue().count("[bold]not markup[/bold]") == 2
    assert "[red]x[/red]" in out.getvalue()


@pytest.mark.capability("What data, models, file names and libraries bring does not act on a terminal")
def test_what_libraries_print_passes_too_and_a_live_line_stays_alive(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    learn("canary-of-a-library", "KEY")
    with guarded_streams():
        assert not sys.stderr.isatty()
        print(HOSTILE, "canary-of-a-library", file=sys.stderr)
        assert not acts(terminal.getvalue())
        console = screen.open_console(stderr=True)
        assert console.is_terminal
        with Live(Text("a line of ours"), console=console, refresh_per_second=1):
            print(HOSTILE, file=sys.stderr)
    assert sys.stderr is terminal
    said = terminal.getvalue()
    assert "\x1b[" in said  # rich's own
    assert not {"\x1b[2J", "\x1b]0;", "\x07", "\x9b", "\u202e"} & set(
        re.findall("\x1b\\[2J|\x1b\\]0;|[\x07\x9b\u202e]", said)
    )
    assert "canary-of-a-library" not in said
