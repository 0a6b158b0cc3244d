"""JSON that strict readers accept and whose floats come back as they were.

A finite float is written with the fewest digits that read back as the same bits. JSON has no NaN and no
infinities: they are written as the texts "NaN", "Infinity" and "-Infinity", and those texts read as floats.
"""

from __future__ import annotations

import json
import math
from typing import Any

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dump(value: Any, *, indent: int | None = None) -> str:
    """The JSON text of a value, ASCII only. TypeError on what JSON cannot hold."""
    return json.dumps(_strict(value), allow_nan=False, indent=indent)


def load(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError if it is none."""
    return _restored(json.loads(text))


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, str):
        return _SPECIAL.get(value, value)
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return value
