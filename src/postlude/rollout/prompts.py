"""From an example to what a model is asked, in messages or text and in token ids, and from its ids back to text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

from postlude.data.chat import Chat, ChatRenderer
from postlude.data.encode import Encoder
from postlude.data.example import Answer, Conversation, Example, Judged, Ranked, Record, Text, Tokens, answers_of
from postlude.data.unprinted import unprinted
from postlude.errors import DataError
from postlude.rollout.calls import spoken
from postlude.rollout.reward import REFERENCE, Asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTING = (Conversation, Text, Ranked, Judged)
"""The shapes of examples that have a prompt."""
EMPTY = "the prompt is empty"


_TURN = "\ue000turn\ue001"
"""Stands for a turn whose tokens are known, while what comes after it is rendered."""


class NoPrompt(ValueError):
    """An example that asks nothing. The message says why, in words that are the same for many examples."""


@dataclass(frozen=True)
class NotAsked:
    """An example that is not put to a model, and why."""

    example_id: str
    source: str
    reason: str
    """In words that are the same for many examples."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    example_id: str
    source: str
    """The name of the data set."""
    asked: Asked
    tools: Sequence[Mapping[str, Any]] | None
    reference: str | None
    """What the data answer, where they do; calls of tools in it as :func:`~postlude.rollout.calls.spoken` has them."""
    record: Record
    """The whole record that it comes from."""
    turn: Mapping[str, Any] | None = None
    """The message that the data answer with."""

    @property
    def rewarded_record(self) -> Record:
        """The record as a reward gets it: with what the data answer, unless a column has that name."""
        return {REFERENCE: self.reference, **self.record}

    def answered(self, completion: str) -> Answer:
        """The prompt with an answer to it, the answer trained."""
        if isinstance(self.asked, str):
            return Text([(self.asked, 0.0), (completion, 1.0)])
        turn: Mapping[str, Any] = {"role": "assistant", "content": completion}
        if self.turn is not None and spoken(self.turn) == completion:
            turn = self.turn
        return Conversation([*self.asked, turn], self.tools)


def prompt_of(example: Example, example_id: str, source: str, record: Record) -> Prompt:
    """The prompt in an example: its conversation without the last turn of the assistant, or its text up to where it
    is trained; plain text asks for its continuation. :class:`NoPrompt` if nothing is asked.
    """
    first = answers_of(example)[0]
    if isinstance(first, Tokens):
        raise NoPrompt("token ids are no prompt")
    if isinstance(first, Text):
        asked, reference = _parted(first)
        if not asked:
            raise NoPrompt(EMPTY)
        return Prompt(example_id, source, asked, None, reference, record)
    messages = [{k: v for k, v in message.items() if k != "weight"} for message in first.messages]
    turn = messages.pop() if messages and messages[-1]["role"] == "assistant" else None
    if not messages:
        raise NoPrompt("nothing comes before the assistant's turn")
    if messages[-1]["role"] in ("system", "developer", "assistant"):
        raise NoPrompt(f"the prompt ends with a message of the role '{messages[-1]['role']}'")
    answer = None if turn is None else spoken(turn)
    return Prompt(example_id, source, messages, first.tools, answer, record, turn)


def _parted(text: Text) -> tuple[str, str | None]:
    """What is given and what is to be learned; all of it is given where nothing else is."""
    pieces = list(text.pieces)
    given = next((i for i, (_, weight) in enumerate(pieces) if weight), len(pieces))
    if given == 0:
        return "".join(piece for piece, _ in pieces), None
    return "".join(piece for piece, _ in pieces[:given]), "".join(piece for piece, _ in pieces[given:]) or None


