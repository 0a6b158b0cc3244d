"""A reward model scores the conversation as transformers renders it."""

from __future__ import annotations

import pytest
import torch

from postlude.data.example import Conversation, Text
from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, NewModel, TokenizerFrom
from postlude.model.load import load_model
from postlude.rollout.scoring import RewardModel

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def tokenizer():
    return load_tokenizer(TokenizerFrom(bytes=True))


@pytest.fixture
def model(tokenizer):
    return load_model(ModelFrom(new=NewModel(architecture="llama", config=SHAPE)), None, tokenizer, seed=3)


def conversation(number: int) -> Conversation:
    return Conversation(
        [{"role": "user", "content": "Count." * number}, {"role": "assistant", "content": "one, " * number + "done"}]
    )


@torch.no_grad()
def test_a_score_is_the_scalar_head_at_the_last_token(model, tokenizer):
    model.add_scalar_head(seed=5)
    reward_model = RewardModel(model, tokenizer, "judge", block=100)
    answers = [(str(n), conversation(n)) for n in range(1, 12)]
    scores = reward_model.score(answers)
    for (_, answer), score in zip(answers, scores, strict=True):
        ids = tokenizer.apply_chat_template(list(answer.messages), return_tensors="pt", return_dict=True).input_ids
        with model.plain() as causal:
            hidden = causal.model(ids).last_hidden_state[0, -1]
        assert score == pytest.approx(float(hidden @ model.scalar.weight[0]), abs=1e-5)
    assert len(set(scores)) == len(scores)


@torch.no_grad()
def test_a_text_ends_with_its_end_of_sequence(model, tokenizer):
    model.add_scalar_head()
    (score,) = RewardModel(model, tokenizer, "judge", block=100).score([("a", Text([("Once ", 0.0), ("upon", 1.0)]))])
    ids = torch.tensor([[*tokenizer("Once upon").input_ids, tokenizer.eos_token_id]])
    with model.plain() as causal:
        hidden = causal.model(ids).last_hidden_state[0, -1]
    assert score == pytest.approx(float(hidden @ model.scalar.weight[0]), abs=1e-5)


def test_a_model_without_a_head_cannot_judge(model, tokenizer):
    with pytest.raises(ManifestError, match="'sft' has no head that scores"):
        RewardModel(model, tokenizer, "sft", block=100)
