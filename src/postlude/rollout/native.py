"""The native engine: any transformers causal language model, through its own forward pass.

Notable:

- Requests are answered in a number of rows, the longest prompts first. A row whose completion has ended takes up the
  next request (:class:`Rows`), so a long completion does not hold up the others.
- Samples of one prompt share its forward pass: its keys and values are copied to each afterwards.
- Once nothing waits, rows that have ended are taken out a few at a time, so nothing is computed for them any more.
- A single row is never moved, so the cache that the model itself would make does for it, whatever its layers are.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from postlude.manifest.problem import ManifestError
from postlude.model.language_model import LanguageModel
from postlude.rollout.engine import Completion, Death, Ended, Enough, Request, Sampling, with_version
from postlude.rollout.sampling import choose, draw, stream_key, uniforms
from postlude.telemetry.readings import note_engine
from postlude.training.precision import Precision

GROWTH = 64
"""Columns that are added at least, where there is no room."""


class NativeEngine:
    """Completions of a model that attends as transformers has it.

    ``vocabulary`` is the number of real tokens where the model's is padded; ``batch`` is how many completions are made
    at a time. The weights are used as they stand when :meth:`generate` is called.
    """

    def __init__(self, causal: PreTrainedModel, vocabulary: int | None = None, batch: int = 64) -> None:
        self.causal, self.vocabulary, self.batch = causal, vocabulary, batch
        self._takes = set(inspect.signature(causal.forward).parameters)

    is_external = False

    def update(self, version: int) -> None:
        """The weights are always those of the model as it stands."""

    def deaths(self) -> Sequence[Death]:
        return ()

    def close(self) -> None: ...

    @property
    def context(self) -> int | None:
        return getattr(self.causal.config.get_text_config(), "max_position_embeddings", None)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        """See :meth:`postlude.rollout.engine.Engine.generate`. ManifestError for an architecture without a cache."""
        for request in requests:
            if not request.tokens:
                raise ValueError(f"The prompt '{request.prompt_id}' has no tokens.")
            if self.context is not None and len(request.tokens) >= self.context:
                raise ValueError(
                    f"The prompt '{request.prompt_id}' has {len(request.tokens)} tokens and leaves no room in a "
                    f"context of {self.context}."
                )
        answers = [_Answer(request, sampling, self.context) for request in requests]
        queue = deque(sorted(answers, key=lambda answer: -len(answer.request.tokens)))

        def over() -> bool:
            if enough is None:
                return False
            return enough.reached({place for place, answer in enumerate(answers) if answer.ended})

        with torch.no_grad(), _evaluating(self.causal):
            while queue and not over():
                for _ in _Table(self, sampling, queue, new_cache, over).run():
                    pass
        return [answer.completion() for answer in answers]

    @torch.no_grad()
    def stream(self, request: Request, sampling: Sampling, generator: torch.Generator | None = None) -> Iterator[int]:
        """The tokens of one completion, each as soon as it is sampled, and beyond the context, too. With a
        ``generator`` they are drawn by its numbers, and by all of the distribution."""
        answer, shown = _Answer(request, sampling, None), 0

        def own_cache() -> Cache:
            return DynamicCache(config=self.causal.config.get_text_config())

        with _evaluating(self.causal):
            for _ in _Table(self, sampling, deque([answer]), own_cache, generator=generator).run():
                yield from answer.tokens[shown:]
                shown = len(answer.tokens)

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """The logits [rows, vocabulary] after the last token of each row; the cache then has these tokens in it."""
        also: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        output = self.causal(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in also.items() if name in self._takes},
        )
        if getattr(output, "past_key_values", None) is not cache or not len(cache):
            raise ManifestError(
                f"The architecture '{self.causal.config.model_type}' keeps no cache of keys and values, which this "
                "engine generates with. Choose a model of attention layers."
            )
        return output.logits[:, -1, : self.vocabulary]


class PolicyEngine(NativeEngine):
    """Answers with a model that is trained in this process, ``batch`` completions at a time, in its precision.

    Nothing is copied: the weights are those of the last step.
    """

    def __init__(self, policy: LanguageModel, precision: Precision, batch: int) -> None:
        super().__init__(policy.causal, policy.vocabulary, batch)
        self.policy, self._precision = policy, precision
        self._version = 0

    def update(self, version: int) -> None:
        """Note that the weights are now those after ``version`` steps."""
        self._version = version

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        """See :meth:`postlude.rollout.engine.Engine.generate`."""
        if not requests:
            return []
        begun = time.monotonic()
        with (
            self.policy.plain(),
            self._precision.autocast(self.policy.device),
            torch.compiler.set_stance("force_eager"),
        ):
            completions = super().generate(requests, sampling, enough)
        tokens = sum(len(completion.tokens) for completion in completions)
        note_engine("native", self._version, len(requests), tokens, time.monotonic() - begun)
        return with_version(completions, self._version)


class _Answer:
    """What was sampled for a request so far."""

    def __init__(self, request: Request, sampling: Sampling, context: int | None) -> None:
        self.request, self._sampling = request, sampling
        self.key = stream_key(sampling.seed, request.prompt_id, request.sample)
        room = sampling.max_tokens if context is None else context - len(request.tokens)
        self._limit = min(request.limit or sampling.max_tokens, room)
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []

    @property
    def position(self) -> int:
        return self.request.position + len(self.tokens)

    @property
    def ended(self) -> bool:
        return bool(self.tokens) and (self.tokens[-1] in self._sampling.stop_ids or len(self.tokens) >= self._limit)

    def completion(self) -> Completion:
        ended: Ended = "length" if self.ended else "cut"
        if self.ended and self.tokens[-1] in self._sampling.stop_ids:
            ended = "stop"
        return Completion(self.request, tuple(self.tokens), tuple(self.log_probabilities), ended)


class _Table:
    """Rows at work on a queue of answers, which none longer joins than those that were there first, until it is empty
    or all is ``over``."""

    def __init__(
        self,
        engine: NativeEngine,
        sampling: Sampling,
        queue: deque[_Answer],
        new_cache: Callable[[], Cache],
        over: Callable[[], bool] = lambda: False,
        generator: torch.Generator | None = None,
    ) -> None:
        self._engine, self._sampling, self._queue = engine, sampling, queue
        self._new_cache, self._over, self._generator = new_cache, over, generator
        self._device = engine.causal.device
        self._owners: list[_Answer | None] = []
        """Of each row what it answers; None for one that has ended."""

    def run(self) -> Iterator[None]:
        """Answer the queue: each turn is a token of every row, or the first ones."""
        answers, begun = self._admit(self._engine.batch)
        yield
        if begun is None:
            return
        self._rows, self._owners = begun, list(answers)
        while live := [row for row, owner in enumerate(self._owners) if owner is not None]:
            self._rows.advance()
            tokens = [0 if owner is None else owner.tokens[-1] for owner in self._owners]
            logits = self._engine.forward(
                torch.tensor(tokens, device=self._device)[:, None],
                self._rows.mask,
                self._rows.positions[:, None],
                self._rows.cache,
            )
            owners = [owner for owner in self._owners if owner is not None]
            self._choose(owners, logits if len(live) == len(self._owners) else logits[live])
            self._leave()
            self._refill()
            yield

    def _leave(self) -> None:
        """Take out of their rows the answers that have ended; all of them once it is over."""
        ended = [row for row, owner in enumerate(self._owners) if owner is not None and owner.ended]
        for row in ended:
            self._owners[row] = None
        self._rows.idle(ended)
        if ended and self._over():
            self._owners = []

    def _refill(self) -> None:
        """Give free rows to what waits, some at a time; without anything that waits, take them out."""
        free = [row for row, owner in enumerate(self._owners) if owner is None]
        if len(free) * 8 < len(self._owners):
            return
        if self._queue and len(self._queue[0].request.tokens) <= self._rows.columns:
            answers, begun = self._admit(len(free))
            if begun is not None:
                rows = free[: len(answers)]
                everyone = torch.arange(len(answers), device=self._device)
                self._rows.put(torch.tensor(rows, device=self._device), begun, everyone)
                for row, answer in zip(rows, answers, strict=True):
                    self._owners[row] = answer
        elif not self._queue:
            live = [row for row, owner in enumerate(self._owners) if owner is not None]
            if live:
                self._rows.select(torch.tensor(live, device=self._device))
            self._owners = [self._owners[row] for row in live]

    def _admit(self, count: int) -> tuple[list[_Answer], Rows | None]:
        """The next answers of the queue with their first token, as far as they go on, and rows for them."""
        answers = [self._queue.popleft() for _ in range(min(count, len(self._queue)))]
        if not answers:
            return [], None
        places: dict[tuple[int, ...], int] = {}  # of the different prompts, which several answers may share
        owners = [places.setdefault(answer.request.tokens, len(places)) for answer in answers]
        # The id of padding means nothing: it is never attended to.
        prompts = [torch.tensor(prompt, device=self._device) for prompt in places]
        tokens = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache = self._new_cache()
        logits = self._engine.forward(tokens, mask, positions, cache)
        self._choose(answers, logits[owners])
        kept = [place for place, answer in enumerate(answers) if not answer.ended]
        if not kept:
            return [], None
        rows = torch.tensor([owners[place] for place in kept], device=self._device)
        begun = Rows(cache, mask, positions[:, -1])
        begun.select(rows)  # which prompt each has
        return [answers[place] for place in kept], begun

    def _choose(self, answers: Sequence[_Answer], logits: Tensor) -> None:
        """Sample the next token of each answer from logits [answers, vocabulary]."""
        if self._generator is None:
            numbers = uniforms([answer.key for answer in answers], [answer.position for answer in answers])
            tokens, values = choose(logits, numbers, self._sampling.temperature, self._sampling.top_p)
        else:
            tokens, values = draw(logits, self._sampling.temperature, self._generator)
        for answer, token, log_probability in zip(answers, tokens.tolist(), values.tolist(), strict=True):
            answer.tokens.append(token)
            answer.log_probabilities.append(log_probability)


class RowsLayer(DynamicLayer):
    """Keys and values of one layer, [rows, heads, columns, dim]: views of buffers that have room behind them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; all there is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.columns + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            room = end + max(GROWTH, self.columns // 2)
            self._buffers = self._grown(key_states, room, 0), self._grown(value_states, room, 1)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.columns : end] = new
        return self._view(end)

    def _grown(self, like: Tensor, room: int, which: int) -> Tensor:
        grown = like.new_zeros(*like.shape[:-2], room, like.shape[-1])
        if self._buffers is not None:
            grown[:, :, : self.columns] = self._buffers[which][:, :, : self.columns]
        return grown

    def _view(self, columns: int) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        self.columns = columns
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self._buffers)
        return self.keys, self.values

    def select(self, rows: Tensor, first_column: int = 0) -> None:
        """Keep these rows, [rows] int64, and the columns from one on."""
        assert self._buffers is not None
        self._buffers = tuple(buffer[rows, :, first_column:] for buffer in self._buffers)  # type: ignore[assignment]
        self._view(self.columns - first_column)

    def put(self, rows: Tensor, other: RowsLayer, theirs: Tensor) -> None:
        """Put rows of another layer in place of these, so that they end at the same column."""
        assert self._buffers is not None
        start = self.columns - other.columns
        for buffer, new in zip(self._buffers, (other.keys, other.values), strict=True):
            buffer[rows, :, start : self.columns] = new[theirs]  # type: ignore[index]


