"""Tokenizers that are made here survive being saved, and those that cannot be loaded say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from postlude import storage
from postlude.data.tokenizer import load_tokenizer, train_tokenizer
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import TokenizerFrom, TrainTokenizer

BYTES = load_tokenizer(TokenizerFrom(bytes=True))
TEXTS = ["the cat sat on the mat\n", "the dog sat on the log; über 🤗\n", "a cat and a dog\n"] * 5
FILMS = ["Heat (1995)\nAlien\nUp", "Alien\nUp", "Up\nRocky"]


def bpe(vocabulary: int = 280) -> Any:
    return train_tokenizer(TrainTokenizer(vocabulary=vocabulary), iter(TEXTS))


def words(vocabulary: int = 100, separator: str = "\n") -> Any:
    texts = [text.replace("\n", separator) for text in FILMS]
    return train_tokenizer(TrainTokenizer(kind="word", vocabulary=vocabulary, separator=separator), texts)


@pytest.mark.capability("A tokenizer of bytes")
@given(st.text())
def test_each_byte_is_the_token_of_its_value(text):
    if "<|" not in text:
        assert BYTES(text, add_special_tokens=False)["input_ids"] == list(text.encode())
        assert BYTES.decode(list(text.encode())) == text


@pytest.mark.capability("A tokenizer trained on the data: byte-level BPE, or one token a piece")
def test_bpe_learns_the_texts_the_same_way_each_time():
    tokenizer = bpe()
    assert tokenizer.backend_tokenizer.to_str() == bpe().backend_tokenizer.to_str()
    assert len(tokenizer) == 280
    assert len(tokenizer("the cat", add_special_tokens=False)["input_ids"]) < len("the cat")
    assert tokenizer.decode(tokenizer("Ωmega 🤗\n  x", add_special_tokens=False)["input_ids"]) == "Ωmega 🤗\n  x"


@pytest.mark.parametrize("separator", ["\n", "; ", "||", "^"])
def test_a_word_is_a_piece_between_separators(separator):
    tokenizer = words(separator=separator)
    text = separator.join(["Up", "Heat (1995)", "Alien"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == 3
    assert tokenizer.decode(ids) == text
    assert tokenizer(f"Up{separator}Jaws", add_special_tokens=False)["input_ids"] == [ids[0], tokenizer.unk_token_id]
    assert tokenizer.backend_tokenizer.to_str() == words(separator=separator).backend_tokenizer.to_str()


def test_a_small_vocabulary_keeps_the_most_frequent_pieces():
    tokenizer = words(vocabulary=7)
    unknown = tokenizer.unk_token_id
    ids = tokenizer("Up\nAlien\nRocky\nHeat (1995)", add_special_tokens=False)["input_ids"]
    assert unknown not in ids[:2]
    assert ids[2:] == [unknown, unknown]


@pytest.mark.parametrize("make", [lambda: BYTES, bpe, words], ids=["bytes", "bpe", "words"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text"])
def test_a_saved_tokenizer_is_the_same_again(make, architecture, tmp_path: Path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        for text in ("Heat (1995)\nAlien", "  über 🤗 <|im_end|>\n\n"):
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert again(text)["input_ids"] == ids
            assert again.decode(ids) == tokenizer.decode(ids)
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.chat_template == tokenizer.chat_template
        assert again.pad_token_id != again.eos_token_id


@pytest.mark.parametrize("make", [lambda: BYTES, bpe], ids=["bytes", "bpe"])
def test_chats_can_be_rendered_and_their_turns_end_with_the_end_token(make):
    tokenizer = make()
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    trained = [
        i for i, is_trained in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if is_trained
    ]
    assert tokenizer.decode(trained) == "Hello<|im_end|>"
    assert trained[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("kind", "least"), [("bpe", 260), ("word", 5)])
def test_a_vocabulary_without_room_is_refused(kind, least):
    train_tokenizer(TrainTokenizer(kind=kind, vocabulary=least), FILMS)
    with pytest.raises(ManifestError, match=rf"tokenizer\.train\.vocabulary is {least - 1}.*at least {least}"):
        train_tokenizer(TrainTokenizer(kind=kind, vocabulary=least - 1), FILMS)


def test_a_tokenizer_is_loaded_from_a_path(shared_data):
    path = str(shared_data / "tokenizers" / "qwen2.5")
    assert len(load_tokenizer(TokenizerFrom(path=path))) == len(load_tokenizer(path)) == 151_665


def test_a_tokenizer_is_loaded_from_remote_storage(tmp_path):
    bpe().save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        storage.write_bytes(f"memory://tokenizers/small/{file.name}", file.read_bytes())
    storage.write_bytes("memory://tokenizers/small/model.safetensors", b"not read")
    assert load_tokenizer("memory://tokenizers/small").get_vocab() == bpe().get_vocab()
    with pytest.raises(ManifestError, match="no tokenizer at memory://tokenizers/large"):
        load_tokenizer("memory://tokenizers/large")


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ManifestError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [None, '{"version": "1.0"', '{"version": "1.0", "model": {}}'])
def test_a_directory_without_a_usable_tokenizer_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ManifestError, match=r"The tokenizer .* cannot be loaded .*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_one_to_be_trained_is_not_loaded():
    with pytest.raises(ValueError, match="trained"):
        load_tokenizer(TokenizerFrom(train=TrainTokenizer()))
