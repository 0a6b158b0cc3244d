"""Packing: units into blocks of a fixed size, by best fit over a closed window of the data order.

Best-fit decreasing (Johnson 1973) takes the units longest first and puts each where it leaves the least room.
A window holds the draws that fill a number of blocks, and is closed before the first draw that would open one
block more: so no window ends in a block that is nearly empty, and only an epoch's end may leave room.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Put units of these lengths into as few blocks as best fit finds; returns the indices of the units in each.

    O(n log n) in the number of units. ValueError for a length that is not between 1 and ``block``.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    if order and not (lengths[order[-1]] >= 1 and lengths[order[0]] <= block):
        raise ValueError(
            f"Units of {lengths[order[-1]]} to {lengths[order[0]]} tokens cannot be packed into blocks of {block}."
        )
    blocks: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)
    """Blocks by the room left in them."""
    rooms: list[int] = []
    """Its keys, sorted: no more than there are blocks, nor than a block has tokens."""
    for unit in order:
        length = lengths[unit]
        tightest = bisect_left(rooms, length)
        if tightest < len(rooms):
            room = rooms[tightest]
            place = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[tightest]
            blocks[place].append(unit)
        else:
            room, place = block, len(blocks)
            blocks.append([unit])
        left = room - length
        if left:
            if left not in with_room:
                insort(rooms, left)
            with_room[left].append(place)
    return blocks


def close_window(draws: Sequence[Sequence[int]], block: int, window: int) -> tuple[int, list[list[int]]]:
    """Find how many of the ``draws`` fill ``window`` blocks, and pack them.

    ``draws`` holds the lengths of the units of each draw. Returns the number of draws taken, the most that the search
    meets with no more than ``window`` blocks but at least one, and the blocks, as indices into the units of the
    draws taken, laid end to end.
    """
    ends = np.cumsum([len(units) for units in draws])
    lengths = [length for units in draws for length in units]
    tokens = np.cumsum([sum(units) for units in draws])

    def pack(taken: int) -> list[list[int]]:
        return best_fit(lengths[: ends[taken - 1]], block)

    taken = max(int(np.searchsorted(tokens, window * block, side="right")), 1)
    blocks = pack(taken)
    # Give draws back, twice as many each time, until the rest fits; then halve the distance to what did not.
    too_many, back = taken, 1
    while len(blocks) > window and taken > 1:
        too_many, taken = taken, max(taken - back, 1)
        back *= 2
        blocks = pack(taken)
    while too_many - taken > 1:
        middle = (taken + too_many) // 2
        tried = pack(middle)
        if len(tried) <= window:
            taken, blocks = middle, tried
        else:
            too_many = middle
    return taken, blocks
