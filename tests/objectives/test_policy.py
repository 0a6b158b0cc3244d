"""Policy gradients on a fixed batch against TRL's GRPOTrainer, and against formulas in float64 where it has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from postlude.data.batch import PackedBatch, collate
from postlude.data.document import WEIGHT, Document, Unit
from postlude.manifest.schema import ModelFrom, NewModel
from postlude.model.load import load_model
from postlude.objectives.actor_critic import ActorCritic
from postlude.objectives.policy import PolicyGradient
from postlude.training.meters import Phases
from postlude.training.precision import LossScale, Precision
from postlude.training.program import Program, Role
from postlude.training.step import Executor
from postlude.training.workers import Workers

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
PROMPT, LONGEST = 3, 9
FP32 = Precision.choose("fp32", torch.device("cpu"), None)


def new_model(seed: int = 1) -> Any:
    start = ModelFrom(new=NewModel(architecture="llama", config={**SHAPE, "initializer_range": 0.3}))
    return load_model(start, None, None, seed=seed)


def documents(seed: int = 0) -> list[Document]:
    """Prompts with answers of several lengths, and streams that put some ratios past every bound."""
    made, rng = [], np.random.default_rng(seed)
    for number, answer in enumerate((4, 9, 2, 7, 5, 1)):
        length = PROMPT + answer
        weight = np.r_[np.zeros(PROMPT), np.ones(answer)].astype(np.float32)
        base = rng.uniform(-5.5, -3, length)
        streams = {
            "advantage": np.full(length, rng.normal()),
            "old_logp": base,
            "behaviour_logp": base + rng.normal(0, 0.1, length),
            "reference_logp": base + rng.normal(0, 0.4, length),
            "correction": rng.uniform(0.5, 2.0, length),
            "value": rng.normal(size=length),
            "return": rng.normal(size=length),
        }
        tokens = rng.integers(3, 64, length)
        of_kind = {name: (values * weight).astype(np.float32) for name, values in streams.items()}
        made.append(Document(f"d:{number}", "d", tokens, {WEIGHT.name: weight, **of_kind}))
    return made


def batches(parts: int, objective: Any) -> list[PackedBatch]:
    """The documents in so many micro-batches."""
    every = documents()
    return [collate([tuple(Unit((one,)) for one in every[part::parts])], objective.streams) for part in range(parts)]


def step(objective: Any, parts: int = 2, critic: Any = None) -> tuple[Any, Any]:
    """Loss, metrics and gradients of one step, and the policy."""
    policy = new_model()
    roles = {"policy": Role(policy, object())}  # type: ignore[arg-type]
    if critic is not None:
        critic.add_scalar_head(5)
        roles["critic"] = Role(critic, object())  # type: ignore[arg-type]
    program = Program(objective, roles)
    executor = Executor(program, Workers(), FP32, Phases(), lambda batch: 0.0)
    return executor.forward_backward(batches(parts, objective), LossScale(FP32)), policy


def close(policy: Any, gradients: dict[str, torch.Tensor]) -> None:
    """The policy's gradients are those, to 1e-4 of the largest."""
    ours = {n: p.grad for n, p in policy.causal.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        rows = ours[name][: len(gradient)].double()
        scale = float(gradient.abs().max())
        assert torch.allclose(rows, gradient.double(), rtol=0, atol=1e-4 * scale), name


@pytest.mark.capability("GRPO, Dr. GRPO, DAPO, GSPO, CISPO and RLOO: losses and gradients")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"normalize": "document"}, {"loss_type": "grpo"}),
        ({"normalize": "document", "kl_coefficient": 0.1}, {"loss_type": "grpo", "beta": 0.1}),
        ({"normalize": "length", "longest": LONGEST}, {"loss_type": "dr_grpo", "max_completion_length": LONGEST}),
        ({"normalize": "token", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
        (
            {"normalize": "document", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.06},
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06},
        ),
        ({"normalize": "token", "surrogate": "cispo", "clip_high": 0.3}, {"loss_type": "cispo", "epsilon_high": 1.3}),
        ({"normalize": "token", "entropy_coefficient": 0.2}, {"loss_type": "dapo", "entropy_coef": 0.2}),
    ],
)
def test_losses_are_those_of_trl(tmp_path, ours, theirs):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(n): n for n in range(64)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    objective = PolicyGradient(**{"measures_reference": "kl_coefficient" in ours, **ours})
    plain = [
        Document(d.example_id, d.source, d.tokens, {**d.streams, "correction": 0 * d.streams["weight"] + 1})
        for d in documents()
    ]
    result, policy = _step_of(objective, plain)
    theirs_model = new_model().causal
    theirs_model.set_attn_implementation("eager")
    trainer = trl.GRPOTrainer(
        theirs_model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            num_generations=2,
            per_device_train_batch_size=6,
            temperature=1.0,
            **{key: value for key, value in theirs.items() if key != "beta"},
        ),
        train_dataset=Dataset.from_list([{"prompt": "3"}] * 6),
        processing_class=tokenizer,
    )
    trainer.beta = theirs.get("beta", 0.0)  # given to the configuration, it would load a reference
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, _padded(plain))
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    close(
        policy,
        {
            n: p.grad[:64] if "embed" in n or "lm_head" in n else p.grad
            for n, p in trainer.model.named_parameters()
            if p.grad is not None
        },
    )
    if "surrogate" not in ours:
        told = trainer._metrics["train"]
        assert result.metrics["entropy"] == pytest.approx(told["entropy"][-1], rel=1e-4)
        assert result.metrics["clip_share"] > 0


