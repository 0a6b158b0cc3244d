"""New tokens in a model that is there: rows of the embedding and of the head, which begin where their parts were.

A token that the tokenizer did not have was split into pieces before. Its row is the mean of theirs, so that the model
begins by taking it for what it read until now; the mean of all rows, where nothing is known of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from postlude.data.tokenizer import NewTokens
from postlude.model import vocabulary
from postlude.model.weights import InMemory, LazyTensor, Region, read_whole

CHUNK = 4096
"""Rows that are read at once to find their mean."""


def config_with_tokens(config: PreTrainedConfig, tokens: NewTokens | None) -> PreTrainedConfig:
    """The configuration of a model with room for the new tokens; a copy, if it had none."""
    if tokens is None or config.get_text_config().vocab_size >= tokens.vocabulary:
        return config
    extended = copy.deepcopy(config)
    extended.get_text_config().vocab_size = tokens.vocabulary
    return extended


def add_tokens(causal: PreTrainedModel, tokens: NewTokens) -> None:
    """Give a model rows for new tokens, in place; what is tied stays tied."""
    vocabulary.replace_rows(causal, lambda parameter: read_whole(WithTokens(InMemory(parameter), tokens)))
    causal.config.get_text_config().vocab_size = vocabulary.rows(causal)


@dataclass(frozen=True)
class WithTokens:
    """A tensor with a row for each token, [tokens, ...], and with those of new tokens, of which parts can be read."""

    of: LazyTensor
    tokens: NewTokens

    @property
    def shape(self) -> tuple[int, ...]:
        return (max(self.of.shape[0], self.tokens.vocabulary), *self.of.shape[1:])

    def read(self, region: Region) -> Tensor:
        rows, there = region[0], self.of.shape[0]
        old = self.of.read((slice(min(rows.start, there), min(rows.stop, there)), *region[1:]))
        values = torch.cat([old, old.new_zeros(rows.stop - rows.start - len(old), *old.shape[1:])])
        for token, pieces in zip(self.tokens.ids, self.tokens.pieces, strict=True):
            if rows.start <= token < rows.stop:
                values[token - rows.start] = self._first(pieces)[region[1:]].to(values.dtype)
        return values

    def _first(self, pieces: Sequence[int]) -> Tensor:
        """The row that a token begins with, [...] in fp32."""
        if not pieces:
            return self._mean
        return torch.stack([self._rows(slice(piece, piece + 1))[0] for piece in pieces]).mean(0)

    @cached_property
    def _mean(self) -> Tensor:
        count = self.of.shape[0]
        parts = [self._rows(slice(start, min(start + CHUNK, count))).sum(0) for start in range(0, count, CHUNK)]
        return torch.stack(parts).sum(0) / count

    def _rows(self, rows: slice) -> Tensor:
        return self.of.read((rows, *(slice(0, size) for size in self.of.shape[1:]))).float()