class Rows:
    """Rows in flight: their cache, which has room to grow, and of each its mask and the position of its last token.

    Every row ends at the same column, which is that of its last token; what comes before its first token is masked. So
    a prompt enters a free row at any time, its keys and values to the left of that column, and the model's own
    attention needs to know nothing of it: distances between the columns of a row are those between its tokens.
    """

    def __init__(self, cache: Cache, mask: Tensor, positions: Tensor) -> None:
        self.cache, self.mask, self.positions = cache, mask, positions

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def columns(self) -> int:
        return self.mask.shape[1]

    def advance(self) -> None:
        """Make a column for the next token of every row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.positions = self.positions + 1

    def select(self, rows: Tensor) -> None:
        """Keep these rows, [rows] int64, and no column that is masked in all of them."""
        mask = self.mask[rows]
        first = int(mask.any(0).to(torch.int64).argmax())
        if first or not torch.equal(rows, torch.arange(len(self), device=rows.device)):
            for layer in self.cache.layers:
                layer.select(rows, first)  # type: ignore[union-attr]
        self.mask, self.positions = mask[:, first:], self.positions[rows]

    def put(self, rows: Tensor, other: Rows, theirs: Tensor) -> None:
        """Put rows of others, which have no more columns, in place of these."""
        for layer, new in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.put(rows, new, theirs)  # type: ignore[union-attr]
        self.mask[rows] = 0
        self.mask[rows, self.columns - other.columns :] = other.mask[theirs]
        self.positions[rows] = other.positions[theirs]
        if int(self.mask.any(0).to(torch.int64).argmax()) > self.columns // 2:
            self.select(torch.arange(len(self), device=self.mask.device))

    def idle(self, rows: Sequence[int]) -> None:
        """Let rows go along without meaning anything, until others take their place."""
        if rows:
            self.positions[list(rows)] = 0


def new_cache() -> Cache:
    """A cache without rows yet."""
    return Cache(layer_class_to_replicate=RowsLayer)


@contextmanager
def _evaluating(causal: PreTrainedModel) -> Iterator[None]:
    """While this is open nothing is dropped out; a model in training goes on training afterwards."""
    training = causal.training
    causal.eval()
    try:
        yield
    finally:
        causal.train(training)
