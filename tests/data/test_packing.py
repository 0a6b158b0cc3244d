"""Packing: nothing lost, nothing over the block, and full."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from postlude.data.order import permutation
from postlude.data.packing import best_fit, close_window


def plain_best_fit(lengths: list[int], block: int) -> Counter[int]:
    """Best-fit decreasing as the textbook has it: how many blocks are left with how much room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(block - length)
    return Counter(rooms)


@st.composite
def lengths_and_block(draw):
    block = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, block), max_size=80)), block


@given(lengths_and_block())
def test_best_fit_is_that_of_the_textbook_and_loses_nothing(made):
    lengths, block = made
    blocks = best_fit(lengths, block)
    assert sorted(unit for units in blocks for unit in units) == list(range(len(lengths)))
    assert Counter(block - sum(lengths[unit] for unit in units) for units in blocks) == plain_best_fit(lengths, block)


@pytest.mark.parametrize("lengths", [[3, 11], [0, 3]])
def test_what_does_not_fit_is_refused(lengths):
    with pytest.raises(ValueError, match="blocks of 10"):
        best_fit(lengths, 10)


@given(lengths_and_block(), st.integers(1, 6), st.data())
def test_a_window_is_the_longest_prefix_that_fills_its_blocks(made, window, data):
    lengths, block = made
    draws: list[list[int]] = []
    while lengths:
        taken = data.draw(st.integers(1, min(3, len(lengths))))
        draws.append(lengths[:taken])
        lengths = lengths[taken:]
    if not draws:
        return
    taken, blocks = close_window(draws, block, window)
    packed = [length for units in draws[:taken] for length in units]
    assert sorted(unit for units in blocks for unit in units) == list(range(len(packed)))
    assert all(0 < sum(packed[unit] for unit in units) <= block for units in blocks)
    assert 1 <= taken <= len(draws)
    assert len(blocks) <= window or taken == 1
    if taken < len(draws):
        more = [length for units in draws[: taken + 1] for length in units]
        assert len(best_fit(more, block)) > window


def test_units_that_leave_half_of_each_block_still_close_a_window():
    taken, blocks = close_window([[6]] * 50, block=10, window=8)
    assert (taken, len(blocks)) == (8, 8)


def _gsm8k(folder, tokenizer):
    rows = [json.loads(line) for line in (folder / "gsm8k" / "train.jsonl").open(encoding="utf-8")]
    return _lengths(tokenizer, [row["question"] + "\n" + row["answer"] for row in rows])


def _oasst(folder, tokenizer):
    """The conversations from each root to each leaf."""
    texts = []

    def walk(message, above):
        path = [*above, message["text"]]
        for reply in message["replies"]:
            walk(reply, path)
        if not message["replies"]:
            texts.append("\n".join(path))

    for line in (folder / "oasst_100_trees" / "en_100_tree.jsonl").open(encoding="utf-8"):
        walk(json.loads(line)["prompt"], [])
    return _lengths(tokenizer, texts)


def _lengths(tokenizer, texts):
    return [len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]


@pytest.fixture(scope="module")
def real_lengths(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    gsm8k, oasst = _gsm8k(shared_data, tokenizer), _oasst(shared_data, tokenizer)
    return {"gsm8k": gsm8k, "oasst": oasst * 12, "mixture": gsm8k + oasst * 5}


@pytest.mark.capability("Packing by best fit fills at least 99 % of the blocks on real data")
@pytest.mark.parametrize("block", [4096, 8192])
@pytest.mark.parametrize("name", ["gsm8k", "oasst", "mixture"])
def test_real_lengths_fill_the_blocks(real_lengths, name, block):
    lengths = np.minimum(real_lengths[name], block)
    lengths = lengths[permutation(len(lengths), 0, name)].tolist()
    tokens, blocks = sum(lengths), 0
    while lengths:
        taken, packed = close_window([[length] for length in lengths], block, 128)
        blocks, lengths = blocks + len(packed), lengths[taken:]
    print(f"{name}, block {block}: fill {tokens / (blocks * block):.2%} in {blocks} blocks")
    assert tokens / (blocks * block) >= 0.99
