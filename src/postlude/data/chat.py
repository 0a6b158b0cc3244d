"""Rendering conversations through a chat template, exactly as transformers' ``apply_chat_template`` does.

Notable:

- The template is compiled once, in the environment of transformers, its sandbox included. It is no code of ours: who
  renders conversations of data does it in a :class:`~postlude.data.room.Room`.
- What a template raises, and what Python raises inside it, becomes one error that names the template and its line.
- A template that asks for the date is told ``today``. A run that pins it renders the same text whenever it resumes.
- Conversations have one form here: texts as content, mappings as arguments. A template that prints those only as lists
  of parts, or as JSON in a text, is given them so; which it wants it shows in renderings of made-up conversations, so
  that every conversation of a template is treated alike.
"""

from __future__ import annotations

import json
import re
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from postlude import storage
from postlude.data.example import Conversation
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

TEMPLATE_SUFFIX = ".jinja"
"""A template that ends with it is the path of one."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""The names under which the thinking part of a message is found in data and in templates."""

_ANSWER = "Certainly so."
_PROBE: list[dict[str, Any]] = [{"role": "user", "content": "Hello there!"}, {"role": "assistant", "content": _ANSWER}]
_PASSED, _RESULT = {"city": "Quebec"}, "sunny"
_CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": _PASSED}}
_CALLING: list[dict[str, Any]] = [
    _PROBE[0],
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "abcdefgh1", "name": "weather", "content": _RESULT},
    _PROBE[1],
]
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}},
    },
}

_TRACKING = threading.Lock()
"""Held while marks are tracked: the whole process shares a compiled template, which tracks one rendering at a time."""


@dataclass(frozen=True)
class Chat:
    """A conversation as a template sees it."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @classmethod
    def of(cls, conversation: Conversation) -> Chat:
        """The conversation without its weights and without what is null; thinking stands under all its usual names."""
        messages = []
        for message in conversation.messages:
            seen = {key: value for key, value in message.items() if value is not None and key != "weight"}
            reasoning = next((seen[key] for key in REASONING_KEYS if key in seen), None)
            if reasoning is not None:
                seen = {"thinking": reasoning, **seen, "reasoning_content": reasoning}
            messages.append(seen)
        tools = None if conversation.tools is None else list(conversation.tools)
        return cls(messages, tools)

    def until(self, index: int) -> Chat:
        """The messages before ``index``."""
        return Chat(self.messages[:index], self.tools)


class ChatRenderer:
    """A tokenizer's chat template, or one given in its place: its text, or the path of a ``.jinja`` file.

    ManifestError if there is no template, if its file is missing, and if it does not compile.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, today: datetime | None = None
    ) -> None:
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._today = today
        self._with_tools: _Compiled | None = None
        self._forms: dict[_Compiled, tuple[Form, Form]] = {}
        if template is not None:
            self._plain = _read_template(template)
            return
        own: str | dict[str, str] | None = tokenizer.chat_template
        named = {"default": own} if isinstance(own, str) else own or {}
        whose = f"the tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "the tokenizer"
        if "default" not in named:
            has = f"several chat templates ({', '.join(sorted(named))}) and none by default" if named else "none"
            raise ManifestError(
                f"Conversations need a chat template, and {whose} has {has}. Give one as data.NAME.template: the path "
                f"of a file that ends in {TEMPLATE_SUFFIX}, or the template itself."
            )
        self._plain = _Compiled(named["default"], f"the chat template of {whose}")
        if "tool_use" in named:
            self._with_tools = _Compiled(named["tool_use"], f"the chat template for tools of {whose}")

    @property
    def text(self) -> str:
        """The template itself, the one for conversations without tools where there are two."""
        return self._plain.text

    def has_marks(self, chat: Chat) -> bool:
        """Whether the template marks by itself what the assistant generates."""
        return self._template(chat).has_marks

    def name(self, chat: Chat) -> str:
        """How to call the template in an error."""
        return self._template(chat).name

    def render(self, chat: Chat, generation_prompt: bool = False) -> str:
        """The text of a conversation. DataError, naming the template, if the template raises."""
        template = self._template(chat)
        with template.translate_errors():
            return template.compiled.render(self._variables(self.as_wanted(chat), generation_prompt))

    def render_marked(self, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where the template's own marks stand in it. DataError as :meth:`render`."""
        template = self._template(chat)
        environment: Any = template.compiled.environment
        variables = self._variables(self.as_wanted(chat), False)
        blocks: list[str] = []
        marks: list[tuple[int, int]] = []
        with template.translate_errors(), _TRACKING, environment.activate_tracker(blocks, marks):
            for block in template.compiled.generate(variables):
                blocks.append(block)
        return "".join(blocks), marks

    def _template(self, chat: Chat) -> _Compiled:
        return self._plain if chat.tools is None or self._with_tools is None else self._with_tools

    # --- the form that a template wants ---------------------------------------------------------------------

    def as_wanted(self, chat: Chat) -> Chat:
        """The conversation in the form that the template prints."""
        template = self._template(chat)
        if template not in self._forms:
            self._forms[template] = self._content_form(template), _as_it_is
            self._forms[template] = self._forms[template][0], self._arguments_form(template)
        content_form, arguments_form = self._forms[template]
        return content_form(arguments_form(chat) if any("tool_calls" in m for m in chat.messages) else chat)

    def _content_form(self, template: _Compiled) -> Form:
        """Parts only for a template that does not print texts, and prints parts."""
        chat = Chat(_PROBE)
        text, in_parts = (self._try(template, form(chat)) for form in (_as_it_is, _with_content_in_parts))
        said = [str(message["content"]) for message in _PROBE]
        return _with_content_in_parts if not _holds(text, said) and _holds(in_parts, said) else _as_it_is

    def _arguments_form(self, template: _Compiled) -> Form:
        """Text only for a template that refuses mappings, drops them or prints them as Python does, and prints text."""
        for tools in ([_TOOL], None):
            chat = self._forms[template][0](Chat(_CALLING, tools))
            as_mapping, as_text = (self._try(template, form(chat)) for form in (_as_it_is, _with_arguments_as_text))
            is_wrong = not _holds(as_mapping, ["Quebec"]) or str(_PASSED) in str(as_mapping)
            if is_wrong and _holds(as_text, [_json(_PASSED)]):
                return _with_arguments_as_text
        return _as_it_is

    def _try(self, template: _Compiled, chat: Chat) -> str | None:
        """The rendering; None if the template refuses it."""
        try:
            with template.translate_errors():
                return template.compiled.render(self._variables(chat, False))
        except DataError:
            return None

    def _variables(self, chat: Chat, generation_prompt: bool) -> dict[str, Any]:
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": chat.messages,
            "tools": chat.tools,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        if self._today is not None:
            variables["strftime_now"] = self._today.strftime
        return variables


Form = Callable[[Chat], Chat]
"""Brings a conversation into the form that a template wants."""


def _as_it_is(chat: Chat) -> Chat:
    return chat


def _with_content_in_parts(chat: Chat) -> Chat:
    return _with_messages(
        chat,
        lambda message: (
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str)
            else message
        ),
    )


