"""Objectives that the trainer was not written for, on one rank and on two with uneven work, give the same steps."""

from __future__ import annotations

import pytest
from postlude_example.harness import Task

from ranks import run_ranks

SPLITS = {
    "one rank": Task(ranks=1, block=64, micro=64),
    "one rank, larger micro-batches": Task(ranks=1, block=64, micro=192),
    "one rank, larger blocks": Task(ranks=1, block=96, micro=96),
    "two ranks, an odd number of blocks": Task(ranks=2, block=64, micro=64),
    "two ranks, padded": Task(ranks=2, block=64, micro=128),
}

OBJECTIVES = ("nll", "pairwise", "actor_critic")


@pytest.fixture(scope="module")
def lines() -> dict[tuple[str, str], list[dict[str, float]]]:
    """Three steps' metrics of each objective under each split; the ranks of a number are started once."""
    wanted = {(objective, name): task.of(objective) for objective in OBJECTIVES for name, task in SPLITS.items()}
    measured = {}
    for ranks in (1, 2):
        tasks = {key: task for key, task in wanted.items() if task.ranks == ranks}
        lines = run_ranks("postlude_example.harness:train_all", list(tasks.values()), ranks, 1)[0]
        measured |= dict(zip(tasks, lines, strict=True))
    return measured


@pytest.mark.capability("The same loss whatever the blocks, micro-batches and workers")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("split", list(SPLITS)[1:])
def test_the_split_changes_nothing_but_rounding(lines, objective: str, split: str) -> None:
    for expected, found in zip(lines[objective, "one rank"], lines[objective, split], strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_companion_with_an_optimizer_of_its_own_learns_and_its_gradient_is_told_apart(lines) -> None:
    steps = lines["actor_critic", "one rank"]
    assert all(step["grad_norm_critic"] > 0 for step in steps)
    assert steps[-1]["value_error"] < steps[0]["value_error"]
