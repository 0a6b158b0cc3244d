"""Streams that a frozen model computes before the first step: they give what the model gives that runs along."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from postlude import storage
from postlude.errors import DataError
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelPlace
from postlude.model.load import load_model
from postlude.runs import Run
from postlude.stages import annotate
from postlude.stages.stage import open_stage
from postlude.stages.task import StageTask
from postlude.stages.training import Training
from postlude.training.trainer import Trainer
from postlude.training.workers import Workers
from ranks import run_ranks
from stages.conftest import write_random_model

EXACT = ("step", "epoch", "progress", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "documents")
PAIR_METRICS = ("loss", "grad_norm", "accuracy", "margin", "chosen_reward", "rejected_reward", "divergence")
LIKELY = ("loss", "grad_norm", "divergence", "agreement", "hard_loss")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts out of few records."""
    monkeypatch.setattr(annotate, "ROWS", 7)


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    said = ["".join(rng.choices("abcdefgh", k=rng.randrange(1, 20))) for _ in range(2 * count)]
    return [{"prompt": f"Say {n}.", "chosen": said[2 * n], "rejected": f"no {said[2 * n + 1]}"} for n in range(count)]


@pytest.fixture
def preferences(project):
    """Forty pairs to train on and nine that are held out, with a reference of its own."""
    project.data.clear()
    project.data |= {
        "pairs": project.written("pairs", pairs(40), "preference"),
        "unseen": project.written("unseen", pairs(9, seed=1), "preference"),
    }
    project.stages["tune"] = project.train(
        recipe="dpo",
        model={"path": project.models["one"]},
        reference={"path": project.models["two"]},
        data={"pairs": 1.0},
        evaluate={"data": {"unseen": 1.0, "pairs": 1.0}, "every": 2},
        batch={"tokens": 1024, "block": 256},
        optimizer={"lr": 1e-2},
        steps=5,
        checkpoint={"every": 2},
    )
    return project


@pytest.fixture
def lessons(project):
    """Twenty questions, half of which are held out as well, with a teacher."""
    project.stages["tune"] = project.train(
        recipe="distill",
        teacher={"path": project.models["two"]},
        data={"asked": 1.0},
        evaluate={"data": {"asked": 1.0}, "limit": 10},
        batch={"tokens": 1024, "block": 256},
        optimizer={"lr": 1e-2},
        steps=4,
    )
    return project


def place(project, name: str) -> None:
    """A name and a folder of its own: else one run takes over what another made."""
    project.manifest |= {"name": name, "run_dir": str(project.folder / f"runs-{name}")}


def tuned(project, name: str, **keys: Any) -> list[dict[str, Any]]:
    """The metrics of a run under this name, with these keys in the stage."""
    place(project, name)
    project.stages["tune"] |= keys
    assert project.run() == 0
    return metrics(project)


def metrics(project) -> list[dict[str, Any]]:
    return list(project.directory.stage("tune").metrics.read())


def told(project, kind: str) -> list[dict[str, Any]]:
    return [event for event in project.directory.events.read() if event["kind"] == kind]


def task_of(project) -> StageTask:
    return StageTask(load(json.dumps(project.manifest), "small.yaml").tree, "tune", project.directory.uri, 1)


def opened(project) -> Training:
    stage = open_stage(task_of(project), Workers())
    assert isinstance(stage, Training)
    return stage


def parts(project) -> dict[str, bytes]:
    folder = Path(project.directory.stage("tune").annotations)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/part-*.arrow"))}


def exact(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key in EXACT or key in PAIR_METRICS or key.startswith("eval_")}
        for line in lines
    ]


def same(stored: list[dict[str, Any]], live: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    assert len(stored) == len(live)
    for ours, theirs in zip(stored, live, strict=True):
        for key in [*keys, *(key for key in theirs if key.startswith("eval_"))]:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-6), key


class Interrupted(Exception):
    pass


