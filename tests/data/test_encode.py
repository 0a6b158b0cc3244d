"""Documents from examples: on real conversations, and on texts and ids that are made to be difficult."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude.data import encode as encode_module
from postlude.data.document import SCORE, Document
from postlude.data.encode import NOTHING_TO_TRAIN, Encoder
from postlude.data.example import BadRecord, Conversation, Example, Judged, Ranked, Text, Tokens
from postlude.data.formats.sharegpt import ShareGPT
from postlude.data.formats.tree import Tree
from postlude.data.tokenizer import CHATML, load_tokenizer, train_tokenizer
from postlude.data.truncate import NOTHING_LEFT, TOO_LONG
from postlude.data.turns import MaskError
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import TokenizerFrom, TrainTokenizer
from postlude.rollout.prompts import Prompt, PromptEncoder

BYTES = load_tokenizer(TokenizerFrom(bytes=True))
TALK = Conversation([{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}])


def encode(example: Example, tokenizer: Any = BYTES, block: int = 10_000, **settings: Any) -> Any:
    return Encoder(tokenizer, block=block, **settings).encode([("source:1", example)], "source")[0]


def document(example: Example, tokenizer: Any = BYTES, **settings: Any) -> Document:
    encoded = encode(example, tokenizer, **{"drop_unprinted": ["reasoning", "tool_calls"], **settings})
    assert encoded.error is None
    (found,) = encoded.documents
    return found


def trained_text(tokenizer: Any, found: Document) -> list[str]:
    """The decoded stretches of trained tokens."""
    edges = np.flatnonzero(np.diff(found.trained, prepend=False, append=False))
    return [tokenizer.decode(found.tokens[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]


# --- real conversations ------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Qwen's tokenizer composes characters, and Phi's decoder drops the space at the beginning of a text."""
    return "".join(unicodedata.normalize("NFC", text).split())


def oasst(folder: Path) -> list[Conversation]:
    lines = (folder / "oasst_100_trees" / "en_100_tree.jsonl").read_text().splitlines()
    return [example for line in lines for example in Tree().parse(json.loads(line))]  # type: ignore[misc]


def tool_calls(folder: Path) -> list[Conversation]:
    records = json.loads((folder / "toolcall_sft" / "glaive_toolcall_en_demo.json").read_text())
    return [example for record in records[:120] for example in ShareGPT().parse(record)]  # type: ignore[misc]


def said_in_qwen(message: Any) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    parts = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    return "\n".join(filter(None, parts)) + "<|im_end|>"


def said_in_phi(message: Any) -> str:
    """Phi's template knows no calls."""
    return message["content"] + "<|end|>" if message["content"].strip() else ""


@pytest.mark.capability("Trained tokens of real conversations, with and without tools")
@pytest.mark.parametrize("read", [oasst, tool_calls])
@pytest.mark.parametrize(("name", "said"), [("qwen2.5", said_in_qwen), ("phi3", said_in_phi)])
def test_what_is_trained_is_what_the_assistant_said_and_its_stop_token(shared_data, read, name, said):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
    conversations = read(shared_data)
    assert len(conversations) >= 100
    encoder = Encoder(tokenizer, block=100_000, drop_unprinted=["tool_calls", "tools"] if name == "phi3" else ())
    examples = [(f"real:{i}", conversation) for i, conversation in enumerate(conversations)]
    for i, encoded in enumerate(encoder.encode(examples, "real")):
        assert encoded.error is None
        (found,), conversation = encoded.documents, conversations[i]
        expected = [said(message) for message in conversation.messages if message["role"] == "assistant"]
        assert list(map(plain, trained_text(tokenizer, found))) == [plain(text) for text in expected if text]
        if i % 10 == 0:
            rendered = tokenizer.apply_chat_template(
                [dict(message) for message in conversation.messages], tools=conversation.tools, return_dict=True
            )
            assert found.tokens.tolist() == rendered["input_ids"]


def test_a_batch_gives_what_each_example_gives_alone(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "qwen2.5"))
    talks: list[Example] = [*oasst(shared_data)[:20], *tool_calls(shared_data)[:20]]
    examples = [*talks, Text([("a ", 0.0), ("b", 2.0)]), Tokens([1, 2, 3], [0, 1, 1]), Tokens([-1], [1]), *talks]
    encoder = Encoder(tokenizer, block=300, truncate="split")
    together = encoder.encode([(f"real:{i}", example) for i, example in enumerate(examples)], "real")
    for i, (example, found) in enumerate(zip(examples, together, strict=True)):
        alone = encoder.encode([(f"real:{i}", example)], "real")[0]
        assert (found.dropped, found.truncated, str(found.error)) == (alone.dropped, alone.truncated, str(alone.error))
        for one, other in zip(found.documents, alone.documents, strict=True):
            assert one.example_id == f"real:{i}"
            assert one.source == "real"
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.streams["weight"], other.streams["weight"])


