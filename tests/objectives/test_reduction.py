"""Sums by id against plain loops, and over two real ranks against one process that holds everything."""

from __future__ import annotations

import sys
from collections import defaultdict
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude.data.batch import collate
from postlude.data.document import Document, Unit
from postlude.objectives import reduction

ids_and_values = st.lists(st.tuples(st.integers(-1, 5), st.floats(-4, 4, width=32), st.sampled_from([0.0, 1.0, 2.5])))


@settings(deadline=None)
@given(ids_and_values)
def test_segments_are_what_a_loop_says(rows):
    ids = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    values, weights = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (1, 2))
    members = defaultdict(list)
    for i, value, weight in rows:
        if i >= 0:
            members[i].append((value, weight))
    segments = reduction.segments(ids)
    assert segments.ids.tolist() == sorted(members)

    def close(ours, of_members):
        assert ours.tolist() == pytest.approx([of_members(members[i]) for i in sorted(members)], abs=1e-9)

    def weighted(pairs):
        below = sum(w for _, w in pairs)
        return sum(v * w for v, w in pairs) / below if below else 0.0

    close(segments.sum(values), lambda pairs: sum(v for v, _ in pairs))
    close(segments.mean(values), lambda pairs: np.mean([v for v, _ in pairs]))
    close(segments.mean(values, weights), weighted)
    close(segments.deviation(values), lambda pairs: np.std([v for v, _ in pairs]))
    back = segments.spread(segments.sum(values), fill=-9.0).tolist()
    assert back == pytest.approx([sum(v for v, _ in members[i]) if i >= 0 else -9.0 for i in ids.tolist()])


def test_segments_of_vectors():
    segments = reduction.segments(torch.tensor([7, -1, 7, 3]))
    values = torch.arange(8.0).view(4, 2)
    assert segments.sum(values).tolist() == [[6, 7], [4, 6]]
    assert segments.spread(segments.sum(values)).tolist() == [[4, 6], [0, 0], [4, 6], [6, 7]]


def _batch():
    def document(length, group, trajectory):
        weight = np.array([0.0] + [1.0] * (length - 1), np.float32)
        return Document("s:x", "s", np.arange(length), {"weight": weight}, group, trajectory)

    pair = Unit((document(3, 9, 0), document(2, 9, 1)))
    single = Unit((document(4, 2, 0),))
    empty = Unit((document(1, -1, -1),))
    return collate([(pair, single, empty)], pad_to=13)


def test_the_parts_of_a_packed_batch():
    batch = _batch()
    rows = batch.trained_rows()
    by_document = reduction.by_document(batch, rows)
    of_documents = by_document.sum(batch.tokens[rows].float())
    assert of_documents.tolist() == [3, 1, 6, 0]
    assert reduction.by_unit(batch).sum(of_documents).tolist() == [4, 6, 0]
    group = reduction.by_group(batch)
    assert group.ids.tolist() == [2, 9]
    assert group.sum(of_documents).tolist() == [6, 4]
    assert reduction.by_trajectory(batch).sum(of_documents).tolist() == [9, 1]


# --- two ranks ----------------------------------------------------------------------------------------------

IDS = [5, 3, 5, -1, 8, 3, 5]
SPLITS = ([slice(0, 3), slice(3, 7)], [slice(0, 7), slice(7, 7)])
"""How the values lie on the ranks; in the second way one of them has none."""


def _loss(values, segments):
    """A loss that no rank can compute alone: every value times how far its segment's sum is from the mean."""
    per_value = segments.spread(segments.sum(values).square() * segments.mean(values).exp(), fill=0.5)
    return (values * per_value).sum()


def _rank(rank: int, meeting: str, values: torch.Tensor, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    results = []
    for split in SPLITS:
        own = values[split[rank]].clone().requires_grad_()
        segments = reduction.segments(torch.tensor(IDS)[split[rank]], dist.group.WORLD)
        loss = _loss(own, segments)
        loss.backward()
        parts = (segments.ids, segments.sum(own), segments.mean(own), segments.deviation(own), loss, own.grad)
        results.append([part.detach().tolist() for part in parts])
    queue.put((rank, results))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file")
def test_over_two_ranks_the_result_is_that_of_one_process(tmp_path):
    values = torch.randn(len(IDS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, str(tmp_path / "meeting"), values, queue)) for r in range(2)]
    for process in ranks:
        process.start()
    of_rank = dict(queue.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join()
        assert process.exitcode == 0

    alone = values.clone().requires_grad_()
    segments = reduction.segments(torch.tensor(IDS))
    loss = _loss(alone, segments)
    loss.backward()
    for case in range(len(SPLITS)):
        losses, gradient = 0.0, []
        for rank in range(2):
            ids, total, mean, deviation, own_loss, own_gradient = of_rank[rank][case]
            assert ids == segments.ids.tolist()
            assert total == pytest.approx(segments.sum(values).tolist())
            assert mean == pytest.approx(segments.mean(values).tolist())
            assert deviation == pytest.approx(segments.deviation(values).tolist())
            losses, gradient = losses + own_loss, gradient + own_gradient
        assert losses == pytest.approx(float(loss.detach()))
        assert gradient == pytest.approx(alone.grad.tolist())
