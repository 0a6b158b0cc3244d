"""What a user may have meant by a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest; None if none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def suggestion(word: str, known: Iterable[str]) -> str:
    """A sentence, with a space before it, that offers the nearest known name; empty if none is near."""
    near = nearest(word, known)
    return f" Did you mean '{near}'?" if near else ""


def suggestion_or_list(word: str, known: Iterable[str]) -> str:
    """The nearest known name or, if none is near, all of them."""
    known = sorted(known)
    return suggestion(word, known) or f" Known: {', '.join(known) or 'none'}."