class PromptEncoder:
    """Prompts as token ids, and completions as text. ``template`` stands in for the tokenizer's own chat template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, today: datetime | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._template, self._today = template, today

    def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids that an answer continues. ManifestError if messages need a template and there is none,
        DataError where the template refuses them."""
        if isinstance(prompt.asked, str):
            ids = list(self.tokenizer(prompt.asked).input_ids)
            if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()  # some tokenizers end every text, and nothing would follow
            return tuple(ids)
        return self._ids(self._rendered(prompt, []))

    def unprinted(self, prompt: Prompt) -> set[str]:
        """What the template leaves out of a prompt (:data:`postlude.manifest.schema.Unprinted`). Raises as above."""
        if isinstance(prompt.asked, str):
            return set()
        renderer, chat = self._chat_renderer, _chat(prompt)
        render = partial(renderer.render, generation_prompt=True)
        return {omission.kind for omission in unprinted(render, chat, render(chat))}

    def reply(self, prompt: Prompt, turns: Sequence[str], replies: Sequence[Asked], last: int) -> tuple[int, ...]:
        """The token ids that follow the last of the assistant's turns, up to where the next begins: its end, as far as
        the token ``last`` has not said it, and what was replied. ``replies`` has one for each of the turns.

        DataError where the template refuses the replies, or says nothing after the turn.
        """
        if isinstance(prompt.asked, str):
            return self._ids("".join(map(str, replies[-1:])))
        messages: list[Mapping[str, Any]] = []
        for turn, reply in zip([*turns[:-1], _TURN], replies, strict=True):
            messages.append({"role": "assistant", "content": turn})
            messages += [{"role": "user", "content": reply}] if isinstance(reply, str) else reply
        before, found, after = self._rendered(prompt, messages).rpartition(_TURN)
        if not found or _TURN in before:
            raise DataError(
                f"The chat template does not say a turn of the assistant once, at '{prompt.example_id}': it cannot "
                "carry a conversation on."
            )
        ids = self._ids(after)
        return ids[1:] if ids[:1] == (last,) else ids

    @cached_property
    def _chat_renderer(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer, self._template, self._today)

    def _rendered(self, prompt: Prompt, more: Sequence[Mapping[str, Any]]) -> str:
        return self._chat_renderer.render(_chat(prompt, more), generation_prompt=True)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the end of a sequence, and what the template ends a turn with."""
        return Encoder(self.tokenizer, template=self._template, block=1, today=self._today).stop_ids

    def text(self, tokens: Sequence[int]) -> str:
        """What a completion says, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _chat(prompt: Prompt, more: Sequence[Mapping[str, Any]] = ()) -> Chat:
    return Chat.of(Conversation([*cast(Sequence[Mapping[str, Any]], prompt.asked), *more], prompt.tools))


class PromptEncoders:
    """How the prompts of several data sets are put to one model. ``templates`` stand in for the tokenizer's own chat
    template, by data set; prompts of those in ``skipping`` that cannot be rendered are left out."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: Mapping[str, str | None],
        skipping: Collection[str] = (),
        today: datetime | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._skipping = skipping
        self._encoders = {name: PromptEncoder(tokenizer, template, today) for name, template in templates.items()}

    def __getitem__(self, source: str) -> PromptEncoder:
        return self._encoders[source]

    def tokens(self, prompt: Prompt, longest: int | None = None) -> tuple[int, ...] | NotAsked:
        """The prompt's token ids, or why there are none: more than ``longest`` are too many. DataError where its
        template refuses it."""
        try:
            tokens = self[prompt.source].tokens(prompt)
        except DataError as error:
            if prompt.source in self._skipping:
                return NotAsked(prompt.example_id, prompt.source, "cannot be rendered")
            raise DataError(
                f"The prompt '{prompt.example_id}' cannot be put to the model: {error} To leave such records out and "
                f"count them, set data.{prompt.source}.on_bad_record to skip."
            ) from error
        if not tokens:
            return NotAsked(prompt.example_id, prompt.source, EMPTY)
        if longest is not None and len(tokens) > longest:
            return NotAsked(prompt.example_id, prompt.source, f"the prompt is longer than {longest} tokens")
        return tokens