def stop_after(monkeypatch, count: int) -> None:
    """Break off the pass when so many parts were written."""
    write, written = annotate.AnnotationFiles.write, []

    def until(self, number, documents, values):
        if len(written) == count:
            raise Interrupted
        written.append(number)
        write(self, number, documents, values)

    monkeypatch.setattr(annotate.AnnotationFiles, "write", until)


# --- a reference that is stored -----------------------------------------------------------------------------


@pytest.mark.capability("Preference optimisation with the reference's log-probabilities stored before training")
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_a_stored_reference_gives_the_losses_of_one_that_runs_along(preferences, loss):
    live = tuned(preferences, "live", loss=loss)
    stored = tuned(preferences, "stored", precompute_reference=True)
    same(stored, live, PAIR_METRICS)
    assert stored[0]["divergence"] > 0
    assert [(e["parts"], e["computed"]) for e in told(preferences, "streams_stored")] == [(8, 8)]


def test_the_model_that_the_stage_starts_from_is_stored_where_no_reference_is_named(preferences):
    preferences.stages["tune"].pop("reference")
    live = tuned(preferences, "live")
    stored = tuned(preferences, "stored", precompute_reference=True)
    same(stored, live, PAIR_METRICS)
    assert stored[0]["divergence"] == pytest.approx(0, abs=1e-6)


def test_a_new_model_can_be_the_reference(preferences):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    preferences.stages["tune"].pop("reference")
    start = {"new": {"architecture": "llama", "config": shape}}
    live = tuned(preferences, "live", model=start, tokenizer={"bytes": True})
    same(tuned(preferences, "stored", precompute_reference=True), live, PAIR_METRICS)


def test_no_reference_is_held_while_training(preferences):
    preferences.stages["tune"]["precompute_reference"] = True
    assert set(opened(preferences).models.program.roles) == {"policy"}


def test_what_was_stored_goes_when_the_artifact_stands(preferences):
    tuned(preferences, "stored", precompute_reference=True)
    assert not storage.exists(preferences.directory.stage("tune").annotations)


class Quiet:
    """A recorder that nobody listens to."""

    def preparing(self, what: str, share: float) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...


def store(task: StageTask) -> int:
    """The pass alone, on a rank: how many documents it stored."""
    annotate.ROWS = 7
    workers = Workers.join()
    try:
        stored = annotate.annotate(open_stage(task, workers).models, Quiet(), lambda: False)
        return len(stored[0])
    finally:
        workers.leave()


def test_two_ranks_store_the_parts_of_one(preferences):
    preferences.stages["tune"]["precompute_reference"] = True
    found = []
    for ranks in (1, 2):
        place(preferences, f"ranks-{ranks}")
        assert run_ranks("stages.test_stored:store", task_of(preferences), ranks, 1) == [98] * ranks
        found.append(parts(preferences))
    assert len(found[0]) == 8
    assert found[0] == found[1]


@pytest.mark.long
def test_two_ranks_train_on_them_as_one_does(preferences):
    preferences.stages["tune"]["precompute_reference"] = True
    one = tuned(preferences, "one")
    preferences.manifest["compute"] = {"pools": {"train": {"workers": 2}}}
    same(tuned(preferences, "two"), one, PAIR_METRICS)


# --- a teacher that is stored -------------------------------------------------------------------------------


def vocabulary(project) -> int:
    return load_model(ModelPlace(path=project.models["two"]), project.models["two"], None, seed=0).vocabulary


