"""The recipes dpo and reward: their first steps against TRL over the same pairs, their runs, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from postlude.data.document import Document
from postlude.data.tokenizer import load_tokenizer
from postlude.errors import DataError, UserError
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, TokenizerFrom
from postlude.manifest.starter import starter
from postlude.model.export import write_model
from postlude.model.load import load_model
from postlude.runs import Run
from postlude.stages.stage import open_stage
from postlude.stages.task import StageTask
from postlude.stages.training import Training
from postlude.training.workers import Workers
from postlude.workflow.run import run
from postlude.workflow.validate import validate

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy and a reference that differ, with their tokenizer."""
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    places = {}
    for seed, name in enumerate(("policy", "reference")):
        places[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(seed)
        config = LlamaConfig(**SHAPE, vocab_size=len(tokenizer), pad_token_id=None)
        AutoModelForCausalLM.from_config(config).save_pretrained(places[name])
        tokenizer.save_pretrained(places[name])
    return places


@pytest.fixture
def manifest(tmp_path: Path, models: dict[str, Path]) -> dict[str, Any]:
    """One stage of pairs, one of single answers beside it; a step takes everything, in one block."""
    rng = np.random.default_rng(0)
    with (tmp_path / "pairs.jsonl").open("w") as pairs, (tmp_path / "judged.jsonl").open("w") as judged:
        for n in range(12):
            prompt = [{"role": "user", "content": f"Say {n}."}]
            answers = [
                [{"role": "assistant", "content": f"{kind} {rng.integers(10 ** int(rng.integers(1, 9)))}"}]
                for kind in ("Yes", "Nothing")
            ]
            pairs.write(json.dumps({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}) + "\n")
            judged.write(json.dumps({"prompt": prompt, "completion": answers[n % 2], "label": n % 3 > 0}) + "\n")
    stage = {
        "recipe": "dpo",
        "model": {"path": str(models["policy"])},
        "reference": {"path": str(models["reference"])},
        "data": {"pairs": 1.0},
        "batch": {"tokens": 4096, "block": 4096},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "schedule": "constant",
        "max_grad_norm": None,
        "threads": 1,
        "steps": 1,
    }
    sources = {name: {"source": {"path": str(tmp_path / f"{name}.jsonl")}} for name in ("pairs", "judged")}
    return {
        "name": "whole",
        "run_dir": str(tmp_path / "runs"),
        "data": {"pairs": {**sources["pairs"], "format": "preference"}},
        "stages": {"dpo": stage},
        "judged": {**sources["judged"], "format": "judged"},
    }


def changed(manifest: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """The manifest with other keys in its stage; None takes one away."""
    judged = manifest.pop("judged")
    if keys.get("loss") == "kto":
        manifest["data"] = {"pairs": judged}
    stage = {**manifest["stages"].pop("dpo"), **keys}
    manifest["stages"][stage["recipe"]] = {key: value for key, value in stage.items() if value is not None}
    return manifest


def first_step(manifest: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Training, list[Document]]:
    """The metrics of the first step, the parts of the stage before it, and the documents of the step."""
    path = folder / "whole.yaml"
    path.write_text(json.dumps(manifest, indent=1))
    assert run(str(path), [], inline=True) == 0
    done = Run(f"{manifest['run_dir']}/{manifest['name']}")
    (name,) = manifest["stages"]
    tree = load(json.dumps(manifest), "whole.yaml").tree
    opened = open_stage(StageTask(tree, name, done.uri, 1), Workers())
    assert isinstance(opened, Training)
    with opened.data.loader() as loader:
        documents = [d for block in next(iter(loader)).blocks for unit in block for d in unit.documents]
    return next(iter(done.stage(name).metrics.read())), opened, documents


def padded(documents: list[Document], prefix: str = "", pad: int = 0) -> dict[str, torch.Tensor]:
    """Documents as TRL's collators hand them on: padded rows, and which of their tokens are the answer's."""
    rows = [torch.from_numpy(document.tokens) for document in documents]
    masks = [torch.from_numpy(document.trained).long() for document in documents]
    return {
        f"{prefix}input_ids": pad_sequence(rows, batch_first=True, padding_value=pad),
        f"{prefix}attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        f"{prefix}completion_mask": pad_sequence(masks, batch_first=True),
    }


def norm_of(model: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def causal(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)


def settings(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "report_to": "none"}


def log_probabilities(model: Any, documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each document the summed log-probability of its answer, and its number of tokens: each alone."""
    sums, counts = [], []
    for document in documents:
        tokens, mask = torch.from_numpy(document.tokens), torch.from_numpy(document.trained)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1][mask[1:]]
        sums.append(logits.log_softmax(-1).gather(1, tokens[mask][:, None]).sum())
        counts.append(float(mask.sum()))
    return torch.stack(sums), torch.tensor(counts)


# --- oracles ------------------------------------------------------------------------------------------------


@pytest.mark.capability("Preference optimisation: DPO, conservative and robust DPO, IPO, SLiC, SimPO, ORPO")
@pytest.mark.parametrize(
    ("keys", "theirs"),
    [
        ({}, {"loss_type": ["sigmoid"]}),
        ({"loss": "ipo", "beta": 0.3}, {"loss_type": ["ipo"], "beta": 0.3}),
        ({"loss": "hinge"}, {"loss_type": ["hinge"]}),
        ({"loss": "robust", "label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}),
        ({"loss": "sigmoid_norm", "beta": 2.0}, {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
    ],
)
def test_losses_with_a_reference_are_those_of_trl(manifest, models, tmp_path, keys, theirs):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    line, _, documents = first_step(changed(manifest, **keys), tmp_path)
    policy = causal(models["policy"])
    trainer = trl.DPOTrainer(
        policy,
        causal(models["reference"]),
        args=trl.DPOConfig(**settings(tmp_path), **theirs),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(models["policy"]),
    )
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, padded(documents[::2] + documents[1::2]))
    loss.backward()
    told = {name: float(values[-1]) for name, values in trainer._metrics["train"].items() if values}
    assert len(documents) == 24
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm_of(trainer.model), rel=1e-4)
    assert line["chosen_logp"] == pytest.approx(told["logps/chosen"], rel=1e-4)
    assert line["rejected_logp"] == pytest.approx(told["logps/rejected"], rel=1e-4)
    if "loss" not in keys:
        assert line["margin"] == pytest.approx(told["rewards/margins"], rel=1e-3, abs=1e-5)
        assert line["accuracy"] == pytest.approx(told["rewards/accuracies"])
        assert line["chosen_reward"] == pytest.approx(told["rewards/chosen"], rel=1e-3, abs=1e-5)


def test_smoothed_labels_are_the_formula_in_float64(manifest, models, tmp_path):
    line, _, documents = first_step(changed(manifest, label_smoothing=0.1, beta=0.5), tmp_path)
    policy, reference = (causal(models[name]).double() for name in ("policy", "reference"))
    ours, _ = log_probabilities(policy, documents)
    with torch.no_grad():
        theirs, _ = log_probabilities(reference, documents)
    ratios = ours - theirs
    h = 0.5 * (ratios[::2] - ratios[1::2])
    loss = (-0.9 * torch.nn.functional.logsigmoid(h) - 0.1 * torch.nn.functional.logsigmoid(-h)).mean()
    loss.backward()
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm_of(policy), rel=1e-4)
    assert line["divergence"] > 0


@pytest.mark.capability("Preference losses of a user's own, found by name")
@pytest.mark.parametrize(
    ("keys", "ceiling"),
    [
        ({"loss": "exponential", "beta": 0.5}, 10.0),
        ({"loss": {"name": "exponential", "beta": 0.5, "ceiling": 1.0}}, 1.0),
    ],
)
def test_a_loss_from_another_package(manifest, models, tmp_path, keys, ceiling):
    line, opened, documents = first_step(changed(manifest, **keys), tmp_path)
    policy, reference = (causal(models[name]).double() for name in ("policy", "reference"))
    ours, _ = log_probabilities(policy, documents)
    with torch.no_grad():
        theirs, _ = log_probabilities(reference, documents)
    ratios = ours - theirs
    h = 0.5 * (ratios[::2] - ratios[1::2])
    loss = torch.exp(-h).clamp(max=ceiling).mean()
    loss.backward()
    assert set(opened.models.program.roles) == {"policy", "reference"}
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm_of(policy), rel=1e-4)
    assert line["margin"] == pytest.approx(float(h.detach().mean()), rel=1e-3, abs=1e-5)


def test_the_keys_of_a_loss_stand_beside_it_or_in_it(manifest):
    beside = changed(json.loads(json.dumps(manifest)), loss="simpo", reference=None, beta=2.0, gamma=0.7)
    within = changed(manifest, loss={"name": "simpo", "beta": 2.0, "gamma": 0.7}, reference=None)
    resolved = [load(json.dumps(tree), "whole.yaml") for tree in (beside, within)]
    assert [read.tree["stages"]["dpo"]["loss"] for read in resolved] == [
        "simpo",
        {"name": "simpo", "beta": 2.0, "label_smoothing": 0.0, "gamma": 0.7},
    ]
    objectives = [read.manifest.stages["dpo"].objective() for read in resolved]
    assert objectives[0] == objectives[1]
    again = load(json.dumps(resolved[1].tree), "whole.yaml")
    assert again.manifest.stages["dpo"].objective() == objectives[1]


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_are_those_of_trl(manifest, models, tmp_path, loss):
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    keys = {"gamma": 0.7, "beta": 2.0} if loss == "simpo" else {"beta": 0.3}
    line, opened, documents = first_step(changed(manifest, loss=loss, reference=None, **keys), tmp_path)
    assert set(opened.models.program.roles) == {"policy"}
    policy = causal(models["policy"])
    sums, counts = log_probabilities(policy, documents)
    means = sums / counts
    here = SimpleNamespace(
        alpha=0.0,
        loss_type=loss,
        simpo_gamma=0.7,
        beta=keys["beta"],
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    if loss == "simpo":
        expected = CPOTrainer.cpo_loss(here, means[::2], means[1::2])[0].mean()
    else:
        likelihood = -sums[::2].sum() / counts[::2].sum()
        expected = likelihood - ORPOTrainer.odds_ratio_loss(here, means[::2], means[1::2])[0].mean()
    expected.backward()
    assert line["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm_of(policy), rel=1e-4)


@pytest.mark.capability("Preference optimisation from single judged answers (KTO)")
def test_judged_answers_are_learned_as_trl_learns_them(manifest, models, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    keys = {"loss": "kto", "beta": 0.2, "desirable_weight": 1.5}
    line, _, documents = first_step(changed(manifest, **keys), tmp_path)
    trainer = trl.KTOTrainer(
        causal(models["policy"]),
        causal(models["reference"]),
        args=trl.KTOConfig(
            **settings(tmp_path), beta=0.2, desirable_weight=1.5, per_device_train_batch_size=len(documents)
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": n > 1} for n in range(4)]),
        processing_class=AutoTokenizer.from_pretrained(models["policy"]),
    )
    mixed = []
    for before, document in zip([documents[-1], *documents], documents):
        prompt = document.tokens[: document.trained.argmax()]
        answer = before.tokens[before.trained.argmax() :]
        weight = np.concatenate([np.zeros(len(prompt)), before.streams["weight"][before.trained.argmax() :]])
        tokens = np.concatenate([prompt, answer])
        mixed.append(Document("mixed", "mixed", tokens, {"weight": weight.astype(np.float32)}))
    labels = [bool(document.streams["score"][0] > 0) for document in documents]
    inputs = {**padded(documents), **padded(mixed, "KL_"), "label": torch.tensor(labels)}
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert 0 < sum(labels) < len(labels)
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm_of(trainer.model), rel=1e-4)
    assert line["baseline"] == pytest.approx(float(trainer._metrics["train"]["kl"][-1]), rel=1e-4, abs=1e-6)


@pytest.mark.capability("Reward models from pairs and ranked lists, as transformers' sequence classification")
def test_a_reward_model_is_that_of_trl_and_loads_as_a_classifier(manifest, models, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    keys = {"recipe": "reward", "reference": None, "centering": 0.05}
    line, opened, documents = first_step(changed(manifest, **keys), tmp_path)
    start = tmp_path / "start"
    write_model(opened.models.program.roles["policy"].model, opened.data.tokenizer, start, {})
    classifier = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
    assert classifier.config.num_labels == 1
    trainer = trl.RewardTrainer(
        classifier,
        args=trl.RewardConfig(**settings(tmp_path), center_rewards_coefficient=0.05),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    inputs = padded(documents[::2] + documents[1::2], pad=classifier.config.pad_token_id)
    inputs.pop("completion_mask")
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm_of(trainer.model), rel=1e-4)
    assert line["accuracy"] == pytest.approx(float(trainer._metrics["train"]["accuracy"][-1]))
    # What was trained gives the same scores here and in transformers, and is still a language model here.
    place = opened.parts.stage.artifact
    trained = AutoModelForSequenceClassification.from_pretrained(place, dtype=torch.float32).eval()
    ours = load_model(ModelFrom(path=place), place, None, seed=0).eval()
    alone = torch.from_numpy(documents[0].tokens)
    with torch.no_grad(), ours.plain() as plain:
        states = plain.model(input_ids=alone[None], use_cache=False).last_hidden_state[0, -1:]
        assert float(trained(input_ids=alone[None]).logits) == pytest.approx(
            float(ours.head("scalar")(states)), rel=1e-5
        )
    head = causal(models["policy"]).get_output_embeddings().weight
    assert torch.equal(ours.lm_head_parameters().weight[: len(head)], head), "it took no part in the training"


def test_a_ranked_list_is_the_probability_of_its_order(manifest, tmp_path):
    with (tmp_path / "lists.jsonl").open("w") as file:
        for n in range(8):
            file.write(json.dumps({"prompt": f"{n}:", "answers": ["a" * (k + 1 + n % 3) for k in range(4)]}) + "\n")
    manifest["data"]["pairs"] = {"source": {"path": str(tmp_path / "lists.jsonl")}, "format": "ranked"}
    keys = {"recipe": "reward", "reference": None}
    losses = {}
    for order in ("plackett_luce", "bradley_terry"):
        manifest["name"], manifest["judged"] = order, {}
        one = changed(json.loads(json.dumps(manifest)), **keys, order=order)
        line, opened, documents = first_step(one, tmp_path)
        model = opened.models.program.roles["policy"].model
        with torch.no_grad(), model.plain() as plain:
            rows = [torch.from_numpy(document.tokens)[None] for document in documents]
            states = [plain.model(input_ids=row, use_cache=False).last_hidden_state[0, -1] for row in rows]
            scores = model.head("scalar")(torch.stack(states)).double()
        lists = scores.view(-1, 4)
        if order == "plackett_luce":
            expected = -sum((lists[:, k] - lists[:, k:].logsumexp(1)).mean() for k in range(4))
        else:
            pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
            expected = -torch.stack(
                [torch.nn.functional.logsigmoid(lists[:, i] - lists[:, j]) for i, j in pairs]
            ).mean()
        assert line["loss"] == pytest.approx(float(expected), rel=1e-4)
        losses[order] = line["loss"]
    assert losses["plackett_luce"] != pytest.approx(losses["bradley_terry"])


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "orpo", "kto", "reward"])
def test_blocks_and_micro_batches_change_only_rounding(manifest, tmp_path, loss):
    """But for the estimate of KTO, which pairs answers within a block: there only micro-batches are changed."""
    keys: dict[str, Any] = {"recipe": "reward", "reference": None} if loss == "reward" else {"loss": loss}
    if loss == "orpo":
        keys["reference"] = None
    blocks = [(512, 512), (512, 1024)] if loss == "kto" else [(4096, 4096), (256, 256), (256, 768)]
    lines = []
    for n, (block, micro) in enumerate(blocks):
        one = changed(json.loads(json.dumps(manifest)), **keys, batch={"tokens": 12288, "block": block, "micro": micro})
        one["name"] = f"run-{n}"
        lines.append(first_step(one, tmp_path)[0])
    for line in lines[1:]:
        for key in ("loss", "grad_norm", "accuracy", "chosen_reward", "rejected_reward"):
            assert line[key] == pytest.approx(lines[0][key], rel=1e-5, abs=1e-6), key


def test_each_pair_has_one_row_among_the_losses_by_example(manifest, tmp_path):
    _, opened, documents = first_step(changed(manifest), tmp_path)
    rows = opened.parts.stage.read_examples().to_pylist()
    assert sorted(row["example_id"] for row in rows) == sorted({document.example_id for document in documents})
    assert sum(row["tokens"] for row in rows) == sum(document.trained_tokens for document in documents)


@pytest.mark.parametrize("recipe", ["dpo", "reward"])
def test_the_starter_runs_and_pairs_it_has_not_seen_are_told_apart(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    start = starter(recipe, "first")
    for path, text in start.files.items():
        Path(path).write_text(text)
    Path("first.yaml").write_text(start.text)
    assert validate("first.yaml", ["sft.steps=30"]).exit_code == 0
    assert run("first.yaml", ["sft.steps=30", f"{recipe}.steps=20", f"{recipe}.evaluate.every=20"], inline=True) == 0
    last = list(Run("runs/first").stage(recipe).metrics.read())[-1]
    assert last["eval_unseen_accuracy"] > 0.9


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"loss": "simpo"}, "'loss: simpo' does not read 'reference'"),
        ({"gamma": 1.0}, "'loss: sigmoid' does not read 'gamma': it belongs to simpo"),
        ({"loss": "robust"}, "'loss: robust' needs 'label_smoothing'"),
        ({"loss": {"name": "hinge", "beta": 0.2}, "beta": 0.5}, "'loss' is a mapping here: 'beta'"),
        ({"loss": {"name": "hinge", "gamma": 0.2}}, "gamma"),
        ({"loss": "sigmoidal"}, "Did you mean 'sigmoid'"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"recipe": "reward", "reference": None, "margins": True, "order": "plackett_luce"}, "'margins' belongs to"),
    ],
)
def test_a_key_that_has_no_use_is_refused(manifest, keys, said):
    with pytest.raises(ManifestError) as refused:
        load(json.dumps(changed(manifest, **keys)), "whole.yaml")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "'chosen' is empty"),
        (
            {
                "chosen": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "x"}],
                "rejected": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "y"}],
            },
            "answer different prompts",
        ),
    ],
)
def test_pairs_that_are_none_are_named_before_work_begins(manifest, tmp_path, record, said):
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(changed(manifest)))
    report = validate(str(path), [])
    assert report.exit_code == 3
    assert said in str(report.error)
    assert "pairs.jsonl" in str(report.error)
    with pytest.raises(DataError, match=said):
        run(str(path), [], inline=True)


def test_single_conversations_are_no_pairs(manifest, tmp_path):
    manifest["data"]["pairs"]["format"] = "messages"
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(changed(manifest)))
    assert "makes Conversation, but the recipe 'dpo'" in str(validate(str(path), []).error)


def test_a_reference_of_another_vocabulary_is_refused(manifest, tmp_path, shared_data):
    other = shared_data / "models" / "stories260K_hf"
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(changed(manifest, reference={"path": str(other)})))
    with pytest.raises(UserError) as refused:
        run(str(path), [], inline=True)
    assert "reference" in str(refused.value)
