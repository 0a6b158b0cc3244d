"""What trackers refuse, in the one place that knows: names and values are mapped here, the same way for all.

- A character of a name that a tracker refuses becomes ``-uHEX-``: ``pass@4`` is ``pass-u40-4`` there. Two names never
  become one, since what looks like such a sign itself has its first character written so.
- A name that a tracker keeps for itself gets ``metric-u2f-`` before it. One that is too long is cut, and ends in a
  digest of the whole.
- A number that is not finite, where a tracker refuses or alters such, is left out; ``NAME.not_finite`` says 1 (not a
  number), 2 (infinity) or 3 (minus infinity) at that step, and 0 at the finite steps that follow.
- True and false are 1 and 0. What is no number is left out.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

_OURS = ("step", "time")
_LITERAL = re.compile(r"-(?=u[0-9a-f])")
_DIGEST_LENGTH = 10


class Vocabulary:
    """What one tracker takes. ``refused`` matches characters of names; ``longest`` is of a name."""

    def __init__(
        self,
        refused: str | None = None,
        reserved: tuple[str, ...] = (),
        longest: int = 250,
        finite: bool = False,
    ) -> None:
        self._refused, self._reserved = re.compile(refused) if refused else None, reserved
        self._longest, self._finite = longest, finite
        self._names: dict[str, str] = {}
        self._odd: set[str] = set()

    def name(self, name: str) -> str:
        """A metric's name as the tracker takes it."""
        if name not in self._names:
            self._names[name] = self._map(name)
        return self._names[name]

    def numbers(self, line: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of a step, by names and with values as the tracker takes them."""
        told: dict[str, float] = {}
        for name, value in line.items():
            if name in _OURS or not isinstance(value, int | float):
                continue
            if math.isfinite(value) or not self._finite:
                told[self.name(name)] = int(value) if isinstance(value, bool) else value
            else:
                self._odd.add(name)
            if name in self._odd:
                told[self.name(f"{name}.not_finite")] = _how_odd(value)
        return told

    def _map(self, name: str) -> str:
        if self._refused is not None:
            name = _LITERAL.sub("-u2d-", name)
            name = self._refused.sub(lambda found: "".join(f"-u{ord(each):x}-" for each in found[0]), name)
        if name in self._reserved:
            name = f"metric-u2f-{name}"
        if len(name) > self._longest:
            digest = hashlib.sha256(name.encode()).hexdigest()[: _DIGEST_LENGTH - 1]
            name = f"{name[: self._longest - _DIGEST_LENGTH]}-{digest}"
        return name


def _how_odd(value: float) -> int:
    if math.isfinite(value):
        return 0
    return 1 if math.isnan(value) else 2 if value > 0 else 3
