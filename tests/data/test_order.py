"""The order of draws: complete, reproducible from any position, and as local as a stream needs it."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.data.order import SourceOrder, permutation, random_bits

keys = st.tuples(st.integers(-(2**70), 2**70), st.text(max_size=5))


@st.composite
def orders(draw, seekable=None):
    groups = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum))
    cuts = sorted(draw(st.sets(st.integers(1, len(groups)), max_size=3)) | {0, len(groups)})
    files = [list(range(a, b)) for a, b in pairwise(cuts)]
    seekable = draw(st.booleans()) if seekable is None else seekable
    return SourceOrder(draw(st.integers(0, 99)), draw(st.text(max_size=3)), groups, files, seekable), groups, files


def flat(order, start, count):
    return [(group, int(row)) for group, rows in order.draws(start, count) for row in rows]


def philox(key: int, counter: int) -> list[int]:
    """Philox4x64-10 as published: the four words of one counter."""
    mask = 2**64 - 1
    words = [(counter >> 64 * i) & mask for i in range(4)]
    low, high = key & mask, key >> 64
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(b >> 64) ^ words[1] ^ low, b & mask, (a >> 64) ^ words[3] ^ high, a & mask]
        low, high = (low + 0x9E3779B97F4A7C15) & mask, (high + 0xBB67AE8584CAA73B) & mask
    return words


@given(keys, st.integers(0, 10**12), st.integers(0, 20))
def test_random_bits_are_the_published_generator_at_any_position(what, start, count):
    key = int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=16).digest(), "little")
    expected = [philox(key, position // 4 + 1)[position % 4] for position in range(start, start + count)]
    assert random_bits(start, count, *what).tolist() == expected


@given(st.integers(0, 300), keys, keys)
def test_a_permutation_holds_every_number_once_and_depends_on_all_that_names_it(length, one, other):
    shuffled = permutation(length, *one)
    assert sorted(shuffled) == list(range(length))
    assert (permutation(length, *one) == shuffled).all()
    if length > 50 and one != other:
        assert (permutation(length, *other) != shuffled).any()


def test_permutations_are_uniform():
    seen = Counter(tuple(permutation(4, seed, "uniform")) for seed in range(24_000))
    assert len(seen) == 24
    assert sum((count - 1000) ** 2 / 1000 for count in seen.values()) < 60  # chi-squared, 23 degrees: p = 4e-5


@given(orders(), st.integers(0, 3))
def test_every_epoch_draws_every_row_once(made, epoch):
    order, groups, _ = made
    drawn = flat(order, epoch * order.rows, order.rows)
    assert sorted(drawn) == [(group, row) for group, rows in enumerate(groups) for row in range(rows)]


@given(orders(), st.data())
def test_draws_from_anywhere_are_those_of_reading_on(made, data):
    order, groups, files = made
    whole = flat(order, 0, 3 * order.rows)
    for _ in range(3):
        start = data.draw(st.integers(0, len(whole)))
        count = data.draw(st.integers(0, len(whole) - start))
        fresh = SourceOrder(*order._what, groups, files, order._seekable)
        assert flat(fresh, start, count) == flat(order, start, count) == whole[start : start + count]


@given(orders(), st.integers(0, 3))
def test_a_group_is_finished_before_the_next_and_a_file_before_the_next(made, epoch):
    order, _, files = made
    drawn = [group for group, _ in groupby(group for group, _ in flat(order, epoch * order.rows, order.rows))]
    assert len(drawn) == len(set(drawn))
    owner = {group: number for number, file in enumerate(files) for group in file}
    entered = [file for file, _ in groupby(owner[group] for group in drawn)]
    assert len(entered) == len(set(entered))


@given(orders(seekable=False), st.integers(0, 3))
def test_a_file_that_is_not_seekable_is_read_from_its_start_to_its_end(made, epoch):
    order, groups, files = made
    drawn = [group for group, _ in groupby(group for group, _ in flat(order, epoch * order.rows, order.rows))]
    for file in files:
        assert [group for group in drawn if group in file] == [group for group in file if groups[group]]


def test_files_groups_and_rows_change_places_from_epoch_to_epoch():
    order = SourceOrder(5, "many", [6] * 40, [list(range(i, i + 8)) for i in range(0, 40, 8)], seekable=True)
    one, two = flat(order, 0, order.rows), flat(order, order.rows, order.rows)

    def groups_of(drawn):
        return [group for group, _ in groupby(group for group, _ in drawn)]

    def files_of(drawn):
        return [file for file, _ in groupby(group // 8 for group in groups_of(drawn))]

    assert files_of(one) != files_of(two)
    assert [g for g in groups_of(one) if g < 8] != [g for g in groups_of(two) if g < 8]
    assert [row for group, row in one if group == 3] != [row for group, row in two if group == 3]
    assert one != sorted(one)


def test_sources_of_equal_shape_are_shuffled_apart():
    one, two = (SourceOrder(0, name, [100], [[0]], True) for name in ("a", "b"))
    assert flat(one, 0, 100) != flat(two, 0, 100)


def test_a_position_far_into_a_source_with_random_access_is_a_permutation():
    order = SourceOrder(1, "big", [100_000], [[0]], True)
    ((group, rows),) = order.draws(7 * order.rows, order.rows)
    assert group == 0
    assert (np.sort(rows) == np.arange(100_000)).all()
    assert abs(np.corrcoef(rows, np.arange(100_000))[0, 1]) < 0.02


def test_wrong_layouts_and_empty_sources_are_refused():
    with pytest.raises(ValueError, match="each of its 2 groups once"):
        SourceOrder(0, "x", [1, 2], [[0]], True)
    with pytest.raises(ValueError, match="'x': it has no rows"):
        list(SourceOrder(0, "x", [0, 0], [[0, 1]], True).draws(0, 1))
