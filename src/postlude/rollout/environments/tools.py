"""The environment ``tools``: Python functions that the policy can call."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from postlude.data.example import Record
from postlude.manifest.problem import ManifestError
from postlude.rollout.calls import marked_calls
from postlude.rollout.environment import Environment, Reply
from postlude.rollout.reward import Asked


class Tools(Environment):
    """Functions that the policy calls by name; what they return is said to it. A turn without a call ends the episode.

    A call is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Qwen, Hermes and others write it. What
    goes wrong in a call is said to the policy, too. The chat template is told of the functions: of each it gets the
    signature, and the docstring in Google's style.
    """

    functions: Annotated[list[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]], Field(min_length=1)]
    """Each as ``package.module:name``."""

    def check(self) -> None:
        self.tools()

    def tools(self) -> list[dict[str, Any]]:
        from transformers.utils import get_json_schema

        schemas = []
        for name, function in self._functions().items():
            try:
                schemas.append(get_json_schema(function))
            except Exception as error:  # of a class that transformers does not export
                raise ManifestError(f"The tool '{name}' cannot be described to a model: {error}") from error
        return schemas

    async def reset(self, prompt: Asked, record: Record) -> Calls:
        return Calls(self._functions())

    def _functions(self) -> dict[str, Callable[..., Any]]:
        functions = {}
        for place in self.functions:
            module, _, name = place.partition(":")
            try:
                functions[name] = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError) as error:
                raise ManifestError(
                    f"The tool '{place}' is not there: {error}. Its module must be installed, or on PYTHONPATH."
                ) from error
        return functions


class Calls:
    """An episode of calls."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._functions = functions

    async def step(self, said: str) -> Reply:
        calls = marked_calls(said)
        return Reply([await self._call(call) for call in calls], done=not calls)

    async def _call(self, call: str) -> dict[str, Any]:
        try:
            parsed = json.loads(call)
            name, arguments = parsed["name"], parsed.get("arguments") or {}
            if name not in self._functions:
                raise ValueError(f"there is no tool '{name}', there are {', '.join(self._functions)}")
            value = self._functions[name](**arguments)
            value = await value if inspect.isawaitable(value) else value
        except Exception as error:  # the policy made the call: it is told what was wrong with it
            name, value = "error", f"{type(error).__name__}: {error}"
        content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return {"role": "tool", "name": name, "content": content}
