"""Secrets are known by how they were given, and are in nothing that is told or kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude import secrecy
from postlude.errors import UserError
from postlude.secrecy import kept, learn, learn_from, learn_variable, stand_in, stripped, told, without_secrets


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrecy, "_given", {})


@pytest.mark.parametrize(
    ("uri", "open_part"),
    [
        ("https://user:pass@host/a/b.jsonl", "https://host/a/b.jsonl"),
        ("https://ghp_token@host:8443/a", "https://host:8443/a"),
        ("https://user:p%40ss@host/a@v2", "https://host/a@v2"),
        ("https://user:pa/ss@host/a", "https://host/a"),
        ("s3://KEY:SECRET@bucket/x", "s3://bucket/x"),
        ("abfss://container@account.dfs.core.windows.net/x", "abfss://container@account.dfs.core.windows.net/x"),
        ("hf://datasets/someone/name@main/x", "hf://datasets/someone/name@main/x"),
        ("https://[::1]:80/a@b", "https://[::1]:80/a@b"),
        ("https://h/x?id=5&token=abc&page=2", "https://h/x?id=5&page=2"),
        ("https://h/x?API_KEY=abc", "https://h/x"),
        ("https://h/x?access%5Ftoken=abc#frag", "https://h/x#frag"),
        ("https://h/x#access_token=abc", "https://h/x"),
        (
            "https://b.s3.amazonaws.com/x?X-Amz-Signature=1&X-Amz-Credential=2&X-Amz-Date=3&versionId=4",
            "https://b.s3.amazonaws.com/x?versionId=4",
        ),
        ("https://b.s3.amazonaws.com/x?AWSAccessKeyId=a&Signature=b&Expires=1", "https://b.s3.amazonaws.com/x"),
        (
            "https://a.blob.core.windows.net/c/x?sv=2024&se=2026&sr=b&sp=r&sig=abc",
            "https://a.blob.core.windows.net/c/x",
        ),
        ("https://h/x?expires=5&key=train", "https://h/x?expires=5&key=train"),
        ("https://h/x", "https://h/x"),
        ("runs/x@y:z?token=1", "runs/x@y:z?token=1"),
    ],
)
def test_a_uri_is_stripped_of_what_lets_in(uri, open_part):
    assert stripped(uri) == kept(uri) == open_part
    assert stripped(open_part) == open_part
    assert without_secrets(f"nothing at '{uri}', really") == f"nothing at '{open_part}', really"


words = st.text("abcXYZ019._-~", min_size=6, max_size=12)


@given(words.map("user-".__add__), words.map("canary".__add__), words, st.sampled_from(["https", "s3", "ftp", "sftp"]))
def test_a_password_is_in_nothing_that_is_kept_or_told(user, password, path, scheme):
    uri = f"{scheme}://{user}:{password}@host/{path}"
    learn_from({"data": {"x": {"source": {"path": uri}}}})
    assert password not in str(kept({"x": [uri, {uri: f"read '{uri}'"}]}))
    assert password not in without_secrets(f"{uri!r}: 401 for {password}, {uri}.")


@given(st.recursive(st.text(max_size=20) | st.integers(), lambda below: st.dictionaries(st.text(max_size=9), below)))
def test_what_is_kept_is_kept_again_as_it_is(document):
    assert kept(kept(document)) == kept(document)
    assert kept({"token": document})


def test_what_stands_under_a_key_that_is_called_so_is_kept_as_a_digest():
    tree = {"stages": {"s": {"reward": [{"function": {"name": "mine", "api_key": "abcdef1"}}]}}}
    shown = kept(tree)["stages"]["s"]["reward"][0]["function"]
    assert shown == {"name": "mine", "api_key": stand_in("api_key", "abcdef1")}
    assert kept({"stages.s.reward.0.function.api_key": "abcdef1"}) == {
        "stages.s.reward.0.function.api_key": shown["api_key"]
    }
    assert stand_in("api_key", "abcdef2") != shown["api_key"]
    innocent = {"data": {"x": {"key": "id", "tokens": "a"}}, "compute": {"transport": {"token": "tls/token"}}}
    assert kept({**innocent, "max_tokens": 5, "eos_token": "</s>"}) == {
        **innocent,
        "max_tokens": 5,
        "eos_token": "</s>",
    }


def test_secrets_of_the_environment_are_known_by_their_names(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "canary-1")
    monkeypatch.setenv("SOME_TOKEN_PATH", "/tokens/canary")
    assert without_secrets("canary-1 at /tokens/canary") == "<SOME_API_KEY> at /tokens/canary"


def test_a_variable_that_was_given_is_a_secret_if_it_is_called_so_or_looks_so():
    for name, value in {
        "HF_TOKEN": "abcdefg",
        "PLAIN": "s3cr3t-value",
        "MODE": "offline",
        "HF_HOME": "/data/1",
    }.items():
        learn_variable(name, value)
    assert without_secrets("abcdefg s3cr3t-value offline /data/1") == "<HF_TOKEN> <PLAIN> offline /data/1"


def test_the_longer_secret_goes_first_and_errors_and_reports_have_none():
    learn("canary", "A")
    learn("canary-more", "B")
    assert str(UserError("it is canary-more")) == "it is <B>"
    assert told({"a": ["canary", 5], "b": None}) == {"a": ["<A>", 5], "b": None}