# --- texts -------------------------------------------------------------------------------------------------------

PIECES = st.lists(
    st.tuples(st.text(st.sampled_from("ab é🤗\n\u0301\ue000"), max_size=6), st.sampled_from([0.0, 0.5, 1.0])),
    max_size=5,
)


@given(PIECES, st.booleans())
def test_each_byte_of_a_text_has_the_weight_of_its_piece(pieces, end):
    encoded = encode(Text(pieces, end))
    tokens = [BYTES.bos_token_id, *"".join(text for text, _ in pieces).encode(), *[BYTES.eos_token_id] * end]
    weights = [0.0, *(weight for text, weight in pieces for _ in text.encode())]
    weights += [pieces[-1][1] if pieces else 0.0] * end
    if not any(weights):
        assert encoded.dropped == NOTHING_TO_TRAIN
        return
    (found,) = encoded.documents
    assert found.tokens.dtype == np.int64
    assert found.streams["weight"].dtype == np.float32
    assert found.tokens.tolist() == tokens
    assert found.streams["weight"].tolist() == weights


def test_a_token_that_straddles_two_pieces_counts_as_the_heavier_one():
    tokenizer = train_tokenizer(TrainTokenizer(vocabulary=300), ["abcd abcd abcd"] * 9)
    assert len(tokenizer("abcd", add_special_tokens=False)["input_ids"]) == 1
    for pieces, weights in (
        ([("ab", 0.0), ("cd", 0.5)], [0.0, 0.5, 0.5]),
        ([("ab", 0.5), ("cd", 0.0)], [0.0, 0.5, 0.0]),
        ([("ab", 1.0), ("cd", 0.5)], [0.0, 1.0, 0.5]),
    ):
        found = document(Text(pieces), tokenizer)
        assert found.streams["weight"].tolist() == weights
        assert found.tokens[1:2].tolist() == tokenizer("abcd", add_special_tokens=False)["input_ids"]


@pytest.mark.capability("The stop token is trained, also where it is the padding token")
def test_the_end_is_trained_where_it_is_the_padding_token(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "phi3"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    found = document(Text([("Once ", 0.0), ("upon a time", 1.0)]), tokenizer)
    assert found.tokens[[0, -1]].tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert found.trained[-1]
    tokenizer.pad_token = "<|end|>"
    chat = document(TALK, tokenizer)
    assert tokenizer.decode(chat.tokens[chat.trained]) == "That.<|end|>"


def test_an_end_that_the_tokenizer_adds_by_itself_is_not_doubled():
    from tokenizers import processors

    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    both = [("<|begin|>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|im_end|>", pair=None, special_tokens=both
    )
    for end in (True, False):
        found = document(Text([("ab", 1.0)], end), tokenizer)
        assert found.tokens.tolist() == [tokenizer.bos_token_id, *b"ab", *[tokenizer.eos_token_id] * end]


def test_a_tokenizer_without_an_end_is_refused_for_texts():
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    tokenizer.eos_token = None
    with pytest.raises(ManifestError, match="no end-of-sequence token"):
        encode(Text([("a", 1.0)]), tokenizer)
    assert document(Text([("ab", 1.0)], end=False), tokenizer).trained_tokens == 2


# --- token ids ---------------------------------------------------------------------------------------------------


def test_token_ids_are_taken_as_they_are():
    found = document(Tokens([5, 259, 0], [1.0, 0.25, 1.0]))
    assert found.tokens.tolist() == [5, 259, 0]
    assert found.streams["weight"].tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (Tokens([1, 260], [1, 1]), "token 2 has the id 260.*from 0 to 259"),
        (Tokens([-1, 2], [1, 1]), "token 1 has the id -1"),
        (Tokens([], []), "at least one"),
        (Tokens([1.5, 2], [1, 1]), "whole numbers"),  # type: ignore[list-item]
        (Tokens([1, 2], [1]), "as many weights"),
        (Tokens([1, 2], [1, -1]), "a number from 0"),
        (Tokens([1, 2], [1, float("nan")]), "a number from 0"),
    ],
)
def test_impossible_token_ids_are_a_bad_record(example, said):
    encoded = encode(example)
    assert isinstance(encoded.error, BadRecord)
    with pytest.raises(BadRecord, match=said):
        raise encoded.error


