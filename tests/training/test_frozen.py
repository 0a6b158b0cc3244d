"""Frozen models over packed documents: likelihoods are those of transformers, whatever is packed together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from postlude.data.document import WEIGHT, Document
from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.schema import ModelFrom, NewModel, TokenizerFrom
from postlude.model.load import load_model
from postlude.training.frozen import likelihoods

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def model():
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    return load_model(ModelFrom(new=NewModel(architecture="llama", config=SHAPE)), None, tokenizer, seed=3)


@torch.no_grad()
def test_likelihoods_are_those_of_transformers(model):
    generator = np.random.default_rng(0)
    documents = []
    for length in (7, 30, 2, 64, 11):
        weights = (generator.random(length) < 0.6).astype(np.float32)
        weights[[0, -1]] = 0, 1
        documents.append(Document(str(length), "s", generator.integers(0, 256, length), {WEIGHT.name: weights}))
    for document, found in zip(documents, likelihoods(model, documents, block=48), strict=True):
        ids = torch.from_numpy(document.tokens)[None]
        with model.plain() as causal:
            rows = causal(ids).logits[0, :, : model.vocabulary].log_softmax(-1)
        each = rows[:-1].gather(1, ids[0, 1:, None])[:, 0]
        weights = torch.from_numpy(document.streams[WEIGHT.name])[1:]
        assert found.log_probability == pytest.approx(float((each * weights).sum()), abs=1e-4)
        assert found.tokens == found.weight == int(weights.sum())
