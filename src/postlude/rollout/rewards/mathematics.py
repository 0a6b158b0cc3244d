"""The reward ``mathematics``: the completion ends in an expression that equals the answer."""

from __future__ import annotations

from typing import Any

from postlude.data.example import Record
from postlude.manifest.problem import ManifestError
from postlude.rollout.reward import Asked, ReferenceReward


class Mathematics(ReferenceReward):
    """1 where the completion's last expression equals that of the answer, 0 elsewhere, as math-verify sees it.

    Expressions are LaTeX (in ``\\boxed{}``, between dollars) or plain: fractions, roots, sets, intervals, matrices,
    equations. What is equal need not look alike.
    """

    def check(self) -> None:
        _math_verify()

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        library = _math_verify()
        right = [self._read(library, text) for text in self.said_answers(record, "expression")]
        if not all(right):
            raise ValueError(f"the answer in '{self.answer}' has no expression")
        answer = library.parse(completion, parsing_timeout=None)
        return any(library.verify(expression, answer, timeout_seconds=None) for expression in right)

    @staticmethod
    def _read(library: Any, answer: str) -> Any:
        bare = "\\" in answer and "$" not in answer and "\\boxed" not in answer
        return library.parse(f"${answer}$" if bare else answer, parsing_timeout=None)


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise ManifestError(
            "The reward 'mathematics' needs math-verify. Install it with: pip install 'postlude[rewards]'"
        ) from error
    return math_verify