@pytest.mark.capability("Distillation from a teacher's likeliest tokens, stored before training")
@pytest.mark.parametrize(
    "keys",
    [
        {"divergence": "forward_kl"},
        {"divergence": "reverse_kl", "temperature": 2.0},
        {"divergence": "jsd", "beta": 0.3, "hard_loss": 0.2},
    ],
)
def test_with_the_whole_vocabulary_stored_the_loss_is_that_of_a_live_teacher(lessons, keys):
    live = tuned(lessons, "live", **keys)
    everything = {"path": lessons.models["two"], "top_k": vocabulary(lessons)}
    stored = tuned(lessons, "stored", teacher=everything)
    same(stored, live, LIKELY if "hard_loss" in live[0] else LIKELY[:-1])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_with_few_tokens_stored_the_divergence_is_within_the_bound(lessons, kind):
    """The bounds of postlude.objectives.divergence.StoredComparison, taken over the tokens of the first step."""
    live = tuned(lessons, "live", divergence=kind, batch={"tokens": 4096, "block": 4096}, steps=1)[0]
    stage = opened(lessons)
    with stage.data.loader() as loader:
        documents = [d for block in next(iter(loader)).blocks for unit in block for d in unit.documents]
    shares = []
    for name in ("teacher", "policy"):
        model = stage.models.program.roles[name].model
        rows = []
        with model.plain() as causal, torch.no_grad():
            for document in documents:
                logits = causal(torch.from_numpy(document.tokens)[None], use_cache=False).logits[0, :-1]
                rows.append(logits[document.trained[1:], : model.vocabulary])
        shares.append(torch.cat(rows).double().log_softmax(-1))
    p, q = shares
    lost_before = math.inf
    for k in (1, 16, 128):
        stored = tuned(lessons, f"stored-{k}", teacher={"path": lessons.models["two"], "top_k": k})[0]
        rest = torch.ones_like(p, dtype=torch.bool).scatter_(1, p.topk(k).indices, False)
        p_rest, q_rest = ((one.exp() * rest).sum(1) for one in (p, q))
        if kind == "jsd":
            bound = (p_rest + q_rest) / 2 * math.log(2)
        else:
            bound = 2 * ((p - q).abs() * rest).amax(1) * (p_rest if kind == "forward_kl" else q_rest)
        lost = live["divergence"] - stored["divergence"]
        assert 1e-6 < lost <= float(bound.mean())
        assert lost < lost_before  # the more is stored, the nearer
        lost_before = lost


def test_a_teacher_that_an_earlier_stage_makes(lessons):
    tune = lessons.stages.pop("tune")
    lessons.stages["teach"] = lessons.train(data={"asked": 1.0}, model={"path": lessons.models["two"]})
    lessons.stages["tune"] = {**tune, "teacher": {"from": "teach", "top_k": 8}}
    found = tuned(lessons, "stored")
    assert found[-1]["divergence"] < found[0]["divergence"]


def test_a_teacher_whose_embedding_is_padded_further_is_cut_to_the_tokens_of_both(lessons):
    size = vocabulary(lessons)
    where = write_random_model(lessons.folder / "padded", 5, vocab_size=size + 11)
    live = tuned(lessons, "live", teacher={"path": where})
    stored = tuned(lessons, "stored", teacher={"path": where, "top_k": size})
    same(stored, live, LIKELY)


# --- stopped and gone on with -------------------------------------------------------------------------------


