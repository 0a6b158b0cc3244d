"""JSON that strict readers accept and whose floats come back as they were.

A finite float is written with the fewest digits that read back as the same bits. JSON has no NaN and no
infinities: they are written as the texts "NaN", "Infinity" and "-Infinity", and those texts read as floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dump(value: Any, *, indent: int | None = None) -> str:
    """The JSON text of a value, ASCII only. TypeError on what JSON cannot hold."""
    return json.dumps(_map(_strict, value), allow_nan=False, indent=indent)


def load(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError if it is none."""
    return _map(special, json.loads(text))


def special(leaf: Any) -> Any:
    """A leaf of a text as :func:`load` gives it."""
    return _SPECIAL.get(leaf, leaf)


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """The same value with every leaf changed."""
    if isinstance(value, dict):
        return {key: _map(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map(change, item) for item in value]
    return change(value)


def _strict(leaf: Any) -> Any:
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return "NaN" if math.isnan(leaf) else "Infinity" if leaf > 0 else "-Infinity"
    return leaf
