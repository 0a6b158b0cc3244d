"""From where to where somebody speaks: the spans of a message's turn in the rendered conversation, proven.

Its texts stand where :mod:`postlude.data.sentinels` finds them. Round them, a turn of the assistant goes from the end
of the generation prompt to the end of the stop token, and both ends come from renderings of the same conversation:

- cut off before the message, with a generation prompt: the turn begins where the whole rendering leaves that;
- cut off after the message: the turn ends where the whole rendering leaves that. What is shared by a conversation
  that ends and by one that goes on belongs to the turn, not to the message that follows. A special token that comes
  next is the turn's last, as a model has to make it to stop.

Templates write earlier turns otherwise than the last one. Where that is so, the renderings are compared from the
nearest proven text on. Where a generation prompt says more than the turn has (an opened thinking part), the turn
begins with its first proven text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from postlude.data.chat import Chat, ChatRenderer
from postlude.data.sentinels import Finding, Marked, Part, Place, Unproven, call_parts, locate, spoken_parts
from postlude.manifest.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")
"""What two different tags have in common: ``<|`` of ``<|end|>`` and ``<|user|>``."""

Span = tuple[int, int]
"""From one character of the rendered text to before another."""


class MaskError(DataError):
    """Which tokens of a turn are its own cannot be proven."""


class StopTokens:
    """The special tokens of a tokenizer, as they stand in text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        known = sorted(filter(None, special), key=len, reverse=True)
        one = "|".join(map(re.escape, known)) if known else "(?!)"
        self._next = re.compile(rf"\s*(?:{one})")
        self._before = re.compile(rf"(?:{one})$")
        self._end_of_sequence = tokenizer.eos_token

    def end_after(self, text: str, position: int) -> int | None:
        """Where the special token ends that comes next in ``text``; None if something else comes."""
        found = self._next.match(text, position)
        return found and found.end()

    def stand_before(self, text: str, position: int) -> bool:
        """Whether a special token ends at ``position``."""
        return self._before.search(text[:position]) is not None

    def until_end_of_sequence(self, closing: str) -> str:
        """``closing`` up to the end-of-sequence token, if that is in it."""
        token = self._end_of_sequence
        return closing[: closing.index(token) + len(token)] if token and token in closing else closing


@dataclass(frozen=True)
class _Begin:
    position: int
    exact: bool
    """Whether the whole generation prompt comes before it, and not only the beginning of one."""


