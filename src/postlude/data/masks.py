"""Which stretches of a rendered conversation are trained, and how much each counts.

Notable:

- A template's own ``{% generation %}`` marks win for the assistant. Without them, and for other roles, the turns are
  proven (:mod:`postlude.data.turns`).
- Conversations of one skeleton (the same roles in the same order, nothing but texts) are proven once, with placeholders
  for texts. A conversation whose rendering is, to the letter, that one with its own texts filled in has its spans at
  the same places. Every other one is proven by itself, so the fast way never decides what the slow one would not.
- Nothing is remembered that could make one conversation's spans depend on another's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from postlude.data.chat import REASONING_KEYS, Chat, ChatRenderer, StopTokens
from postlude.data.example import BadRecord, Conversation
from postlude.data.sentinels import Part, Place, call_parts, locate, spoken_parts
from postlude.data.turns import MaskError, Span, Turns
from postlude.data.unprinted import ROLES, Omission, spoken_kind, unprinted
from postlude.errors import DataError
from postlude.manifest.schema import TrainOnSpans
from postlude.manifest.schema import Turns as TurnsTrained

TrainOn = TurnsTrained | TrainOnSpans
"""Which turns are trained, and which stretches of them."""

WeightedSpan = tuple[int, int, float]
"""From one character to before another, and how much it counts."""

_KINDS = {
    **dict.fromkeys((*ROLES, "other"), "text"),
    "reasoning": "reasoning",
    "tool_calls": "tool calls",
    "names": "name",
}
"""What a message loses, in words."""

_MOST_SKELETONS = 1024
"""So many skeletons are kept at a time."""


@dataclass(frozen=True)
class Masked:
    """A rendered conversation and what of it is trained."""

    text: str
    spans: Sequence[WeightedSpan]
    unprinted: frozenset[str] = frozenset()
    """What of the conversation is not in the text (:data:`postlude.manifest.schema.Unprinted`)."""


class UnprintedError(DataError):
    """A trained turn loses something of what was to be trained."""


class Masker:
    """Finds what is trained in conversations rendered by one template."""

    def __init__(
        self, renderer: ChatRenderer, stop_tokens: StopTokens, train_on: TrainOn, drop_unprinted: Collection[str] = ()
    ) -> None:
        self._renderer, self._stop_tokens, self._drop_unprinted = renderer, stop_tokens, drop_unprinted
        self._expression: re.Pattern[str] | None = None
        self._train_on: TurnsTrained
        if isinstance(train_on, TrainOnSpans):
            self._train_on, self._expression = train_on.turns, re.compile(train_on.spans, re.DOTALL)
        else:
            self._train_on = train_on
        self._skeletons: dict[Any, _Skeleton | None] = {}

    def mask(self, conversation: Conversation) -> Masked:
        """The text of a conversation and its trained stretches; none where no turn is to be trained.

        DataError if the template raises, MaskError if a stretch cannot be proven, UnprintedError if a trained turn
        loses what ``drop_unprinted`` does not name, BadRecord for an impossible weight.
        """
        weights = [_weight(message, number) for number, message in enumerate(conversation.messages, 1)]
        chat = Chat.of(conversation)
        if not chat.messages:
            raise BadRecord("it is an empty conversation: it has no message")
        counts = {i: weights[i] for i in self._turns(chat) if weights[i]}
        masked = self._mask_all(chat, weights) if self._train_on == "all" else self._mask_turns(chat, counts)
        if not masked.text:
            return masked
        omissions = self._omissions(chat, masked.text)
        for omission in omissions:
            # Of a turn of which an expression finds what is trained, what it does not find need not be printed.
            if omission.message in counts and self._expression is None and omission.kind not in self._drop_unprinted:
                raise self._unprinted_error(chat, omission)
        spans = masked.spans if self._expression is None else list(_matches(self._expression, masked))
        return Masked(masked.text, spans, frozenset(omission.kind for omission in omissions))

    def _mask_turns(self, chat: Chat, counts: dict[int, float]) -> Masked:
        """The spans of the turns that count, each as much as ``counts`` says."""
        spans: list[WeightedSpan] = []
        has_marks = self._renderer.has_marks(chat)
        own = [i for i in counts if has_marks and chat.messages[i].get("role") == "assistant"]
        proven = [i for i in counts if i not in own]
        text = ""
        if own:
            text, marks = self._renderer.render_marked(chat)
            spans += self._weighted_marks(chat, text, marks, counts, own)
        if proven:
            text, turns = self._turn_spans(chat, proven)
            spans += [(*span, counts[i]) for i in proven for span in turns[i]]
        return Masked(text, sorted(spans))

    def _turns(self, chat: Chat) -> list[int]:
        """The messages that ``train_on`` selects."""
        if self._train_on == "all":
            return list(range(len(chat.messages)))
        roles = ("assistant",) if self._train_on in ("assistant", "last") else self._train_on
        selected = [i for i, message in enumerate(chat.messages) if message.get("role") in roles]
        return selected[-1:] if self._train_on == "last" else selected

    def _mask_all(self, chat: Chat, weights: list[float]) -> Masked:
        """Every stretch counts 1, and the turns of a message with a weight count that."""
        weighted = [i for i, weight in enumerate(weights) if weight != 1]
        if not weighted:
            text = self._renderer.render(chat)
            return Masked(text, [(0, len(text), 1.0)])
        text, turns = self._turn_spans(chat, weighted)
        spans = sorted((*span, weights[i]) for i in weighted for span in turns[i])
        borders = [(0, 0, 0.0), *spans, (len(text), len(text), 0.0)]
        between = [(end, start, 1.0) for (_, end, _), (start, _, _) in pairwise(borders) if start > end]
        return Masked(text, sorted([*spans, *between]))

    # --- a template's own marks -----------------------------------------------------------------------------

    def _weighted_marks(
        self, chat: Chat, text: str, marks: list[Span], counts: dict[int, float], own: list[int]
    ) -> list[WeightedSpan]:
        assistants = [i for i, message in enumerate(chat.messages) if message.get("role") == "assistant"]
        if own == assistants and len({counts[i] for i in own}) == 1:
            return [(*mark, counts[own[0]]) for mark in marks]
        owners = self._owners(chat, text, marks, assistants)
        return [(*mark, counts[i]) for mark, i in zip(marks, owners, strict=True) if i in counts]

    def _owners(self, chat: Chat, text: str, marks: list[Span], assistants: list[int]) -> list[int]:
        """The message that each mark belongs to: the one of which a text stands in it."""
        parts = [part for i in assistants for part in (*spoken_parts(chat, i), *call_parts(chat, i))]
        places = locate(self._renderer.render, chat, text, parts)
        owners = []
        for start, end in marks:
            inside = {
                part.message
                for part, place in places.items()
                if isinstance(place, Place) and start <= place.start and place.end <= end
            }
            if len(inside) != 1:
                raise MaskError(
                    f"{self._renderer.name(chat)} marks {text[start:end]!r} as generated, and which message that "
                    "belongs to cannot be proven. Train on every turn of the assistant with the same weight, or give "
                    "another template as data.NAME.template."
                )
            owners.append(inside.pop())
        return owners

    # --- what is not printed --------------------------------------------------------------------------------

    def _omissions(self, chat: Chat, text: str) -> list[Omission]:
        """What the template leaves out, through the conversation's skeleton if possible."""
        skeleton = self._skeleton(chat, [])
        if skeleton is not None and skeleton.spans_in(text, chat) is not None:
            return skeleton.omissions
        return unprinted(self._renderer.render, chat, text)

    def _unprinted_error(self, chat: Chat, omission: Omission) -> UnprintedError:
        index = omission.message or 0
        return UnprintedError(
            f"{self._renderer.name(chat)} does not print all of message {index + 1} (role "
            f"'{chat.messages[index].get('role')}'), which is to be trained: its {_KINDS[omission.kind]}. Give a "
            "template that prints it as data.NAME.template, or set data.NAME.drop_unprinted to "
            f"[{', '.join([*self._drop_unprinted, omission.kind])}] to train without it."
        )

    # --- proven turns ---------------------------------------------------------------------------------------

    def _turn_spans(self, chat: Chat, indices: list[int]) -> tuple[str, dict[int, list[Span]]]:
        """The rendered text and the spans of some turns, through their skeleton if possible."""
        skeleton = self._skeleton(chat, indices)
        if skeleton is not None:
            text = self._renderer.render(chat)
            spans = skeleton.spans_in(text, chat)
            if spans is not None:
                return text, spans
        turns = Turns(self._renderer, self._stop_tokens, chat)
        return turns.text, turns.spans(indices)

    def _skeleton(self, chat: Chat, indices: list[int]) -> _Skeleton | None:
        placeholders = _with_placeholders(chat)
        if placeholders is None:
            return None
        key = (tuple((message.get("role"), *message) for message in placeholders.messages), tuple(indices))
        if key not in self._skeletons:
            if len(self._skeletons) >= _MOST_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = _Skeleton.of(self._renderer, self._stop_tokens, placeholders, indices)
        return self._skeletons[key]


