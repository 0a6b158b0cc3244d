"""The reward ``python``: a function of one's own, named by its module."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from postlude.data.example import Record
from postlude.manifest.problem import ManifestError
from postlude.nearest import suggestion_or_list
from postlude.rollout.reward import Asked, RewardFunction


class Python(RewardFunction):
    """A Python function ``name(prompt, completion, record)`` that returns a number."""

    name: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """``package.module:name``."""

    def check(self) -> None:
        self._function()

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        return self._function()(prompt, completion, record)

    def _function(self) -> Callable[..., Any]:
        module_name, _, name = self.name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # somebody else's code: whatever its import raises is theirs to mend
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if "importlib" in frame.filename else f" ({frame.filename}:{frame.lineno})"
            raise ManifestError(
                f"The reward function '{self.name}' cannot be imported: {type(error).__name__}: {error}{where}. Its "
                "module must be installed, or on PYTHONPATH."
            ) from error
        function = getattr(module, name, None)
        if not callable(function):
            others = [one for one in vars(module) if callable(getattr(module, one)) and not one.startswith("_")]
            raise ManifestError(
                f"The module '{module_name}' has no function '{name}' to reward with.{suggestion_or_list(name, others)}"
            )
        return function
