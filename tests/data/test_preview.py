"""The preview: the blocks as packed, every token with its text, safe to print and to open in a browser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from postlude.data.document import Document, Unit
from postlude.data.loader import Loader, StepBlocks
from postlude.data.preview import preview, token_texts

TOKENIZERS = ("tokenizers/qwen2.5", "tokenizers/phi3", "tokenizers/gpt2", "models/stories260K_hf")
HARD = "  Hello  wörld 👩‍👩‍👧 日本語 \n\n don't , العربية <|endoftext|> \r\n\t\ufffd é\x00\x1b[31m"


@pytest.fixture(scope="module")
def tokenizers(shared_data):
    def load(folder):
        if (folder / "tokenizer_config.json").exists():
            return AutoTokenizer.from_pretrained(folder)
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    return {name: load(shared_data / name) for name in TOKENIZERS}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60)
@given(text=st.text(max_size=40))
@example(text=HARD)
def test_texts_join_to_the_decoded_document(tokenizers, name, text):
    tokenizer = tokenizers[name]
    ids = tokenizer(text)["input_ids"]
    texts = list(token_texts(ids, tokenizer))
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@given(ids=st.lists(st.integers(0, 50_256), max_size=20))
def test_even_ids_that_spell_no_text_are_shown(tokenizers, ids):
    tokenizer = tokenizers["tokenizers/gpt2"]
    texts = list(token_texts(ids, tokenizer))
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_in_parts_stands_at_its_last_token(tokenizers):
    tokenizer = tokenizers["tokenizers/gpt2"]
    assert list(token_texts(tokenizer("a日b")["input_ids"], tokenizer)) == ["a", "", "日", "b"]
    cut = tokenizer("a日")["input_ids"][:-1]
    assert list(token_texts(cut, tokenizer)) == ["a", "\ufffd"]


def document(tokenizer, name, text):
    ids = np.array(tokenizer(text)["input_ids"])
    return Document(f"chats:{name}", "chats", ids, {"weight": (np.arange(len(ids)) % 3 > 0).astype(np.float32)})


@pytest.fixture(scope="module")
def blocks(tokenizers):
    tokenizer = tokenizers["tokenizers/qwen2.5"]
    text = "1 < 2 & 3\n\x1b[31mred </p></span><script>alert(2)</script>"
    first = document(tokenizer, "<script>alert(1)</script>", text)
    pair = Unit((document(tokenizer, "b", HARD), document(tokenizer, "c", "quiet")))
    last = Unit((document(tokenizer, "d", "last"),))
    return [(Unit((first,)), pair), (), (last,)]


@pytest.fixture(scope="module")
def shown(tokenizers, blocks):
    step = StepBlocks(blocks, epoch=0, progress=1.0, documents=4, tokens=0)
    return preview([step], tokenizers["tokenizers/qwen2.5"], 5)


@pytest.mark.capability("Preview of the packed blocks with trained tokens marked, as JSON, in colour and as a page")
def test_the_json_is_the_contract(shown, blocks):
    told = json.loads(json.dumps(shown.to_json()))
    assert told.keys() == {"blocks"}
    assert len(told["blocks"]) == 2  # an empty block has nothing to show
    for block, packed in zip(told["blocks"], [block for block in blocks if block], strict=True):
        assert block.keys() == {"documents"}
        documents = [document for unit in packed for document in unit.documents]
        for said, document in zip(block["documents"], documents, strict=True):
            assert said.keys() == {"example_id", "source", "tokens"}
            assert (said["example_id"], said["source"]) == (document.example_id, "chats")
            assert [token["id"] for token in said["tokens"]] == document.tokens.tolist()
            assert [token["trained"] for token in said["tokens"]] == document.trained.tolist()
            assert all(token.keys() == {"id", "text", "trained"} for token in said["tokens"])


def test_only_so_many_blocks_are_taken_from_a_loader(tokenizers, made_up_source):
    source = made_up_source("a", [[(16,)] * 50])
    with Loader({"a": source}, {"a": 1.0}, seed=0, block=16, blocks_per_step=4, window=8, epochs=1) as loader:
        shown = preview(loader, tokenizers["tokenizers/gpt2"], 6)
        assert loader.state()["step"] == 2
    with Loader({"a": source}, {"a": 1.0}, seed=0, block=16, blocks_per_step=4, window=8, epochs=1) as loader:
        packed = [block for step in loader for block in step.blocks][:6]
    assert [[document.example_id for document in block.documents] for block in shown.blocks] == [
        [document.example_id for unit in block for document in unit.documents] for block in packed
    ]


def test_a_terminal_shows_trained_tokens_in_another_colour_and_is_not_acted_upon(shown):
    out = StringIO()
    Console(file=out, force_terminal=True, color_system="standard", width=120).print(shown.render())
    assert "\x1b[31m" not in out.getvalue()
    assert "\x1b[1;32m" in out.getvalue()
    plain = StringIO()
    Console(file=plain, width=120).print(shown.render())
    for said in (
        "chats:<script>alert(1)</script>",
        "chats:b",
        "chats:c",
        "1 < 2 & 3↵",
        "␛[31mred",
        "日本語",
        "Block 2",
    ):
        assert said in plain.getvalue()


class Page(HTMLParser):
    """What a browser would make of the page: its elements, and the tokens."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.tokens = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "span" and "title" in dict(attributes):
            self.tokens.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "span" and "p" in self.open and "article" in self.open:
            self.tokens[-1][1] += data


def test_the_page_is_whole_escaped_and_needs_nothing_else(shown):
    page = shown.to_html("A <b>run</b>")
    parsed = Page(page)
    assert parsed.open == []
    assert {tag for tag, _ in parsed.elements} == {
        *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2"),
        *("section", "article", "header", "b", "span", "p"),
    }
    assert not any(name in attributes for _, attributes in parsed.elements for name in ("src", "href", "onclick"))
    assert "url(" not in page
    assert "@import" not in page
    tokens = [token for block in shown.blocks for document in block.documents for token in document.tokens]
    assert [int(attributes["title"]) for attributes, _ in parsed.tokens] == [token.id for token in tokens]
    assert [attributes["class"].split()[0] == "t" for attributes, _ in parsed.tokens] == [
        token.trained for token in tokens
    ]
    texts = "".join(text for _, text in parsed.tokens)
    assert "1 < 2 & 3↵\n␛[31mred </p></span><script>alert(2)</script>" in texts
    assert "A &lt;b&gt;run&lt;/b&gt;" in page
