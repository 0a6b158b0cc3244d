"""From where to where somebody speaks: the spans of a message's turn in the rendered conversation, proven.

Its texts stand where :mod:`postlude.data.sentinels` finds them. Round them, a turn of the assistant goes from the end
of the generation prompt to the end of the stop token, and both ends come from renderings of the same conversation:

- cut off before the message, with a generation prompt: the turn begins where the whole rendering leaves that;
- cut off after the message: the turn ends where the whole rendering leaves that. What is shared by a conversation
  that ends and by one that goes on belongs to the turn, not to the message that follows. A special token that comes
  next is the turn's last, as a model has to make it to stop.

Templates write earlier turns otherwise than the last one. Where that is so, the renderings are compared from the
nearest proven text on. Where there is no generation prompt, or one that says more than the turn has (an opened
thinking part), the turn begins with its first proven text. Of turns that are parted from their neighbours by the very
same text, the first is rendered and the others follow it, so that a long conversation takes few renderings, most of
them short.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from postlude.data.chat import Chat, ChatRenderer, StopTokens
from postlude.data.sentinels import Finding, Marked, Part, Place, Unproven, call_parts, locate, spoken_parts
from postlude.errors import DataError

_UNFINISHED_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")
"""What two different tags have in common: ``<|`` of ``<|end|>`` and ``<|user|>``."""

Span = tuple[int, int]
"""From one character of the rendered text to before another."""

_Gap = tuple[str | None, ...]
"""What stands between a turn and its neighbour, and who the neighbour is."""


class MaskError(DataError):
    """Which tokens of a turn are its own cannot be proven."""


@dataclass(frozen=True)
class _Text:
    """A part of a message at its proven place."""

    part: Part
    place: Place

    @property
    def start(self) -> int:
        return self.place.start

    @property
    def end(self) -> int:
        return self.place.end

    @property
    def key(self) -> str:
        """Which part of a message it is."""
        return str(self.part.path[0])


@dataclass(frozen=True)
class _Begin:
    position: int
    exact: bool
    """Whether a generation prompt comes before it, a whole one and not only its beginning."""


class Turns:
    """The turns of one conversation, in its rendering ``text``."""

    def __init__(self, renderer: ChatRenderer, stop_tokens: StopTokens, chat: Chat) -> None:
        self._renderer, self._stop_tokens, self._chat = renderer, stop_tokens, chat
        self.text = renderer.render(chat)
        self._findings: dict[Part, Finding] = {}
        self._prompts: dict[_Gap, str] = {}
        """What stands between the text before a turn and the turn, where it is proven."""
        self._openings: dict[_Gap, str] = {}
        """What stands between a turn and the text after it, where it is proven."""

    def spans(self, indices: Sequence[int]) -> dict[int, list[Span]]:
        """The spans of the messages at ``indices``: mostly one each, none where the template leaves a message out.

        MaskError, naming template and message, if that cannot be proven.
        """
        parts = [[*spoken_parts(self._chat, i), *call_parts(self._chat, i)] for i in range(len(self._chat.messages))]
        wanted = [part for i in indices for part in parts[i]]
        others: dict[str | None, list[Part]] = {}
        for i, several in enumerate(parts):
            if i not in indices:
                others.setdefault(self._role(i), []).extend(several)
        self._findings = self._locate(wanted, list(others.values()))
        return {i: self._spans(i, self._texts(i)) for i in indices}

    def _spans(self, index: int, texts: list[_Text]) -> list[Span]:
        """One span over the texts, or more where the template puts the result of a call between them."""
        if not texts:
            return []
        spans = []
        start = self._begin(index, texts[0])
        for text, following in pairwise(texts):
            if not self._adjoin(index, text, following):
                if following.part.is_call:
                    raise self._error(index, "the template puts something between its text and its tool call")
                elsewhere = following.part.text[following.place.lead :]
                spans.append((start, self._proven_end(index, text, elsewhere)))
                start = following.start
        return [*spans, (start, self._end(index, texts[-1]))]

    # --- the texts of a message -----------------------------------------------------------------------------

    def _texts(self, index: int) -> list[_Text]:
        """The texts of a message in the order of the rendering. MaskError if the place of one is not known."""
        spoken = self._in_rendering(spoken_parts(self._chat, index))
        call = call_parts(self._chat, index)
        proven = [_Text(part, place) for part in call if isinstance(place := self._findings[part], Place)]
        return sorted([*spoken, *(proven[:1] or self._in_rendering(call))], key=lambda text: text.start)

    def _in_rendering(self, parts: list[Part]) -> list[_Text]:
        texts = []
        for part in parts:
            finding = self._findings[part]
            if isinstance(finding, Unproven):
                raise self._error(part.message, f"of its {part.path[0]}, {finding.reason}")
            if finding is not None:
                texts.append(_Text(part, finding))
        return texts

    def _neighbour(self, index: int) -> list[_Text]:
        """The texts of a message beside a turn; none where they are not known."""
        try:
            return self._texts(index) if 0 <= index < len(self._chat.messages) else []
        except MaskError:
            return []

    def _role(self, index: int) -> str | None:
        return self._chat.messages[index].get("role") if 0 <= index < len(self._chat.messages) else None

    def _adjoin(self, index: int, first: _Text, second: _Text) -> bool:
        """Whether nothing of another message stands between two texts of a message."""
        following = index + 1
        while self._role(following) == "tool":
            spoken = spoken_parts(self._chat, following)
            self._findings |= self._locate([part for part in spoken if isinstance(self._findings[part], Unproven)])
            if any(first.end <= text.start <= second.start for text in self._texts(following)):
                return False
            following += 1
        return True

    # --- the beginning --------------------------------------------------------------------------------------

    def _begin(self, index: int, first: _Text) -> int:
        before = self._neighbour(index - 1)
        if not before or before[-1].end > first.start:
            return self._proven_begin(index, first).position
        start = before[-1].end
        between = self.text[start : first.start]
        neighbours = (self._role(index - 1), before[-1].key, first.key)
        known = self._prompts.get((*neighbours, between))
        if known is None and first.place.lead:  # the thinking in the text is in between, and it never is the same
            known = self._prompts.get(neighbours)
        if known is None or not between.startswith(known):
            begin = self._proven_begin(index, first)
            if begin.position < start:
                return begin.position
            known = self.text[start : begin.position]
            self._prompts[(*neighbours, between)] = known
            if begin.exact:
                self._prompts[neighbours] = known
        return start + len(known)

    def _proven_begin(self, index: int, first: _Text) -> _Begin:
        begin = self._generation_begin(index) if self._role(index) == "assistant" else None
        if begin is not None and (begin.exact or first.part.is_call) and begin.position <= first.start:
            return begin
        if first.part.is_call:
            raise self._error(index, "it begins with a tool call, and the generation prompt before it is another")
        return _Begin(first.start, exact=False)

    def _generation_begin(self, index: int) -> _Begin | None:
        """Where the rendering leaves the generation prompt for a message; None if that cannot be compared."""
        before = self._chat.until(index)
        try:
            prompt = self._renderer.render(before, generation_prompt=True)
            is_there = prompt != self._renderer.render(before)
        except DataError:
            return None
        if self.text.startswith(prompt):
            return _Begin(len(prompt), exact=is_there)
        previous = self._neighbour(index - 1)
        there = self._place_in(before, prompt, previous[-1], generation_prompt=True) if previous else None
        if there is None:
            return None
        start = previous[-1].end
        shared = _common_beginning(self.text[start:], prompt[there.end :])
        if there.end + len(shared) == len(prompt):
            return _Begin(start + len(shared), exact=is_there)
        return _Begin(start + len(_whole_tags(shared)), exact=False)

    # --- the end --------------------------------------------------------------------------------------------

    def _end(self, index: int, last: _Text) -> int:
        after = self._neighbour(index + 1)
        if not after or after[0].start < last.end:
            return self._proven_end(index, last)
        start = after[0].start
        between = self.text[last.end : start]
        neighbours = (self._role(index), last.key, self._role(index + 1), after[0].key)
        known = self._openings.get((*neighbours, between))
        if known is None and last.part.is_call:  # the rest of the call is in between
            known = self._openings.get(neighbours)
        if known is None or not between.endswith(known):
            end = self._proven_end(index, last)
            if end > start:
                return end
            known = self.text[end:start]
            self._openings[(*neighbours, between)] = self._openings[neighbours] = known
        return start - len(known)

    def _proven_end(self, index: int, last: _Text, elsewhere: str = "") -> int:
        """The end of the span with this last text; ``elsewhere`` is a text of the message that stands not in it."""
        closing = self._closing(index, last, elsewhere)
        if closing is None and last.part.is_call:
            raise self._error(index, "the template writes its tool call otherwise when the conversation goes on")
        end = last.end + len(closing or "")
        if closing and self._stop_tokens.stand_before(self.text, end):
            return end
        return self._stop_tokens.end_after(self.text, end) or end

    def _closing(self, index: int, last: _Text, elsewhere: str) -> str | None:
        """What follows the last text of a message and still belongs to it; None if that cannot be told.

        It is what the rendering shares with others that go on differently after the message.
        """
        rest = self.text[last.end :]
        compared = False
        for other, ends in self._alternatives(index):
            try:
                rendered = self._renderer.render(other)
            except DataError:
                continue
            there = self._place_in(other, rendered, last)
            if there is None:
                continue
            compared = True
            other_rest = rendered[there.end :]
            shared = _common_beginning(rest, other_rest)
            if len(shared) < len(other_rest if ends else rest):
                shared = _whole_tags(shared)
                if not all(self._begins_anew(text[len(shared) :], elsewhere) for text in (rest, other_rest)):
                    continue
            shared = shared.rstrip()
            return shared if last.part.is_call else self._stop_tokens.until_end_of_sequence(shared)
        is_last = index + 1 == len(self._chat.messages)
        return rest.rstrip() if is_last and (last.part.is_call or not compared) else None

    def _alternatives(self, index: int) -> Iterator[tuple[Chat, bool]]:
        """Conversations that go on differently after a message, and whether they end with it."""
        messages, tools = self._chat.messages, self._chat.tools
        until = messages[: index + 1]
        following = self._role(index + 1)
        calls = messages[index].get("tool_calls")
        if following is not None:
            yield Chat(until, tools), True
        elif calls:
            name = calls[-1].get("function", calls[-1])["name"]
            answer = {"role": "tool", "content": "text", "name": name, "tool_call_id": calls[-1].get("id", "0")}
            yield Chat([*until, answer], tools), False
        role = "user" if self._role(index) == "assistant" and following != "user" else "assistant"
        yield Chat([*until, {"role": role, "content": "text"}], tools), False

    def _begins_anew(self, rest: str, elsewhere: str) -> bool:
        """Whether a text begins with a tag, a special token or ``elsewhere``, or has nothing in it."""
        begin = rest.lstrip()
        known = begin[:1] in ("", "<", "[") or (elsewhere and begin.startswith(elsewhere))
        return bool(known) or self._stop_tokens.end_after(rest, 0) is not None

    # --- comparing renderings -------------------------------------------------------------------------------

    def _locate(self, parts: Sequence[Part], context: Sequence[Sequence[Part]] = ()) -> dict[Part, Finding]:
        return locate(self._renderer.render, self._chat, self.text, parts, context)

    def _place_in(self, chat: Chat, rendered: str, text: _Text, generation_prompt: bool = False) -> Place | None:
        """The place in ``rendered``, the rendering of ``chat``, of a text of this conversation."""
        if rendered[: text.end] == self.text[: text.end]:
            return text.place
        marked = Marked(lambda shown: self._renderer.render(shown, generation_prompt), chat, rendered)
        findings = marked.places([(text.part, text.place.lead, text.place.trail)]) or {}
        there = findings.get(text.part)
        return there if isinstance(there, Place) else None

    def _error(self, index: int, reason: str) -> MaskError:
        return MaskError(
            f"{self._renderer.name(self._chat)}: which text belongs to message {index + 1} (role "
            f"'{self._role(index)}') cannot be proven: {reason}. Give another template as data.NAME.template, or "
            "put {% generation %} marks into this one."
        )


def _common_beginning(text: str, other: str) -> str:
    """The longest beginning that both have."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def _whole_tags(shared: str) -> str:
    """What two texts share, without the beginning of two tags that are not the same."""
    return _UNFINISHED_TAG.sub("", shared)
