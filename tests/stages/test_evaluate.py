"""The recipe ``evaluate``: its numbers are those that transformers and a count by hand give."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.rollout.scoring import pass_at_k

DIGITS = {"function": "stages.scores:digits"}
QUESTIONS = [
    {"question": f"{n}+1?", "choices": [str(n), f"{n + 1} it is", "none"], "answer": "abc"[n % 3]} for n in range(12)
]


@pytest.fixture
def evaluating(project):
    both = {name: {"path": project.models[name]} for name in ("one", "two")}
    project.stages["report"] = {"recipe": "evaluate", "models": both, "threads": 1}
    return project


@pytest.mark.capability(
    "Evaluation as a stage: generation with pass@k, multiple choice, held-out loss, models side by side"
)
def test_the_loss_is_that_of_transformers(evaluating):
    evaluating.stages["report"]["held_out"] = {"data": {"asked": 1.0}}
    assert evaluating.run() == 0
    models = evaluating.report("report")["models"]
    records = [json.loads(line) for line in Path(evaluating.data["asked"]["source"]["path"]).read_text().splitlines()]
    for name in ("one", "two"):
        total, tokens = 0.0, 0
        tokenizer = AutoTokenizer.from_pretrained(evaluating.models[name])
        causal = AutoModelForCausalLM.from_pretrained(evaluating.models[name])
        for record in records:
            encoded = tokenizer.apply_chat_template(
                record["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            ids = torch.tensor([encoded["input_ids"]])
            mask = torch.tensor(encoded["assistant_masks"]).bool()[1:]
            with torch.no_grad():
                rows = causal(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            total, tokens = total - float(rows[mask].sum()), tokens + int(mask.sum())
        found = models[name]["held_out"]["asked"]
        assert found["tokens"] == tokens
        assert found["loss"] == pytest.approx(total / tokens, abs=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert models["one"]["held_out"] != models["two"]["held_out"]


@pytest.mark.parametrize("style", ["messages", "text"])
def test_choices_are_ranked_by_their_likelihood(evaluating, style):
    evaluating.data["asked"] = evaluating.written("questions", QUESTIONS, {"name": "multiple_choice", "style": style})
    evaluating.stages["report"]["choice"] = {"data": {"asked": 1.0}}
    assert evaluating.run() == 0
    tokenizer = AutoTokenizer.from_pretrained(evaluating.models["one"])
    causal = AutoModelForCausalLM.from_pretrained(evaluating.models["one"])
    details = [json.loads(line) for line in (evaluating.artifact("report") / "details.jsonl").open()]
    plain, normalised = [], []
    for record, detail in zip(QUESTIONS, [one for one in details if one["model"] == "one"], strict=True):
        right = "abc".index(record["answer"])
        order = [right, *(place for place in range(3) if place != right)]
        expected = [answer_log_probability(causal, tokenizer, style, record, place) for place in order]
        assert detail["log_probabilities"] == pytest.approx([total for total, _ in expected], abs=1e-4)
        assert detail["per_token"] == pytest.approx([total / tokens for total, tokens in expected], abs=1e-5)
        plain.append(expected[0][0] == max(total for total, _ in expected))
        normalised.append(max(total / tokens for total, tokens in expected) == expected[0][0] / expected[0][1])
    found = evaluating.report("report")["models"]["one"]["choice"]["asked"]
    assert found["accuracy"] == pytest.approx(sum(plain) / 12)
    assert found["accuracy_per_token"] == pytest.approx(sum(normalised) / 12)
    assert found["accuracy_error"] == pytest.approx(statistics.stdev(map(float, plain)) / 12**0.5)


@torch.no_grad()
def answer_log_probability(causal, tokenizer, style, record, place):
    """The log-probability of a choice, and how many tokens it has."""
    if style == "text":
        before = tokenizer(record["question"] + " ").input_ids
        after = tokenizer(record["choices"][place], add_special_tokens=False).input_ids
    else:
        asked = [{"role": "user", "content": record["question"]}]
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        after = [*tokenizer(record["choices"][place], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([[*before, *after]])
    rows = causal(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(rows[len(before) - 1 :].sum()), len(after)


def test_generation_tells_the_mean_reward_its_error_and_pass_at_k(evaluating):
    generation = {"data": {"asked": 1.0}, "samples": 4, "temperature": 1.0, "max_tokens": 6, "reward": [DIGITS]}
    evaluating.stages["report"]["generation"] = {**generation, "success": 4.0, "limit": 10}
    assert evaluating.run() == 0
    found = evaluating.report("report")["models"]["two"]["generation"]["asked"]
    details = [json.loads(line) for line in (evaluating.artifact("report") / "details.jsonl").open()]
    rewards = [one["rewards"] for one in details if one["model"] == "two"]
    assert len(rewards) == found["prompts"] == 10
    means = [sum(row) / 4 for row in rewards]
    assert found["reward"] == pytest.approx(sum(means) / 10)
    assert found["reward_error"] == pytest.approx(statistics.stdev(means) / 10**0.5)
    assert found["rewards"] == {"digits": pytest.approx(found["reward"])}
    assert found["pass_at_1"] == pytest.approx(sum(value >= 4 for row in rewards for value in row) / 40)
    assert found["pass_at_4"] == pytest.approx(sum(max(row) >= 4 for row in rewards) / 10)
    assert found["pass_at_1"] < found["pass_at_2"] < found["pass_at_4"]


@pytest.mark.parametrize(("samples", "successes"), [(8, 0), (8, 1), (8, 3), (8, 8)])
def test_pass_at_k_is_the_chance_of_drawing_a_success(samples, successes):
    from itertools import combinations

    for k in (1, 2, 4, 8):
        draws = list(combinations([True] * successes + [False] * (samples - successes), k))
        assert pass_at_k(samples, successes, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_what_was_measured_is_an_event(evaluating):
    evaluating.stages["report"]["held_out"] = {"data": {"asked": 1.0}}
    assert evaluating.run() == 0
    told = [event for event in evaluating.directory.events.read() if event["kind"] == "measured"]
    assert [event["name"] for event in told] == ["one/held_out/asked", "two/held_out/asked"]
    for event, model in zip(told, ("one", "two"), strict=True):
        assert event["values"] == evaluating.report("report")["models"][model]["held_out"]["asked"]


# --- what is wrong ------------------------------------------------------------------------------------------


def test_an_evaluation_of_nothing(evaluating):
    assert "nothing is evaluated" in str(evaluating.validate().error)


def test_a_format_without_choices(evaluating):
    evaluating.stages["report"]["choice"] = {"data": {"asked": 1.0}}
    assert "takes Ranked" in str(evaluating.validate().error)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 3}, "should be a number from 0 to 2"),
        ({"answer": "d"}, "none of its 3 choices"),
        ({"choices": ["one"]}, "a choice needs two"),
        ({"choices": "one"}, "text, not a list of texts"),
    ],
)
def test_a_question_that_is_none(evaluating, change, said):
    evaluating.data["asked"] = evaluating.written("questions", [{**QUESTIONS[0], **change}], "multiple_choice")
    evaluating.stages["report"]["choice"] = {"data": {"asked": 1.0}}
    error = evaluating.validate().error
    assert isinstance(error, DataError)
    assert said in str(error)


def test_a_reward_model_without_a_head(evaluating):
    reward = [{"model": {"path": evaluating.models["two"]}}]
    evaluating.stages["report"]["generation"] = {"data": {"asked": 1.0}, "max_tokens": 4, "reward": reward}
    with pytest.raises(ManifestError, match="has no head that scores"):
        evaluating.run()
