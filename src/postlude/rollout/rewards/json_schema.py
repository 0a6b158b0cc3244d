"""The reward ``json_schema``: the completion is JSON that a schema allows."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import Field

from postlude.data.example import Record
from postlude.manifest.problem import ManifestError
from postlude.rollout.reward import Asked, RewardFunction

_FENCED = re.compile(r"```(?:json)?[^\S\n]*\n(.*?)```", re.DOTALL)
"""Linear: what ends no block is followed by no further mark at which another could begin."""


class JsonSchema(RewardFunction):
    """1 where the completion, or the last fenced block in it, is JSON that a schema allows, 0 elsewhere."""

    definition: Annotated[dict[str, Any], Field(alias="schema")]
    """The JSON Schema."""

    def check(self) -> None:
        self._validator()

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        blocks, validator = _FENCED.findall(completion), self._validator()
        try:
            return validator.is_valid(json.loads(blocks[-1] if blocks else completion))
        except (ValueError, RecursionError):
            return False

    def _validator(self) -> Any:
        try:
            from jsonschema import SchemaError
            from jsonschema.validators import validator_for
        except ImportError as error:
            raise ManifestError(
                "The reward 'json_schema' needs jsonschema. Install it with: pip install 'postlude[rewards]'"
            ) from error
        kind = validator_for(self.definition)
        try:
            kind.check_schema(self.definition)
        except SchemaError as error:
            place = "/".join(str(part) for part in error.absolute_path) or "its top"
            raise ManifestError(f"The reward 'json_schema' has no valid schema: at {place}, {error.message}") from error
        return kind(self.definition)