class Turns:
    """The turns of one conversation, in its rendering ``text``."""

    def __init__(self, renderer: ChatRenderer, stop_tokens: StopTokens, chat: Chat) -> None:
        self._renderer, self._stop_tokens, self._chat = renderer, stop_tokens, chat
        self.text = renderer.render(chat)

    def spans(self, indices: Sequence[int]) -> dict[int, list[Span]]:
        """The spans of the messages at ``indices``: mostly one each, none where the template leaves a message out.

        MaskError, naming template and message, if that cannot be proven.
        """
        parts = [part for i in indices for part in (*spoken_parts(self._chat, i), *call_parts(self._chat, i))]
        findings = self._locate(parts)
        spans = {}
        for index in indices:
            spoken = self._proven(index, [(part, findings[part]) for part in spoken_parts(self._chat, index)])
            call = self._call(index, [(part, findings[part]) for part in call_parts(self._chat, index)])
            spans[index] = self._spans(index, sorted([*spoken, *call], key=lambda found: found[1].start))
        return spans

    def _proven(self, index: int, found: list[tuple[Part, Finding]]) -> list[tuple[Part, Place]]:
        """The parts that are in the rendering. MaskError if that is not known of one."""
        proven = []
        for part, finding in found:
            if isinstance(finding, Unproven):
                raise self._error(index, f"of its {part.path[0]}, {finding.reason}")
            if finding is not None:
                proven.append((part, finding))
        return proven

    def _call(self, index: int, found: list[tuple[Part, Finding]]) -> list[tuple[Part, Place]]:
        """The one of a call's texts whose place is proven. MaskError if there is none, unless the call is left out."""
        proven = [(part, place) for part, place in found if isinstance(place, Place)]
        return proven[:1] or self._proven(index, found)

    def _spans(self, index: int, parts: list[tuple[Part, Place]]) -> list[Span]:
        """One span over the parts, or more where the template puts the result of a call between them."""
        if not parts:
            return []
        spans = []
        start = self._begin(index, *parts[0])
        for (part, place), (following, there) in pairwise(parts):
            if not self._adjoin(index, place, there):
                if following.is_call:
                    raise self._error(index, "the template puts something between its text and its tool call")
                spans.append((start, self._end(index, part, place, following.text[there.lead :])))
                start = there.start
        return [*spans, (start, self._end(index, *parts[-1]))]

    # --- the beginning --------------------------------------------------------------------------------------

    def _begin(self, index: int, part: Part, place: Place) -> int:
        begin = self._generation_begin(index) if self._chat.messages[index].get("role") == "assistant" else None
        if begin is not None and (begin.exact or part.is_call) and begin.position <= place.start:
            return begin.position
        if part.is_call:
            raise self._error(index, "it begins with a tool call, and the generation prompt before it is another")
        return place.start

    def _generation_begin(self, index: int) -> _Begin | None:
        """Where the rendering leaves the generation prompt for a message; None if that cannot be compared."""
        before = self._chat.until(index)
        try:
            prompt = self._renderer.render(before, generation_prompt=True)
        except DataError:
            return None
        if self.text.startswith(prompt):
            return _Begin(len(prompt), exact=True)
        previous = self._last_place(index - 1)
        if previous is None:
            return None
        part, place = previous
        there = self._place_in(before, prompt, part, place, generation_prompt=True)
        if there is None:
            return None
        shared = _shared(self.text[place.end :], prompt[there.end :])
        if there.end + len(shared) == len(prompt):
            return _Begin(place.end + len(shared), exact=True)
        return _Begin(place.end + len(_whole_tags(shared)), exact=False)

    def _last_place(self, index: int) -> tuple[Part, Place] | None:
        """The last text of a message whose place is proven."""
        if index < 0:
            return None
        parts = [*spoken_parts(self._chat, index), *call_parts(self._chat, index)]
        findings = self._locate(parts)
        places = [(part, place) for part, place in findings.items() if isinstance(place, Place)]
        return max(places, key=lambda found: found[1].end, default=None)

    # --- the end --------------------------------------------------------------------------------------------

    def _end(self, index: int, part: Part, place: Place, then: str = "") -> int:
        """The end of the span whose last text is at ``place``; ``then`` is a text of the message that is elsewhere."""
        closing = self._closing(index, part, place, then)
        if closing is None and part.is_call:
            raise self._error(index, "the template writes its tool call otherwise when the conversation goes on")
        end = place.end + len(closing or "")
        if closing and self._stop_tokens.stand_before(self.text, end):
            return end
        return self._stop_tokens.end_after(self.text, end) or end

    def _closing(self, index: int, part: Part, place: Place, then: str) -> str | None:
        """What follows a text of a message and still belongs to the message; None if that cannot be told.

        It is what the rendering shares with others that go on differently after the message.
        """
        rest = self.text[place.end :]
        compared = False
        for other, ends in self._alternatives(index):
            try:
                rendered = self._renderer.render(other)
            except DataError:
                continue
            there = self._place_in(other, rendered, part, place)
            if there is None:
                continue
            compared = True
            other_rest = rendered[there.end :]
            shared = _shared(rest, other_rest)
            if len(shared) < len(other_rest if ends else rest):
                shared = _whole_tags(shared)
                if not all(self._begins_anew(text[len(shared) :], then) for text in (rest, other_rest)):
                    continue
            shared = shared.rstrip()
            return shared if part.is_call else self._stop_tokens.until_end_of_sequence(shared)
        is_last = index + 1 == len(self._chat.messages)
        return rest.rstrip() if is_last and (part.is_call or not compared) else None

    def _alternatives(self, index: int) -> Iterator[tuple[Chat, bool]]:
        """Conversations that go on differently after a message, and whether they end with it."""
        messages, tools = self._chat.messages, self._chat.tools
        until = messages[: index + 1]
        if index + 1 < len(messages):
            yield Chat(until, tools), True
        following = messages[index + 1].get("role") if index + 1 < len(messages) else None
        calls = messages[index].get("tool_calls")
        if calls and following is None:
            name = calls[-1].get("function", calls[-1])["name"]
            answer = {"role": "tool", "content": "text", "name": name, "tool_call_id": calls[-1].get("id", "0")}
            yield Chat([*until, answer], tools), False
        role = "user" if messages[index].get("role") == "assistant" and following != "user" else "assistant"
        yield Chat([*until, {"role": role, "content": "text"}], tools), False

    def _begins_anew(self, rest: str, then: str) -> bool:
        """Whether a text begins with a tag, a special token or ``then``, or has nothing in it."""
        begin = rest.lstrip()
        known = begin[:1] in ("", "<", "[") or (then and begin.startswith(then))
        return bool(known) or self._stop_tokens.end_after(rest, 0) is not None

    def _adjoin(self, index: int, one: Place, other: Place) -> bool:
        """Whether nothing of another message stands between two texts of a message."""
        for following in range(index + 1, len(self._chat.messages)):
            if self._chat.messages[following].get("role") != "tool":
                break
            for part, place in self._locate(spoken_parts(self._chat, following)).items():
                if isinstance(place, Unproven):
                    raise self._error(following, f"of its {part.path[0]}, {place.reason}")
                if place is not None and one.end <= place.start <= other.start:
                    return False
        return True

    # --- comparing renderings -------------------------------------------------------------------------------

    def _locate(self, parts: Sequence[Part]) -> dict[Part, Finding]:
        return locate(self._renderer.render, self._chat, self.text, parts)

    def _place_in(
        self, chat: Chat, rendered: str, part: Part, place: Place, generation_prompt: bool = False
    ) -> Place | None:
        """The place in ``rendered``, the text of ``chat``, of a part whose place in this conversation is known."""
        if rendered[: place.end] == self.text[: place.end]:
            return place
        marked = Marked(lambda shown: self._renderer.render(shown, generation_prompt), chat, rendered)
        found = marked.places([(part, place.lead, place.trail)])
        there = found[part] if found else None
        return there if isinstance(there, Place) else None

    def _error(self, index: int, reason: str) -> MaskError:
        message = self._chat.messages[index]
        return MaskError(
            f"{self._renderer.name(self._chat)}: which text belongs to message {index + 1} (role "
            f"'{message.get('role')}') cannot be proven: {reason}. Give another template as data.NAME.template, or "
            "put {% generation %} marks into this one."
        )


def _shared(one: str, other: str) -> str:
    """The longest beginning that both have."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return one[:low]


def _whole_tags(shared: str) -> str:
    """What two texts share, without the beginning of two tags that are not the same."""
    return _UNFINISHED_TAG.sub("", shared)
