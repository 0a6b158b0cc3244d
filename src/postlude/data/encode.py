"""From examples to documents: token ids with a weight each, every example rendered and tokenised as a whole.

A token counts if any of its characters lies in a trained stretch, and of several stretches the largest weight does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate, islice, takewhile
from typing import TYPE_CHECKING, cast

import numpy as np

from postlude.data.chat import Chat, ChatRenderer, StopTokens
from postlude.data.document import SCORE, WEIGHT, Document
from postlude.data.example import (
    Answer,
    BadRecord,
    Conversation,
    Example,
    Judged,
    Ranked,
    Text,
    Tokens,
    answers_of,
    scores_of,
)
from postlude.data.masks import Masked, Masker, TrainOn, WeightedSpan
from postlude.data.truncate import Policy, shared_limit, truncate
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

NOTHING_TO_TRAIN = "nothing to train on"
"""Why an example is dropped whose tokens all have the weight zero. For truncation see :mod:`postlude.data.truncate`."""

_LEADS = ("\n", "a", "1", "")
"""What a text is put behind that goes on with another; of the last nothing has to be taken away."""
_PROBE_ANSWER = "Good morning."
_PROBE = Conversation([{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": _PROBE_ANSWER}])


@dataclass(frozen=True)
class Encoded:
    """What became of one example: documents, or the reason why there are none, or what is wrong with it."""

    documents: tuple[Document, ...] = ()
    """With the stream ``weight``; several where the example was split, or has several answers. Those of an answer
    have the stream ``score``."""
    dropped: str | None = None
    truncated: int = 0
    """Tokens cut off."""
    unprinted: frozenset[str] = frozenset()
    """What the chat template leaves out (:data:`postlude.manifest.schema.Unprinted`)."""
    error: DataError | BadRecord | None = None
    """The example cannot be used: whether that ends the run or is counted is for the caller to say."""


@dataclass
class _Row:
    """Token ids and their weights, [tokens] int64 and float32."""

    tokens: np.ndarray
    weights: np.ndarray
    unprinted: frozenset[str] = frozenset()


class Encoder:
    """Encodes the examples of one data set.

    ``template`` stands in for the tokenizer's own chat template; ``block`` is the most tokens of a document; ``today``
    is what a template is told that asks for the date (by default the clock); ``drop_unprinted`` names what trained
    turns may lose; ``apart`` tokenises what comes before the last answer by itself, as it is when it is asked.
    ManifestError if the tokenizer cannot
    say where in a text its tokens stand, and, once a conversation comes, if there is no usable template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        train_on: TrainOn = "assistant",
        block: int,
        truncate: Policy = "right",
        today: datetime | None = None,
        drop_unprinted: Collection[str] = (),
        apart: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise ManifestError(
                f"The tokenizer {tokenizer.name_or_path} does not say where in a text its tokens stand, so nothing "
                "tells which of them are trained. Use one that has a tokenizer.json."
            )
        self._tokenizer, self._template, self._train_on = tokenizer, template, train_on
        self._block, self._policy, self._today, self._apart = block, truncate, today, apart
        self._drop_unprinted = drop_unprinted
        self._vocabulary = max(tokenizer.get_vocab().values()) + 1

    @cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(self._tokenizer, self._template, self._today)

    @cached_property
    def _masker(self) -> Masker:
        return Masker(self._renderer, StopTokens(self._tokenizer), self._train_on, self._drop_unprinted)

    @property
    def given_template(self) -> str | None:
        """The text of the template that stands in for the tokenizer's own, if one does."""
        return None if self._template is None else self._renderer.text

    @property
    def rendered_with(self) -> str:
        """The text of the template of conversations, the given one or the tokenizer's own. ManifestError as above."""
        return self._renderer.text

    @cached_property
    def stop_ids(self) -> list[int]:
        """Where generation stops: the end-of-sequence token, and the one with which the template ends a turn."""
        stops = [] if self._tokenizer.eos_token_id is None else [int(self._tokenizer.eos_token_id)]
        if self._probe is not None:
            row = self._probe[1]
            special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
            ends = [i for i in row.tokens[row.weights > 0].tolist() if i in special]
            stops += [i for i in ends[-1:] if i not in stops]
        return stops

    @cached_property
    def remarks(self) -> list[str]:
        """What a user should know about the template before training with it."""
        if self._probe is None or not self._probe[0].text[: self._probe[0].spans[-1][1]].endswith(_PROBE_ANSWER):
            return []
        return [
            f"{self._renderer.name(Chat([]))} writes nothing after the last turn of the assistant, so a model does not "
            "learn to stop there. End the turn in the template, for instance with {{ eos_token }}."
        ]

    @cached_property
    def _probe(self) -> tuple[Masked, _Row] | None:
        """A conversation of one answer, rendered and tokenised; None where there is no template that renders it."""
        try:
            masked = Masker(self._renderer, StopTokens(self._tokenizer), "assistant").mask(_PROBE)
        except (DataError, ManifestError):
            return None
        rows = [_row(encoding, masked.spans) for _, encoding in self._tokenize({0: masked}, add_special_tokens=False)]
        return (masked, rows[0]) if rows else None

    def encode(self, examples: Sequence[tuple[str, Example]], source: str) -> list[Encoded]:
        """Encode examples, each with its id, in order. What is wrong with one is in its place and stops nothing.

        ManifestError where answers that belong together were to be split.
        """
        several = [answers_of(example) for _, example in examples]
        rows = iter(self._rows([answer for answers in several for answer in answers]))
        encoded = []
        for (example_id, example), answers in zip(examples, several, strict=True):
            own = list(islice(rows, len(answers)))
            usable = [row for row in own if row is None or isinstance(row, _Row)]
            if len(usable) < len(own):
                encoded.append(Encoded(error=next(row for row in own if isinstance(row, DataError | BadRecord))))
            elif isinstance(example, Ranked | Judged):
                encoded.append(self._together(usable, scores_of(example), example_id, source))
            else:
                encoded.append(self._documents(usable[0], example_id, source))
        return encoded

    def _rows(self, examples: Sequence[Answer | Tokens]) -> list[_Row | DataError | BadRecord | None]:
        """Each example tokenised; None where nothing is trained, an exception where something is wrong."""
        rows: dict[int, _Row] = {}
        errors: dict[int, DataError | BadRecord] = {}
        chats: dict[int, Masked] = {}
        texts: dict[int, Masked] = {}
        for i, example in enumerate(examples):
            try:
                if isinstance(example, Conversation):
                    chats[i] = self._masker.mask(example)
                elif isinstance(example, Text):
                    texts[i] = _join(example)
                else:
                    rows[i] = self._check_tokens(example)
            except (DataError, BadRecord) as error:
                errors[i] = error
        for i, encoding in self._tokenize(chats, add_special_tokens=False):
            end = self._prompt_end(examples[i], chats[i].text)
            row = self._row_apart(chats[i], end, False) if end else _row(encoding, chats[i].spans)
            rows[i] = replace(row, unprinted=chats[i].unprinted)
        for i, encoding in self._tokenize(texts, add_special_tokens=True):
            text, end = cast(Text, examples[i]), self._prompt_end(examples[i], texts[i].text)
            row = self._row_apart(texts[i], end, True) if end else self._bare(_row(encoding, texts[i].spans))
            rows[i] = self._end_text(row, text)
        return [errors.get(i, rows.get(i)) for i in range(len(examples))]

    def _tokenize(self, texts: Mapping[int, Masked], add_special_tokens: bool) -> Iterator[tuple[int, Encoding]]:
        """The texts in which something is trained, tokenised all at once."""
        trained = {i: masked.text for i, masked in texts.items() if masked.spans}
        backend = self._tokenizer.backend_tokenizer
        # Somebody else's call of the tokenizer may have left these behind.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        encodings = backend.encode_batch(list(trained.values()), add_special_tokens=add_special_tokens)
        return zip(trained, encodings, strict=True)

    @cached_property
    def _added_after_text(self) -> int:
        """How many tokens the tokenizer puts after a text by itself."""
        is_added = self._tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).special_tokens_mask
        return is_added[::-1].index(0)

    def _bare(self, row: _Row) -> _Row:
        """The row of a text: what the tokenizer puts before it stays, what it puts after it does not."""
        length = len(row.tokens) - self._added_after_text
        return _Row(row.tokens[:length], row.weights[:length])

    def _prompt_end(self, example: Answer | Tokens, text: str) -> int:
        """Where in its text the prompt of the last answer ends, if that is tokenised by itself; else 0."""
        if not self._apart or isinstance(example, Tokens):
            return 0
        if isinstance(example, Text):
            return sum(len(piece) for piece, _ in takewhile(lambda piece: not piece[1], example.pieces))
        chat = Chat.of(example)
        if not chat.messages or chat.messages[-1]["role"] != "assistant":
            return 0
        asked = self._renderer.render(chat.until(len(chat.messages) - 1), generation_prompt=True)
        return len(asked) if text.startswith(asked) else 0

    def _row_apart(self, masked: Masked, end: int, add_special_tokens: bool) -> _Row:
        """The tokens of the text up to ``end``, and behind them those of the rest as it goes on in a text."""
        backend, rest = self._tokenizer.backend_tokenizer, masked.text[end:]
        before = backend.encode(masked.text[:end], add_special_tokens=add_special_tokens)
        given = _row(before, [(start, min(stop, end), weight) for start, stop, weight in masked.spans])
        given = self._bare(given) if add_special_tokens else given
        # Some tokenizers put a space before whatever they are given. Behind another character they do not.
        for lead in _LEADS:
            alone = backend.encode(lead, add_special_tokens=False).ids
            after = backend.encode(lead + rest, add_special_tokens=False)
            if after.ids[: len(alone)] == alone:
                break
        shift = end - len(lead)
        row = _row(after, [(max(a, end) - shift, b - shift, weight) for a, b, weight in masked.spans if b > end])
        return _Row(
            np.append(given.tokens, row.tokens[len(alone) :]), np.append(given.weights, row.weights[len(alone) :])
        )

    def whole(self, example: Answer) -> list[int] | None:
        """The token ids of an example that is not truncated; None where nothing is trained, or it cannot be used."""
        [row] = self._rows([example])
        return row.tokens.tolist() if isinstance(row, _Row) else None

    def _end_text(self, row: _Row, example: Text) -> _Row:
        """The row of a text, which ends as the example says."""
        tokens, weights = row.tokens, row.weights
        if example.end:
            end = self._tokenizer.eos_token_id
            if end is None:
                raise ManifestError(
                    f"The tokenizer {self._tokenizer.name_or_path} has no end-of-sequence token, and texts end with "
                    "one. Use another tokenizer, or name the token as eos_token in its tokenizer_config.json."
                )
            last = example.pieces[-1][1] if example.pieces else 0.0
            tokens, weights = np.append(tokens, end), np.append(weights, np.float32(last))
        return _Row(tokens, weights)

    def _check_tokens(self, example: Tokens) -> _Row:
        tokens = np.asarray(example.ids)
        if not len(tokens) or tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise BadRecord("its token ids are not a list of whole numbers with at least one in it")
        for position in ((tokens < 0) | (tokens >= self._vocabulary)).nonzero()[0][:1].tolist():
            raise BadRecord(
                f"its token {position + 1} has the id {tokens[position]}, but the tokenizer's ids go from 0 to "
                f"{self._vocabulary - 1}"
            )
        weights = np.asarray(example.weights, dtype=np.float32)
        if weights.shape != tokens.shape or not np.isfinite(weights).all() or (weights < 0).any():
            raise BadRecord(f"its {len(tokens)} tokens need as many weights, each a number from 0")
        return _Row(tokens.astype(np.int64), weights.copy())

    def _documents(self, row: _Row | None, example_id: str, source: str, limit: int | None = None) -> Encoded:
        if row is None or not row.weights[1:].any():
            return Encoded(dropped=NOTHING_TO_TRAIN)
        kept = truncate(row.weights, limit or self._block, self._policy)
        documents = []
        for start, end in kept.spans:
            weights = row.weights[start:end].copy()
            weights[0] = 0
            documents.append(Document(example_id, source, row.tokens[start:end], {WEIGHT.name: weights}))
        return Encoded(tuple(documents), kept.dropped, kept.cut, row.unprinted)

    def _together(self, rows: Sequence[_Row | None], scores: Sequence[float], example_id: str, source: str) -> Encoded:
        """Answers that stay in one block: all are kept, or none."""
        if self._policy == "split":
            raise ManifestError(
                f"data.{source}.truncate: answers that belong together cannot be split. Choose right, left or drop."
            )
        limit = shared_limit([len(row.tokens) for row in rows if row is not None], self._block)
        documents: list[Document] = []
        cut = 0
        for row, score in zip(rows, scores, strict=True):
            answer = self._documents(row, example_id, source, limit)
            if answer.dropped is not None:
                return answer
            for document in answer.documents:
                streams = {**document.streams, SCORE.name: np.full(len(document), score, np.float32)}
                documents.append(replace(document, streams=streams))
            cut += answer.truncated
        left_out = frozenset[str]().union(*(row.unprinted for row in rows if row is not None))
        return Encoded(tuple(documents), truncated=cut, unprinted=left_out)


def _join(text: Text) -> Masked:
    ends = list(accumulate(len(piece) for piece, _ in text.pieces))
    spans = [(end - len(piece), end, weight) for end, (piece, weight) in zip(ends, text.pieces, strict=True) if weight]
    return Masked("".join(piece for piece, _ in text.pieces), spans)


def _row(encoding: Encoding, spans: Sequence[WeightedSpan]) -> _Row:
    tokens = np.array(encoding.ids, dtype=np.int64)
    weights = np.zeros(len(tokens), dtype=np.float32)
    for start, end, weight in spans:
        if end > start:
            stretch = slice(*_tokens_of(encoding, start, end))
            np.maximum(weights[stretch], weight, out=weights[stretch])
    return _Row(tokens, weights)


def _tokens_of(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """From the first token that has a character from ``start`` to before ``end``, to after the last."""
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:  # a character that the tokenizer drops
        offsets = np.array(encoding.offsets).reshape(-1, 2)
        inside = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero()[0]
        return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
    # A character may be several tokens, of which only the first is told.
    while (following := encoding.token_to_chars(last + 1)) is not None and following[0] < end:
        last += 1
    return first, last + 1
