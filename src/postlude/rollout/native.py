"""The native engine: any transformers causal language model, through its own forward pass and its own cache.

Notable:

- Requests of similar length share a batch, the longest first; shorter prompts are padded on the left.
- Samples of one prompt share its forward pass: the cache is copied to each afterwards.
- A row that has ended leaves the batch and the cache at once, so nothing is computed for it any more.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from postlude.manifest.errors import ManifestError
from postlude.rollout.engine import Completion, Request, Sampling
from postlude.rollout.sampling import choose, stream_key, uniforms


class NativeEngine:
    """Completions of a model that attends as transformers has it.

    ``vocabulary`` is the number of real tokens where the model's is padded; ``batch`` is how many completions are made
    at a time. The weights are used as they stand when :meth:`generate` is called.
    """

    def __init__(self, causal: PreTrainedModel, vocabulary: int | None = None, batch: int = 64) -> None:
        self.causal, self.vocabulary, self.batch = causal, vocabulary, batch
        self._takes = set(inspect.signature(causal.forward).parameters)

    @property
    def context(self) -> int | None:
        return getattr(self.causal.config.get_text_config(), "max_position_embeddings", None)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See :meth:`postlude.rollout.engine.Engine.generate`. ManifestError for an architecture without a cache."""
        for request in requests:
            if not request.tokens:
                raise ValueError(f"The prompt '{request.prompt_id}' has no tokens.")
            if self.context is not None and len(request.tokens) >= self.context:
                raise ValueError(
                    f"The prompt '{request.prompt_id}' has {len(request.tokens)} tokens and leaves no room in a "
                    f"context of {self.context}."
                )
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].tokens), i))
        done: list[Completion | None] = [None] * len(requests)
        with torch.no_grad(), _evaluating(self.causal):
            for start in range(0, len(order), self.batch):
                places = order[start : start + self.batch]
                batch = _Batch([requests[place] for place in places], sampling, self.context)
                self._run(batch)
                for place, completion in zip(places, batch.completions(), strict=True):
                    done[place] = completion
        return [completion for completion in done if completion is not None]

    def _run(self, batch: _Batch) -> None:
        prompts, owners = _shared([request.tokens for request in batch.requests])
        tokens, mask = _left_padded(prompts)
        tokens, mask = tokens.to(self.causal.device), mask.to(self.causal.device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits, cache = self._forward(tokens, mask, positions, None)
        rows = torch.tensor(owners, device=mask.device)
        if len(prompts) < len(owners):
            cache.batch_select_indices(rows)
        logits, mask, positions = logits[rows], mask[rows], positions[rows, -1:]
        while True:
            chosen = batch.choose(logits)
            left = batch.left()
            if not len(left):
                return
            if len(left) < len(chosen):
                rows = torch.tensor(left, device=mask.device)
                cache.batch_select_indices(rows)
                chosen, mask, positions = chosen[rows], mask[rows], positions[rows]
            batch.keep(left)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = positions + 1
            logits, cache = self._forward(chosen[:, None], mask, positions, cache)

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The logits [rows, vocabulary] after the last token of each row, and the cache with these tokens in it."""
        also: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        output = self.causal(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in also.items() if name in self._takes},
        )
        cache = getattr(output, "past_key_values", None)
        if not hasattr(cache, "batch_select_indices"):
            raise ManifestError(
                f"The architecture '{self.causal.config.model_type}' keeps no cache of keys and values, which this "
                "engine generates with. Choose a model of attention layers."
            )
        return output.logits[:, -1, : self.vocabulary], cache


class _Batch:
    """Requests that are answered together, and what was sampled for each so far."""

    def __init__(self, requests: Sequence[Request], sampling: Sampling, context: int | None) -> None:
        self.requests, self.sampling = requests, sampling
        self._keys = [stream_key(sampling.seed, request.prompt_id, request.sample) for request in requests]
        room = [sampling.max_tokens if context is None else context - len(request.tokens) for request in requests]
        self._limits = [min(sampling.max_tokens, tokens) for tokens in room]
        self._tokens: list[list[int]] = [[] for _ in requests]
        self._log_probabilities: list[list[float]] = [[] for _ in requests]
        self._live = list(range(len(requests)))
        """The request of each row that is left."""
        self._position = 0

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of every row that is left, [rows], on the device of the logits [rows, vocabulary]."""
        numbers = uniforms([self._keys[row] for row in self._live], self._position)
        chosen, log_probabilities = choose(logits, numbers, self.sampling.temperature, self.sampling.top_p)
        for row, token, value in zip(self._live, chosen.tolist(), log_probabilities.tolist(), strict=True):
            self._tokens[row].append(token)
            self._log_probabilities[row].append(value)
        self._position += 1
        return chosen

    def left(self) -> list[int]:
        """Which of the rows go on."""
        return [
            place
            for place, row in enumerate(self._live)
            if self._tokens[row][-1] not in self.sampling.stop_ids and len(self._tokens[row]) < self._limits[row]
        ]

    def keep(self, rows: Sequence[int]) -> None:
        self._live = [self._live[row] for row in rows]

    def completions(self) -> Iterator[Completion]:
        for request, tokens, values in zip(self.requests, self._tokens, self._log_probabilities, strict=True):
            ended = tokens[-1] in self.sampling.stop_ids
            yield Completion(request, tuple(tokens), tuple(values), "stop" if ended else "length")


def _shared(prompts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The different prompts, and for each request which of them is its own."""
    places: dict[tuple[int, ...], int] = {}
    owners = [places.setdefault(prompt, len(places)) for prompt in prompts]
    return list(places), owners


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [prompts, longest] int64 both. The id of padding means nothing: it is never attended to."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask


@contextmanager
def _evaluating(causal: PreTrainedModel) -> Iterator[None]:
    """While this is open nothing is dropped out; a model in training goes on training afterwards."""
    training = causal.training
    causal.eval()
    try:
        yield
    finally:
        causal.train(training)
