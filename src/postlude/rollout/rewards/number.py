"""The reward ``number``: the completion ends in the right number, as in grade-school mathematics."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import Field

from postlude.data.example import Record
from postlude.rollout.reward import Asked, ReferenceReward

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(
    rf"(?<![\w.])[-+]?(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*{_DIGITS}(?![\d.]))?(?=\s*%)?"
)
_MARKED = re.compile(r"####\s*(.+)")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")


class Number(ReferenceReward):
    """1 where the completion's number is that of the answer, 0 elsewhere.

    Of both the number is read that follows ``####``, else that in ``\\boxed{}``, else the last one. Thousands may have
    commas; fractions (``3/4``, ``\\frac{3}{4}``) and exponents are numbers.
    """

    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """How far apart the two may be, relative to the answer, beside the millionth that decimals may always be."""
    must_mark: bool = False
    """Only a number after ``####`` or in ``\\boxed{}`` counts in the completion."""

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        right = [number_in(answer) for answer in self.said_answers(record, "number")]
        if None in right:
            raise ValueError(f"the answer in '{self.answer}' has no number")
        answer = number_in(completion, marked=self.must_mark)
        return answer is not None and any(self._same(answer, number) for number in right if number is not None)

    def _same(self, answer: float, right: float) -> bool:
        return abs(answer - right) <= max(1e-6, self.tolerance * abs(right))


def number_in(text: str, marked: bool = False) -> float | None:
    """The number that a text answers with, or None. ``marked``: only one that is marked as the answer."""
    for mark in (_MARKED, _BOXED):
        marks = mark.findall(text)
        if marks:
            return _last_number(marks[-1])
    return None if marked else _last_number(text)


def _last_number(text: str) -> float | None:
    text = _FRACTION.sub(r"\1/\2", text).replace("−", "-").replace("\\,", "").replace("$", " ")
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    above, _, below = numbers[-1].replace(",", "").replace(" ", "").partition("/")
    try:
        value = float(above) / float(below or 1)
    except ZeroDivisionError:
        return None
    return value if math.isfinite(value) else None