# --- what is lost is told ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "example",
    [
        Conversation([{"role": "user", "content": "Alone?"}]),
        Conversation([*TALK.messages[:1], {"role": "assistant", "content": "No.", "weight": 0}]),
        Conversation([*TALK.messages[:1], {"role": "assistant", "content": ""}]),
        Text([("given", 0.0)]),
        Text([]),
        Tokens([1, 2], [0, 0]),
        Tokens([1, 2], [1, 0]),
    ],
)
def test_an_example_with_nothing_to_train_is_dropped(example):
    # The first token of a document is predicted from nothing, so it never counts.
    template = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    encoded = encode(example, template=template)
    assert encoded == type(encoded)(dropped=NOTHING_TO_TRAIN)


@pytest.mark.parametrize(
    ("policy", "weights", "kept", "dropped"),
    [
        ("right", [0, 1, 1, 1, 1, 1], [[0, 1, 2, 3]], None),
        ("left", [0, 1, 1, 1, 1, 1], [[2, 3, 4, 5]], None),
        ("split", [0, 1, 1, 1, 1, 1], [[0, 1, 2, 3], [3, 4, 5]], None),
        ("drop", [0, 1, 1, 1, 1, 1], [], TOO_LONG),
        ("right", [0, 0, 0, 0, 1, 1], [], NOTHING_LEFT),
        ("left", [0, 1, 1, 0, 0, 0], [], NOTHING_LEFT),
        ("split", [0, 0, 0, 0, 1, 1], [[3, 4, 5]], None),
    ],
)
def test_truncation_keeps_what_its_policy_says(policy, weights, kept, dropped):
    encoded = encode(Tokens(range(6), weights), block=4, truncate=policy)
    assert [found.tokens.tolist() for found in encoded.documents] == kept
    assert encoded.dropped == dropped
    for found in encoded.documents:
        assert found.streams["weight"][0] == 0
        assert found.streams["weight"][1:].tolist() == [weights[token] for token in found.tokens[1:]]
    assert encoded.truncated == (6 - len({token for tokens in kept for token in tokens}) if kept else 0)


def test_an_example_that_cannot_be_used_is_told_in_its_place():
    template = "{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[-1].content * 2 }}"
    encoder = Encoder(BYTES, template=template, block=100)
    system = Conversation([{"role": "system", "content": "Be."}, *TALK.messages])
    encoded = encoder.encode([("a", Tokens([1, 2], [1, 1])), ("b", system), ("c", TALK), ("d", Text([("xy", 1)]))], "s")
    assert [type(one.error) for one in encoded] == [type(None), DataError, MaskError, type(None)]
    assert [len(one.documents) for one in encoded] == [1, 0, 0, 1]


# --- the tokenizer -----------------------------------------------------------------------------------------------


def test_how_others_use_the_tokenizer_does_not_matter():
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    encoder = Encoder(tokenizer, block=100)
    before = encoder.encode([("a", TALK)], "s")[0].documents[0].tokens.tolist()
    tokenizer(["x", "a long text"], truncation=True, max_length=3, padding="max_length", split_special_tokens=True)
    assert encoder.encode([("a", TALK)], "s")[0].documents[0].tokens.tolist() == before


def test_a_tokenizer_that_tells_no_offsets_is_refused():
    class Slow:
        is_fast = False
        name_or_path = "old"

    with pytest.raises(ManifestError, match=r"old does not say where.*tokenizer\.json"):
        Encoder(Slow(), block=8)  # type: ignore[arg-type]


def test_a_chat_needs_a_template_and_a_text_does_not():
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    tokenizer.chat_template = None
    assert document(Text([("a", 1.0)]), tokenizer).trained_tokens == 2
    with pytest.raises(ManifestError, match=r"data\.NAME\.template"):
        encode(TALK, tokenizer)


def test_generation_stops_where_turns_end(shared_data):
    expected = {"qwen2.5": ["<|im_end|>"], "phi3": ["<|endoftext|>", "<|end|>"], "gpt2": []}
    for name, stops in expected.items():
        tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
        encoder = Encoder(tokenizer, block=8)
        assert tokenizer.convert_ids_to_tokens(encoder.stop_ids) == stops
        assert encoder.remarks == []