def _with_arguments_as_text(chat: Chat) -> Chat:
    def encode(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": encode(call["function"])}
        given = call.get("arguments")
        return call if given is None or isinstance(given, str) else {**call, "arguments": _json(given)}

    return _with_messages(
        chat,
        lambda message: (
            {**message, "tool_calls": [encode(call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
        ),
    )


def _with_messages(chat: Chat, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Chat:
    return Chat([change(message) for message in chat.messages], chat.tools)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _holds(rendered: str | None, texts: Iterable[str]) -> bool:
    return rendered is not None and all(text in rendered for text in texts)


class StopTokens:
    """Tells where in rendered text a special token of the tokenizer stands: what ends a turn is mostly one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        known = sorted(filter(None, special), key=len, reverse=True)
        any_token = "|".join(map(re.escape, known)) if known else "(?!)"
        self._next = re.compile(rf"\s*(?:{any_token})")
        self._longest = max(map(len, known), default=0)
        self._before = re.compile(rf"(?:{any_token})$")
        self._end_of_sequence = tokenizer.eos_token

    def end_after(self, text: str, position: int) -> int | None:
        """Where the special token ends that comes next in ``text``; None if something else comes."""
        match = self._next.match(text, position)
        return match and match.end()

    def stand_before(self, text: str, position: int) -> bool:
        """Whether a special token ends at ``position``."""
        return self._before.search(text[max(position - self._longest, 0) : position]) is not None

    def until_end_of_sequence(self, text: str) -> str:
        """``text`` up to the end of the first end-of-sequence token, or all of it if there is none."""
        token = self._end_of_sequence
        return text[: text.index(token) + len(token)] if token and token in text else text


class _Compiled:
    """A template. ``name`` is how an error calls it."""

    def __init__(self, text: str, name: str) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.text, self.name = text, name
        self._environment = _compile_jinja_template("").environment
        with self._syntax_told():
            self._environment.parse(text)  # and not compiled yet, since that works out what is constant

    @cached_property
    def compiled(self) -> Template:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        with self._syntax_told():
            return _compile_jinja_template(self.text)

    @contextmanager
    def _syntax_told(self) -> Iterator[None]:
        from jinja2 import TemplateSyntaxError

        try:
            yield
        except TemplateSyntaxError as error:
            raise ManifestError(
                f"{self.name} does not compile: line {error.lineno}: {str(error.message).rstrip('.')}. Mend it, or "
                "give another template as data.NAME.template."
            ) from error
        except (SyntaxError, RecursionError) as error:
            raise ManifestError(
                f"{self.name} does not compile: more stands within each other than Python can hold. Give another "
                "template as data.NAME.template."
            ) from error

    @cached_property
    def has_marks(self) -> bool:
        """Whether the first word of some block of the template is ``generation``."""
        begins = False
        for _, kind, text in self._environment.lex(self.text):
            if begins and (kind, text) == ("name", "generation"):
                return True
            begins = kind == "block_begin" or (begins and kind == "whitespace")
        return False

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # somebody else's code: whatever it raises is told with its line
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
            if not lines:
                raise
            raise DataError(
                f"{self.name} cannot render a conversation: line {lines[-1]}: {error or type(error).__name__}"
            ) from error


def _read_template(template: str) -> _Compiled:
    if not template.endswith(TEMPLATE_SUFFIX):
        return _Compiled(template, "the chat template given in the manifest")
    if not storage.exists(template):
        raise ManifestError(f"There is no chat template at {template}. Correct the path in data.NAME.template.")
    return _Compiled(storage.read_text(template), f"the chat template {template}")
