"""The commands over a real run: what each prints and exits with, and that an amendment is replayed."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from postlude.workflow.amend import amend


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, new_project) -> Any:
    """A run that is done, for commands that only look at it."""
    project = new_project(tmp_path_factory.mktemp("commands"))
    project.manifest["data"]["unseen"] = {**project.data, "limit": 6}
    project.stage["evaluate"] = {"data": {"unseen": 1.0}, "every": 2}
    assert project("run", "MANIFEST").exit_code == 0
    return project


# --- before a run -------------------------------------------------------------------------------------------


@pytest.mark.capability("A preflight without a GPU: data, masks, memory, one small step")
def test_validate_tells_of_data_memory_and_a_step(trained) -> None:
    done = trained("validate", "MANIFEST", "--json")
    assert done.exit_code == 0
    report = done.json
    assert report["ok"]
    assert report["error"] is None
    (stage,) = report["stages"]
    chats = stage["data"]["sources"]["chats"]
    assert (chats["records"], chats["read"], chats["units"], chats["dropped"]) == (48, 48, 48, {})
    assert 0 < chats["trained_share"] < 1
    assert stage["data"]["packing"]["tokens_per_epoch"] == chats["tokens"]
    assert stage["held_out_documents"] == {"unseen": 6}
    assert stage["step"]["loss"] == pytest.approx(stage["step"]["log_vocabulary"], rel=0.05)
    memory = stage["step"]["memory"]
    assert memory["parameters"] == AutoModelForCausalLM.from_pretrained(trained.sft.artifact).num_parameters()
    padding = memory["weights_bytes"] // 4 - memory["parameters"]  # of embedding and head, to a multiple of 64 rows
    assert 0 <= padding < 2 * 64 * 16


def test_validate_shows_tables(trained) -> None:
    shown = trained("validate", "MANIFEST")
    assert shown.exit_code == 0
    for said in ("chats", "Everything is in order", "gradient norm"):
        assert said in shown.out


def test_validate_on_a_sample_reads_no_more(trained) -> None:
    whole, part = (
        trained("validate", "MANIFEST", "--json", *sample).json["stages"][0]["data"]
        for sample in ((), ("--sample", "12"))
    )
    assert part["packing"]["sampled"]
    assert part["sources"]["chats"]["read"] == 12
    assert part["packing"]["records_per_epoch"] == whole["packing"]["records_per_epoch"] == 48
    assert part["packing"]["tokens_per_epoch"] == pytest.approx(whole["packing"]["tokens_per_epoch"], rel=0.05)


@pytest.mark.capability("Try a pipeline on synthetic records")
def test_validate_with_synthetic_records(trained) -> None:
    done = trained("validate", "MANIFEST", "--json", "--sample", "12", "--synthetic", "120")
    assert done.exit_code == 0
    verdicts = done.json["stages"][0]["synthetic"]["chats"]
    assert sum(verdict["count"] for verdict in verdicts) == 120
    assert all(verdict["as_expected"] for verdict in verdicts)
    by_what = {verdict["what"]: verdict for verdict in verdicts}
    assert by_what["two users in a row"]["found"].startswith("refused")
    assert by_what["Korean, decomposed"]["found"] == "trained on"


def test_looking_ahead_writes_nothing_into_the_run(project) -> None:
    assert project("validate", "MANIFEST").exit_code == 0
    assert project("preview", "MANIFEST").exit_code == 0
    assert not Path(project.manifest["run_dir"]).exists()


@pytest.mark.capability("The packed blocks, each token marked as trained or not")
def test_preview_shows_the_very_blocks(trained) -> None:
    done = trained("preview", "MANIFEST", "-n", "2", "--json")
    assert done.exit_code == 0
    blocks = done.json["blocks"]
    assert len(blocks) == 2
    documents = [document for block in blocks for document in block["documents"]]
    tokenizer = AutoTokenizer.from_pretrained(trained.sft.artifact)
    for document in documents:
        assert set(document) == {"example_id", "source", "tokens"}
        tokens = document["tokens"]
        assert set(tokens[0]) == {"id", "text", "trained"}
        assert "".join(token["text"] for token in tokens) == tokenizer.decode([token["id"] for token in tokens])
        said = "".join(token["text"] for token in tokens if token["trained"])
        number = said.partition(",")[0]
        assert said == f"{number}, {number} and {number}.<|im_end|>"
    first_step = {row["example_id"] for row in trained.sft.read_examples().to_pylist() if row["step"] == 1}
    assert {document["example_id"] for document in documents} <= first_step


class _Page(HTMLParser):
    """Collects the tokens of a page, with whether each is shown as trained."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[tuple[int, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        shown = dict(attrs)
        if tag == "span" and shown.get("title"):
            self.tokens.append((int(shown["title"] or ""), "t" in (shown["class"] or "").split()))


def test_preview_as_a_page_marks_the_same_tokens(trained, tmp_path: Path) -> None:
    page = tmp_path / "preview.html"
    done = trained("preview", "MANIFEST", "--html", str(page), "--json")
    tokens = [token for document in done.json["blocks"][0]["documents"] for token in document["tokens"]]
    parser = _Page()
    parser.feed(page.read_text())
    assert parser.tokens == [(token["id"], token["trained"]) for token in tokens]