def test_a_pass_that_was_broken_off_goes_on_where_it_was(preferences, monkeypatch):
    calm = tuned(preferences, "calm", precompute_reference=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            tuned(preferences, "shaken")
    assert len(parts(preferences)) == 3
    assert preferences.run() == 0
    assert [(e["parts"], e["computed"]) for e in told(preferences, "streams_stored")] == [(8, 5)]
    assert exact(metrics(preferences)) == exact(calm)


def test_a_resume_does_not_repeat_the_pass(preferences, monkeypatch):
    calm = tuned(preferences, "calm", precompute_reference=True)
    train = Trainer.train

    def until_the_fourth(self, work):
        if self.step == 3:
            raise Interrupted
        train(self, work)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", until_the_fourth)
        with pytest.raises(Interrupted):
            tuned(preferences, "shaken")
    assert len(parts(preferences)) == 8
    asked = []
    monkeypatch.setattr(annotate, "FrozenModel", lambda *_, **__: asked.append(None))
    assert preferences.run() == 0
    assert not asked
    assert len(told(preferences, "streams_stored")) == 1
    assert exact(metrics(preferences)) == exact(calm)


def test_a_damaged_part_is_told_and_computed_anew(preferences, monkeypatch):
    calm = tuned(preferences, "calm", precompute_reference=True)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda self: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            tuned(preferences, "shaken")
    part = next(Path(preferences.directory.stage("tune").annotations).glob("*/part-00000002*.arrow"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert preferences.run() == 0
    assert "part-00000002" in told(preferences, "alarm")[0]["reason"]
    assert exact(metrics(preferences)) == exact(calm)


def break_off(preferences, monkeypatch) -> None:
    """Break off a pass in its middle."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            tuned(preferences, "shaken", precompute_reference=True)


def test_another_data_file_is_read_anew(preferences, monkeypatch):
    break_off(preferences, monkeypatch)
    preferences.written("pairs", pairs(40, seed=7), "preference")
    assert preferences.run() == 0
    assert [e["computed"] for e in told(preferences, "streams_stored")] == [8]
    stored = exact(metrics(preferences))
    assert stored == exact(tuned(preferences, "calm"))


def test_another_model_is_asked_anew(preferences, monkeypatch):
    where = preferences.stages["tune"]["reference"]["path"] = write_random_model(preferences.folder / "own", 8)
    break_off(preferences, monkeypatch)
    write_random_model(Path(where), 9)
    assert preferences.run() == 0
    assert [e["computed"] for e in told(preferences, "streams_stored")] == [8]
    stored = exact(metrics(preferences))
    assert stored == exact(tuned(preferences, "calm"))


@pytest.mark.parametrize("what", ["data", "model", "annotator", "block", "held out"])
def test_what_the_values_follow_from_is_in_the_fingerprint(lessons, what):
    def fingerprints() -> list[str]:
        stage = opened(lessons)
        return [annotate._Pass(stage.models, *one).parts.uri for one in stage.config.annotations().items()]

    stage = lessons.stages["tune"]
    stage["teacher"] = {"path": write_random_model(lessons.folder / "own", 8), "top_k": 4}
    before = fingerprints()
    assert before == fingerprints()
    if what == "data":
        lessons.written("asked", [{"messages": [{"role": "assistant", "content": "Other."}]}])
    elif what == "model":
        write_random_model(lessons.folder / "own", 9)
    elif what == "annotator":
        stage["temperature"] = 2.0
    elif what == "block":
        stage["batch"] = {"tokens": 1024, "block": 128}
    else:
        stage["evaluate"] = {"data": {"asked": 1.0}, "limit": 9}
    assert fingerprints() != before


def start(project) -> subprocess.Popen:
    alone = project.manifest["compute"]["pools"]["train"]["workers"] == 1
    command = [sys.executable, "-m", "postlude", "run", project.write(), *(["--inline"] if alone else [])]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen, *codes: int) -> None:
    output, _ = process.communicate()
    assert process.returncode in (0, *codes), output.decode()


def progress_of(project) -> tuple[int, int]:
    """How many parts stand, and how many steps were made."""
    journal = Path(project.directory.stage("tune").uri) / "metrics.jsonl"
    folder = Path(project.directory.stage("tune").annotations)
    return len(list(folder.glob("*/part-*.arrow"))), journal.read_text().count("\n") if journal.exists() else 0


@pytest.mark.long
@pytest.mark.capability("Killed while streams are stored or read, a run ends bitwise as if undisturbed")
@pytest.mark.parametrize(("workers", "kills"), [(1, [(2, 0), (6, 0), (0, 3), (0, 8)]), (2, [(2, 0), (0, 5)])])
def test_killed_in_the_pass_and_in_the_training_it_is_as_if_undisturbed(preferences, workers, kills):
    """Each kill is after so many stored parts and so many steps."""
    preferences.written("pairs", pairs(2600), "preference")
    preferences.manifest["compute"] = {"pools": {"train": {"workers": workers}}}
    preferences.stages["tune"] |= {"precompute_reference": True, "steps": 12, "evaluate": {"data": {"unseen": 1.0}}}
    place(preferences, "calm")
    finished(start(preferences))
    calm = exact(metrics(preferences))
    assert len(calm) == 12
    place(preferences, "shaken")
    rng, hits = random.Random(workers), []
    for least_parts, least_steps in kills:
        process = start(preferences)
        while process.poll() is None:
            now_parts, now_steps = progress_of(preferences)
            if now_parts >= least_parts and now_steps >= least_steps:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            hits.append(progress_of(preferences))
        finished(process, -signal.SIGKILL)
    assert any(0 < stored < 12 and not steps for stored, steps in hits)  # in the middle of the pass
    assert any(0 < steps < 12 for _, steps in hits)
    finished(start(preferences))
    assert exact(metrics(preferences)) == calm
    assert len(told(preferences, "streams_stored")) == 1


# --- before and beside a run --------------------------------------------------------------------------------


def test_the_preflight_asks_small_models(lessons):
    where = write_random_model(lessons.folder / "wide", 5, hidden_size=24)
    for k in (4, vocabulary(lessons)):
        lessons.stages["tune"]["teacher"] = {"path": where, "top_k": k}
        report = lessons.validate()
        assert report.exit_code == 0, report.error
        assert report.stages[0].rehearsal.loss > 1e-6
        assert not lessons.directory.exists()


def test_the_preflight_of_a_stored_reference(preferences):
    preferences.stages["tune"]["precompute_reference"] = True
    report = preferences.validate()
    assert report.exit_code == 0, report.error
    assert report.stages[0].rehearsal.loss > 0


def test_remote_runs_store_streams_as_well(preferences):
    live = tuned(preferences, "live")
    preferences.stages["tune"]["precompute_reference"] = True
    preferences.manifest |= {"name": "far", "run_dir": "memory://stored"}
    assert preferences.run() == 0
    far = Run("memory://stored/far")
    same(list(far.stage("tune").metrics.read()), live, PAIR_METRICS)
    assert not storage.exists(far.stage("tune").annotations)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["simpo", "orpo", "kto"])
def test_a_loss_without_a_reference_to_store_refuses_the_key(preferences, loss):
    preferences.stages["tune"] |= {"loss": loss, "precompute_reference": True}
    if loss != "kto":
        preferences.stages["tune"].pop("reference")
    with pytest.raises(ManifestError, match=f"loss: {loss}' does not read 'precompute_reference'"):
        preferences.run()


def test_more_tokens_than_there_are_is_refused_before_work_begins(lessons):
    lessons.stages["tune"]["teacher"] = {"path": lessons.models["two"], "top_k": 1000}
    report = lessons.validate()
    assert report.exit_code == 2
    assert "stages.tune.teacher: top_k is 1,000" in str(report.error)
    with pytest.raises(ManifestError, match="Lower top_k"):
        lessons.run()
    assert not storage.exists(lessons.directory.stage("tune").annotations)


def test_a_teacher_that_lacks_tokens_of_the_student_is_refused(lessons):
    where = write_random_model(lessons.folder / "wide", 5, vocab_size=vocabulary(lessons) + 3)
    lessons.stages["tune"] |= {"model": {"path": where}, "teacher": {"path": lessons.models["two"], "top_k": 4}}
    with pytest.raises(ManifestError, match="need a teacher that has all of them"):
        lessons.run()


def test_a_document_that_was_not_read_is_no_zero(preferences):
    preferences.stages["tune"]["precompute_reference"] = True
    stored = annotate.annotate(opened(preferences).models, Quiet(), lambda: False)
    assert stored
    preferences.written("pairs", pairs(40, seed=3), "preference")
    with (
        opened(preferences).data.loader(stored) as loader,
        pytest.raises(DataError, match="is not as it was when the reference was run"),
    ):
        next(iter(loader))
