"""Rewards: what says how good a completion is. A function of one's own is a class, or a function named by its module.

class Polite(RewardFunction):
    word: str = "please"

    def score(self, prompt, completion, record):
        return float(self.word in completion)

def polite(prompt, completion, record):
    return float("please" in completion)
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from postlude.data.example import Record
from postlude.errors import DataError, UserError
from postlude.manifest.change import Change, from_round
from postlude.manifest.component import Component, Config, Named
from postlude.manifest.schema import ModelPlace
from postlude.rollout.calls import calls_of_answer

Asked = str | Sequence[Mapping[str, Any]]
"""A text to be continued, or the messages that an assistant's turn answers."""
REFERENCE = "reference"
"""Under this name a record tells what the data answer, unless it has a column of the name."""


LARGEST = 1e30
"""Rewards beyond it are no finite numbers: advantages are made of their differences, in single precision."""


class RewardFunction(Component):
    """Says how good a completion is. The component of the kind ``rewards``."""

    def check(self) -> None:
        """:class:`~postlude.errors.ManifestError` if it cannot be used: what it names is not there."""

    def remark(self) -> str | None:
        """What a user should know of how it works on this machine, if anything."""
        return None

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        """The reward. ``prompt`` is the messages, or the text, that was asked; ``record`` is the whole record, where
        ``reference`` is what the data answer."""
        raise NotImplementedError


class ReferenceReward(RewardFunction):
    """Base of the functions that compare with what the data say."""

    answer: str = REFERENCE
    """The column of the right answer, a text, a number, a call of a tool or a list of which one is enough; by
    default the turn or completion of the data that takes the prompt up."""

    def answers(self, record: Record) -> list[str]:
        """The right answers as texts. ValueError if the record has none, or only blank ones."""
        found = record.get(self.answer)
        if found is None:
            raise ValueError(f"the record has no '{self.answer}' to compare with; name its column as 'answer'")
        if isinstance(found, list | tuple | Mapping) and calls_of_answer(found):
            return [json.dumps(found, default=str)]
        several = found if isinstance(found, list | tuple) else [found]
        if any(isinstance(one, Mapping | list | tuple) for one in several):
            raise ValueError(f"'{self.answer}' is not a text, a number or a list of them, so nothing compares with it")
        several = [one for one in several if one is not None and one == one]  # not what a table puts for nothing
        texts = [str(one) for one in several]
        texts += [str(int(one)) for one in several if isinstance(one, float) and one.is_integer()]
        if not any(text.strip() for text in texts):
            raise ValueError(
                f"the record's '{self.answer}' is empty, so there is nothing to compare with; name another column as "
                "'answer'"
            )
        return [text for text in texts if text.strip()]

    def said_answers(self, record: Record, what: str) -> list[str]:
        """As :meth:`answers`, for who compares ``what`` is said. ValueError if one is a call of a tool."""
        answers = self.answers(record)
        if any(calls_of_answer(answer) for answer in answers):
            raise ValueError(f"the answer in '{self.answer}' is a call of a tool, which has no {what}")
        return answers


class NamedReward(Named):
    """A reward function by its registered name, or a Python function as ``package.module:name``."""

    def __init__(self) -> None:
        super().__init__("rewards")

    def name_in(self, keys: Mapping[str, Any]) -> str | None:
        name = super().name_in(keys)
        return "python" if name is not None and ":" in name else name

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        described = super().__get_pydantic_json_schema__(schema, handler)
        return {"anyOf": [*described["anyOf"], {"type": "string", "pattern": ":"}]}


class Reward(Config):
    """A part of the reward: a function, or a model with a head that scores."""

    exactly_one: ClassVar[tuple[tuple[str, ...], ...]] = (("function", "model"),)
    changes: ClassVar[Mapping[str, Change]] = {"weight": from_round("the round's samples are rewarded with it")}

    function: Annotated[RewardFunction, NamedReward()] | None = None
    """A registered function, or ``package.module:name`` of one's own: ``name(prompt, completion, record)``."""
    model: ModelPlace | None = None
    """A reward model: it scores the whole conversation."""
    weight: float = 1.0
    """The rewards are multiplied by their weights and added."""
    label: Annotated[str, Field(min_length=1)] | None = None
    """What the part is called in records and metrics; by default after the function, the stage or the path."""

    @property
    def name(self) -> str:
        """What the part is called."""
        if self.label is not None:
            return self.label
        if self.model is not None:
            return (self.model.from_ or self.model.path or "").rstrip("/").rpartition("/")[2]
        assert self.function is not None
        said = getattr(self.function, "name", "") or self.function.component_name
        return said.rpartition(":")[2]


def part_names(rewards: Sequence[Reward]) -> list[str]:
    """The names of the parts, each told once: a second one of a name is numbered."""
    names: list[str] = []
    for reward in rewards:
        name, number = reward.name, 2
        while name in names:
            name, number = f"{reward.name}_{number}", number + 1
        names.append(name)
    return names


def remarks_on(rewards: Sequence[Reward]) -> list[str]:
    """What a user should know of how these functions work on this machine."""
    told = [reward.function.remark() for reward in rewards if reward.function is not None]
    return [remark for remark in dict.fromkeys(told) if remark is not None]


def call(
    function: RewardFunction,
    name: str,
    example_id: str,
    asked: Asked,
    completion: str,
    record: Record,
) -> float:
    """What a function says of a completion. DataError, naming the record, if it raises or returns no number."""
    try:
        value: Any = function.score(asked, completion, record)
    except UserError:
        raise
    except Exception as error:  # somebody else's code: whatever it raises is told with the record that it met
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"The reward '{name}' failed at the record '{example_id}': {what} "
            f"({frame.filename}:{frame.lineno}). Mend the function or the record, or leave such records "
            "out with a filter."
        ) from error
    number = finite(value)
    if number is None:
        raise DataError(
            f"The reward '{name}' returned {_shown(value)} for the record '{example_id}', which is no finite number. "
            "Return a number from it for every record."
        )
    return number


def finite(value: Any) -> float | None:
    """A value as a number, whatever type it has; None where it is none, or one that single precision does not hold."""
    if value is None or isinstance(value, str | bytes | bytearray | complex):
        return None
    try:
        number = float(value)
    except Exception:  # somebody else's type, or a whole number without end
        return None
    return number if abs(number) <= LARGEST else None


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except Exception:  # a whole number of too many digits, for one
        return f"a value of the type {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