def test_explain_tells_where_a_value_comes_from(trained) -> None:
    shown = trained("explain", "MANIFEST", "sft.optimizer.lr")
    assert shown.exit_code == 0
    assert "0.01" in shown.out
    assert "small.yaml:" in shown.out
    assert "command line" in trained("explain", "MANIFEST", "sft.optimizer.lr", "sft.optimizer.lr=0.5").out


# --- a run and what it leaves -------------------------------------------------------------------------------


def test_status_and_runs_tell_the_same(trained) -> None:
    status = trained("status", "RUN", "--json").json
    assert (status["state"], status["held_by"], status["alarms"]) == ("done", None, [])
    (stage,) = status["stages"]
    lines = trained.sft.metrics.read()
    assert (stage["state"], stage["step"], stage["last_checkpoint"]) == ("done", 4, 4)
    assert (stage["first_loss"], stage["loss"]) == (lines[0]["loss"], lines[-1]["loss"])
    assert trained("runs", trained.manifest["run_dir"], "--json").json == {"runs": [status]}
    assert "step 4" in trained("status", "RUN").out
    assert "1 of 1" in trained("runs", trained.manifest["run_dir"]).out


def test_a_finished_run_is_kept_as_it_is(trained) -> None:
    before = trained.sft.metrics.read()
    assert trained("run", "MANIFEST").exit_code == 0
    assert trained.sft.metrics.read() == before


def test_generate_talks_to_a_stage(trained) -> None:
    def said(model: str, *options: str) -> str:
        done = trained("generate", model, "--prompt", "Say 3.", "--max-tokens", "8", *options)
        assert done.exit_code == 0
        return done.out

    assert said("RUN/sft") == said("RUN") == said(trained.sft.artifact)
    once, again, otherwise = (said("RUN", "--temperature", "2", "--seed", seed) for seed in ("1", "1", "2"))
    assert once == again != otherwise


def test_verify_finds_packed_logits_the_same(trained) -> None:
    done = trained("verify", "RUN/sft", "--json")
    assert done.exit_code == 0
    assert done.json["same"]


def test_an_export_is_the_artifact_and_overwrites_nothing(trained, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert trained("export", "RUN", str(out)).exit_code == 0
    artifact = Path(trained.sft.artifact)
    names = {file.name for file in artifact.iterdir()} - {"COMMITTED"}
    assert {file.name for file in out.iterdir()} == names
    same = names - {"lineage.json"}
    assert {n: (out / n).read_bytes() for n in same} == {n: (artifact / n).read_bytes() for n in same}
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage.pop("exported_from")["place"] == str(artifact)
    assert lineage == json.loads((artifact / "lineage.json").read_text())
    assert (lineage["run"], lineage["stage"], lineage["recipe"], lineage["steps"]) == ("small", "sft", "sft", 4)
    assert set(lineage["data"]) == {"chats"}
    again = trained("export", "RUN", str(out))
    assert again.exit_code == 1
    assert "there already" in again.err


def test_a_place_that_is_no_run_is_told_with_the_nearest(trained, tmp_path: Path) -> None:
    for arguments, nearest in (
        (("status", f"{trained.manifest['run_dir']}/smal"), "'small'"),
        (("export", f"{trained.run.uri}/sfr", str(tmp_path / "out")), "'sft'"),
    ):
        done = trained(*arguments)
        assert done.exit_code == 1
        assert nearest in done.err


# --- amendments ---------------------------------------------------------------------------------------------


@pytest.mark.capability("Recorded amendments, applied at a named step and replayed by a resume")
def test_an_amendment_of_a_running_stage_holds_from_its_step_on_and_is_replayed(project, after_step) -> None:
    project.stage |= {"steps": 6, "schedule": "constant"}
    with after_step(3, lambda: amend(project.run.uri, "sft", "optimizer.lr=0.5")):
        assert project("run", "MANIFEST").exit_code == 0
    undisturbed = project.lines()
    assert [line["lr"] for line in undisturbed] == [0.01] * 3 + [0.5] * 3
    (applied,) = project.told("amendment_applied")
    assert (applied["step"], applied["assignment"]) == (4, "optimizer.lr=0.5")
    lineage = json.loads(Path(project.sft.artifact, "lineage.json").read_text())
    assert lineage["amendments"] == ["optimizer.lr=0.5"]
    for last_checkpoint in (4, 0):  # after the step of the amendment, and before it
        project.as_if_killed(keep=last_checkpoint)
        assert project("run", "MANIFEST").exit_code == 0
        assert project.told("stage_started")[-1].get("from_step") == last_checkpoint
        assert project.lines() == undisturbed


def test_an_amendment_asked_for_while_nothing_runs_holds_from_the_resume_on(project) -> None:
    project.stage["schedule"] = "constant"
    assert project("run", "MANIFEST").exit_code == 0
    refused = project("amend", "RUN", "sft", "optimizer.lr=0.5")
    assert refused.exit_code == 2
    assert "done" in refused.err
    project.as_if_killed(keep=2)
    for assignment, said in (("steps=9", "may not change"), ("optimizer.lr=fast", "lr"), ("lr", "KEY=VALUE")):
        wrong = project("amend", "RUN", "sft", assignment)
        assert wrong.exit_code == 2
        assert said in wrong.err
    before = project.lines()
    assert "0.01 -> 0.5" in project("amend", "RUN", "sft", "optimizer.lr=0.5").out
    assert project("run", "MANIFEST").exit_code == 0
    assert project.lines()[:2] == before[:2]
    assert [line["lr"] for line in project.lines()] == [0.01, 0.01, 0.5, 0.5]