def test_a_template_that_never_ends_a_turn_is_remarked_upon():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    encoder = Encoder(BYTES, template=template, block=8)
    assert encoder.stop_ids == [BYTES.eos_token_id]
    (remark,) = encoder.remarks
    assert "does not learn to stop" in remark
    ending = template.replace("+ '\n'", "+ eos_token + '\n'")
    assert Encoder(BYTES, template=ending, block=8).remarks == []


# --- answers that belong together ---------------------------------------------------------------------------

TEXTS = st.text("abc", max_size=12)


@given(TEXTS, st.lists(TEXTS, min_size=2, max_size=4), st.integers(8, 40), st.sampled_from(["left", "right", "drop"]))
def test_ranked_answers_are_kept_or_dropped_whole(prompt: str, several: list[str], block: int, policy: str) -> None:
    example = Ranked(
        [Text([(prompt, 0.0), (answer, 1.0)]) for answer in several], [float(n) for n in range(len(several))]
    )
    encoded = encode(example, block=block, truncate=policy)
    assert encoded.error is None
    if encoded.dropped is not None:
        assert encoded.documents == ()
        return
    assert len(encoded.documents) == len(several)
    assert sum(map(len, encoded.documents)) <= block
    for number, found in enumerate(encoded.documents):
        assert found.trained_tokens
        assert (found.streams[SCORE.name] == number).all()
        assert found.example_id == "source:1"


def test_one_answer_without_room_drops_all_of_them() -> None:
    prompt = "p" * 30
    example = Ranked([Text([(prompt, 0.0), ("a", 1.0)]), Text([(prompt, 0.0), ("b" * 30, 1.0)])])
    assert len(encode(example, block=200).documents) == 2
    assert encode(example, block=40).dropped == NOTHING_LEFT
    assert encode(example, block=40, truncate="drop").dropped == TOO_LONG
    with pytest.raises(ManifestError, match="cannot be split"):
        encode(example, block=40, truncate="split")


def test_a_judgement_is_the_score_of_every_token() -> None:
    for desirable, score in ((True, 1.0), (False, -1.0)):
        found = document(Judged(TALK, desirable))
        assert (found.streams[SCORE.name] == score).all()
        assert trained_text(BYTES, found) == ["That.<|im_end|>"]


# --- long texts ---------------------------------------------------------------------------------------------------


def test_texts_are_tokenised_in_portions_and_what_is_too_long_is_told(monkeypatch):
    texts = ["a" * 30, "b", "c" * 31, "", "d" * 9, "e" * 9, "f" * 5]
    examples = [(text[:1], Text([(text, 1.0)])) for text in texts]
    whole = Encoder(BYTES, block=99).encode(examples, "source")
    monkeypatch.setattr(encode_module, "_AT_A_TIME", 10)
    monkeypatch.setattr(encode_module, "LONGEST_TEXT", 30)
    assert [list(portion) for portion in encode_module._portions(dict(enumerate(texts)))] == [
        [0],
        [1],
        [2],
        [3, 4],
        [5],
        [6],
    ]
    for text, before, now in zip(texts, whole, Encoder(BYTES, block=99).encode(examples, "source"), strict=True):
        if len(text) > 30:
            assert isinstance(now.error, BadRecord)
            assert "31 characters, and at most 30" in str(now.error)
        else:
            assert [one.tokens.tolist() for one in now.documents] == [one.tokens.tolist() for one in before.documents]
    long = Conversation([{"role": "user", "content": "a" * 31}, {"role": "assistant", "content": "b"}])
    assert "at most 30" in str(encode(long, template=CHATML).error)
    for asked in ("a" * 31, long.messages[:1]):
        put = PromptEncoder(BYTES, CHATML).put([Prompt("a:1", "a", asked, None, None, {})])
        assert "at most 30" in str(put[0])


@pytest.fixture(scope="module", params=["gpt2", "phi3", "qwen2.5"])
def tokenizer(request, shared_data):
    return load_tokenizer(str(shared_data / "tokenizers" / request.param))


@given(st.text("aé語\U0001f389 \u0301\r\n", max_size=60), st.integers(0, 2**32))
@settings(deadline=None)
def test_of_many_stretches_the_tokens_are_those_of_each(tokenizer, text, seed):
    encoding = tokenizer.backend_tokenizer.encode(text)
    chance = random.Random(seed)
    together = encode_module._TokensOfMany(encoding)
    for _ in range(20):
        start, end = sorted((chance.randint(0, len(text)), chance.randint(0, len(text))))
        if start < end:
            assert together(start, end) == encode_module._tokens_of(encoding, start, end)