class _Skeleton:
    """The rendering of a conversation with placeholders for its texts, cut up at them."""

    def __init__(self, text: str, holes: list[tuple[Part, Place]], spans: dict[int, list[Span]]) -> None:
        self._holes = [part for part, _ in holes]
        self.omissions: list[Omission] = []
        """What of a conversation with this skeleton the template leaves out."""
        self._sizes = [place.end - place.start for _, place in holes]
        starts, ends = [place.start for _, place in holes], [place.end for _, place in holes]
        self._literals = [text[end:start] for end, start in zip([0, *ends], [*starts, len(text)], strict=True)]
        self._spans = {
            i: [(start, end, sum(e <= start for e in ends), sum(e <= end for e in ends)) for start, end in several]
            for i, several in spans.items()
        }

    @classmethod
    def of(cls, renderer: ChatRenderer, stop_tokens: StopTokens, chat: Chat, indices: list[int]) -> _Skeleton | None:
        """The skeleton of a conversation of placeholders; None if it cannot be proven."""
        try:
            turns = Turns(renderer, stop_tokens, chat)
            spans = turns.spans(indices)
        except DataError:
            return None
        parts = [part for i in range(len(chat.messages)) for part in spoken_parts(chat, i)]
        places = locate(renderer.render, chat, turns.text, parts)
        holes = [(part, place) for part, place in places.items() if isinstance(place, Place)]
        if len(holes) < sum(place is not None for place in places.values()):
            return None
        skeleton = cls(turns.text, sorted(holes, key=lambda hole: hole[1].start), spans)
        skeleton.omissions = [
            Omission(spoken_kind(chat.messages[part.message], str(part.path[0])), part.message)
            for part, place in places.items()
            if place is None
        ]
        return skeleton

    def spans_in(self, text: str, chat: Chat) -> dict[int, list[Span]] | None:
        """The spans in ``text`` if it is this skeleton filled with the texts of ``chat``; None if it is not."""
        fillings = [chat.messages[hole.message][str(hole.path[0])] for hole in self._holes]
        pieces = [piece for pair in zip(self._literals, [*fillings, ""], strict=True) for piece in pair]
        if "".join(pieces) != text:
            return None
        moved = [0, *accumulate(len(filling) - size for filling, size in zip(fillings, self._sizes, strict=True))]
        return {
            i: [(start + moved[before], end + moved[until]) for start, end, before, until in several]
            for i, several in self._spans.items()
        }


def _matches(expression: re.Pattern[str], masked: Masked) -> Iterator[WeightedSpan]:
    """What an expression matches within each span, or its groups do."""
    for start, end, weight in masked.spans:
        for match in expression.finditer(masked.text[start:end]):
            for group in range(1, expression.groups + 1) or [0]:
                if match.end(group) > match.start(group) >= 0:
                    yield start + match.start(group), start + match.end(group), weight


def _with_placeholders(chat: Chat) -> Chat | None:
    """The conversation with other texts; None if it holds more than texts."""
    if chat.tools is not None:
        return None
    messages = []
    for number, message in enumerate(chat.messages):
        replaced: dict[str, Any] = {}
        for key, value in message.items():
            if key == "role":
                replaced[key] = value
            elif not isinstance(value, str) or not value.strip():
                return None
            elif key == "content":
                replaced[key] = f"message {number}"
            elif key in REASONING_KEYS:
                replaced[key] = f"thought {number}"
            else:
                return None
        messages.append(replaced)
    return Chat(messages)


def _weight(message: Any, number: int) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise BadRecord(f"the weight of message {number} is {weight!r}; it should be a number from 0")
    return float(weight)