def _step_of(objective: Any, made: list[Document]) -> tuple[Any, Any]:
    policy = new_model()
    executor = Executor(
        Program(objective, {"policy": Role(policy, object())}), Workers(), FP32, Phases(), lambda b: 0.0
    )  # type: ignore[arg-type]
    parts = [collate([tuple(Unit((one,)) for one in made[part::2])], objective.streams) for part in range(2)]
    return executor.forward_backward(parts, LossScale(FP32)), policy


def _padded(made: list[Document]) -> dict[str, torch.Tensor]:
    """The documents as TRL takes them: prompts and completions apart, padded on the right."""
    width = max(len(one) for one in made) - PROMPT
    inputs: dict[str, torch.Tensor] = {
        "prompt_ids": torch.tensor(np.stack([one.tokens[:PROMPT] for one in made])),
        "prompt_mask": torch.ones(len(made), PROMPT, dtype=torch.long),
        "completion_ids": torch.zeros(len(made), width, dtype=torch.long),
        "completion_mask": torch.zeros(len(made), width, dtype=torch.long),
        "advantages": torch.tensor([float(one.streams["advantage"][-1]) for one in made]),
        "old_per_token_logps": torch.zeros(len(made), width),
        "ref_per_token_logps": torch.zeros(len(made), width),
    }
    for row, one in enumerate(made):
        end = len(one) - PROMPT
        inputs["completion_ids"][row, :end] = torch.from_numpy(one.tokens[PROMPT:])
        inputs["completion_mask"][row, :end] = 1
        inputs["old_per_token_logps"][row, :end] = torch.from_numpy(one.streams["old_logp"][PROMPT:])
        inputs["ref_per_token_logps"][row, :end] = torch.from_numpy(one.streams["reference_logp"][PROMPT:])
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return inputs


def _each(policy: Any, critic: Any = None):
    """Of each document alone, in float64: log-probabilities and values of its sampled tokens, and its streams."""
    causal = policy.causal.double()
    causal.set_attn_implementation("eager")
    if critic is not None:
        critic.double().causal.set_attn_implementation("eager")
    for one in documents():
        tokens, places = torch.from_numpy(one.tokens)[None], torch.from_numpy(one.streams["weight"] > 0)
        before = places.roll(-1)
        logp = causal(tokens).logits[0, before, :64].log_softmax(-1).gather(1, tokens[0, places][:, None])[:, 0]
        values = None
        if critic is not None:
            hidden = critic.causal.model(tokens).last_hidden_state[0, before]
            values = critic.scalar(hidden).squeeze(-1)
        yield logp, values, {name: torch.from_numpy(row).double()[places] for name, row in one.streams.items()}


def test_a_plain_surrogate_and_its_correction_are_the_formula():
    result, policy = step(PolicyGradient(surrogate="plain", normalize="document"))
    alone = new_model()
    losses = [-(s["correction"] * (logp - s["old_logp"]).exp() * s["advantage"]).mean() for logp, _, s in _each(alone)]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    close(policy, {n: p.grad for n, p in alone.causal.named_parameters() if p.grad is not None})


@pytest.mark.capability("PPO: the losses of actor and critic")
def test_actor_and_critic_are_the_formula():
    objective = ActorCritic(PolicyGradient(clip_low=0.2, clip_high=0.2), value_coefficient=0.7, value_clip=0.3)
    critic, other = new_model(4), new_model(4)
    other.add_scalar_head(5)
    result, policy = step(objective, critic=critic)
    alone = new_model()
    actor = value = count = 0.0
    for logp, values, s in _each(alone, other):
        ratio = (logp - s["old_logp"]).exp()
        kept = torch.minimum(ratio * s["advantage"], ratio.clamp(0.8, 1.2) * s["advantage"])
        actor = actor - (s["correction"] * kept).sum()
        near = s["value"] + (values - s["value"]).clamp(-0.3, 0.3)
        value = value + 0.5 * torch.maximum((values - s["return"]) ** 2, (near - s["return"]) ** 2).sum()
        count += len(logp)
    loss = (actor + 0.7 * value) / count
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    assert result.metrics["value_loss"] == pytest.approx(float(value.detach()) / count, rel=1e-4)
    assert 0 < result.metrics["value_clip_share"] < 1
    close(policy, {n: p.grad for n, p in alone.causal.named_parameters() if p.grad is not None})
    theirs = {n: p.grad for n, p in other.causal.named_parameters() if p.grad is not None}
    close(critic, theirs)
    assert torch.allclose(critic.scalar.weight.grad.double(), other.scalar.weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("normalize", ["token", "document", "length"])
def test_micro_batches_do_not_matter(normalize):
    objective = PolicyGradient(normalize=normalize, longest=LONGEST, kl_coefficient=0.1)
    one, two = step(objective, 1), step(objective, 3)
    assert one[0].loss == pytest.approx(two[0].loss, rel=1e-6)
    assert one[0].metrics == pytest.approx(two[0].metrics, rel=1e-5)
    close(one[1], {n: p.grad for n, p in two[1].causal.named_parameters() if p.grad is not None})
