"""The commands about a manifest, with the components that are really there."""

from __future__ import annotations

import json
import sys

import jsonschema
import pytest
from ruamel.yaml import YAML

from postlude.cli import main
from postlude.manifest.component import names
from postlude.manifest.json_schema import schema
from postlude.manifest.load import load, restore
from postlude.manifest.problem import ManifestError
from postlude.manifest.starter import run_name, starter


@pytest.fixture
def postlude(monkeypatch, capsys, tmp_path):
    """The command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["postlude", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        return (int(done.value.code or 0), *capsys.readouterr())

    return call


@pytest.mark.capability("init writes a commented manifest that runs as it is")
@pytest.mark.parametrize("recipe", [name for name in names("recipes") if name != "tally"])
def test_every_recipe_has_a_starter_that_is_right(recipe):
    """Also that of a package of the user's own."""
    begun = starter(recipe, "folder/my run")
    resolved = load(begun.text, "x.yaml")
    assert resolved.manifest.name == "my-run"
    assert restore(resolved.tree) == resolved.manifest
    jsonschema.Draft202012Validator(schema()).validate(YAML(typ="safe", pure=True).load(begun.text))
    assert begun.text.startswith("# ")
    assert "postlude run 'folder/my run.yaml'" in begun.text
    sources = [dataset["source"] for dataset in resolved.tree["data"].values()]
    paths = {source["path"] for source in sources if "path" in source}
    assert paths == set(begun.files)
    assert all(path.startswith("folder/my run") for path in paths)


def test_a_recipe_without_a_starter_says_which_have_one():
    with pytest.raises(ManifestError, match=r"'tally' brings no starter. These do: .*, confident_sft, .*, sft\."):
        starter("tally", "run")


@pytest.mark.parametrize("stem", ["x", "a/b/c", "über", "1e5", "true", "null", "a b", "...", "12", 'q"u', "a: b", "#"])
def test_any_file_name_makes_a_manifest_that_loads(stem):
    begun = starter("sft", stem)
    resolved = load(begun.text, "x.yaml")
    assert resolved.tree["data"]["sums"]["source"]["path"] == f"{stem}.jsonl"
    assert resolved.manifest.name == run_name(stem)


def test_the_starters_data_are_parted_into_what_is_learned_and_what_is_held_out():
    (lines,) = starter("sft", "x").files.values()
    records = [json.loads(line) for line in lines.splitlines()]
    assert len({record["id"] for record in records}) == len(records) == 64
    asked = [record["messages"][0]["content"] for record in records]
    assert len(set(asked)) == len(asked), "a question that is held out is not trained"


def test_init_writes_files_and_never_over_what_is_there(postlude, tmp_path):
    assert postlude("init")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"sft.yaml", "sft.jsonl"}
    assert postlude("init", "sft", "-o", "new/chat.yml")[0] == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"chat.yml", "chat.jsonl"}
    code, out, err = postlude("init")
    assert (code, out) == (1, "")
    assert "'sft.yaml' is there already" in err
    (tmp_path / "only.jsonl").write_text("mine")
    assert postlude("init", "-o", "only.yaml")[0] == 1
    assert (tmp_path / "only.jsonl").read_text() == "mine"
    assert not (tmp_path / "only.yaml").exists()


def test_init_of_a_recipe_that_is_not_there_offers_the_nearest(postlude):
    code, _, err = postlude("init", "stf")
    assert code == 2
    assert "Did you mean 'sft'?" in err


def test_explain_reads_the_file_and_the_assignments(postlude):
    postlude("init")
    code, out, _ = postlude("explain", "sft.yaml", "sft.steps", "sft.steps=7")
    assert code == 0
    assert out.startswith("stages.sft.steps: 7\n")
    assert "command line 'sft.steps=7'" in out
    assert "overrode  200 (stage at sft.yaml:" in out
    code, _, err = postlude("explain", "sft.yaml", "sft.stpes")
    assert code == 2
    assert "Did you mean 'steps'?" in err


@pytest.mark.parametrize(("content", "what"), [(b"", "empty"), (b"name: \xff", "not UTF-8"), (b"a: [", "not YAML")])
def test_a_file_that_is_no_manifest_is_told_by_name(postlude, tmp_path, content, what):
    (tmp_path / "bad.yaml").write_bytes(content)
    code, out, err = postlude("explain", "bad.yaml", "seed")
    assert (code, out) == (2, "")
    assert "bad.yaml:1:" in err
    assert what in err


def test_a_manifest_that_is_not_there_is_told_by_name(postlude):
    code, out, err = postlude("explain", "missing.yaml", "seed")
    assert code in (1, 2)
    assert out == ""
    assert "missing.yaml" in err


def test_recipes_lists_every_kind(postlude):
    _, out, _ = postlude("recipes")
    kinds = {kind: rest for kind, _, rest in (part.partition("\n") for part in out.split("\n\n"))}
    for kind, name in (("recipes", "sft"), ("optimizers", "adamw"), ("schedules", "cosine")):
        assert name in {line.split()[0] for line in kinds[kind].splitlines() if line}


def test_schema_prints_the_json_schema(postlude):
    code, out, _ = postlude("schema")
    assert code == 0
    assert json.loads(out) == schema()
