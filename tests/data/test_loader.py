"""The loader: every example once an epoch, the same steps on any number of ranks, and after any stop."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import traceback
from collections import Counter
from concurrent.futures import wait
from contextlib import contextmanager
from itertools import groupby, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude.data.loader import Loader
from postlude.errors import DataError

BLOCK = 16


@st.composite
def rows(draw):
    """The units of one row: mostly one, some dropped, some split."""
    return draw(st.lists(st.integers(1, BLOCK), max_size=3).map(tuple))


@st.composite
def plans(draw, names=("a", "b", "c")):
    """What sources and a loader are made of."""
    sources = {}
    for name in names[: draw(st.integers(1, len(names)))]:
        groups = draw(st.lists(st.lists(rows(), max_size=6), min_size=1, max_size=4))
        groups[0].append((draw(st.integers(1, BLOCK)),))  # so that no epoch is without anything
        cut = draw(st.integers(0, len(groups)))
        numbers = list(range(len(groups)))
        sources[name] = {
            "lengths": groups,
            "files": [numbers[:cut], numbers[cut:]],
            "seekable": draw(st.booleans()),
        }
    return {
        "sources": sources,
        "weights": {name: draw(st.sampled_from([0.5, 1.0, 2.0])) for name in sources},
        "seed": draw(st.integers(0, 99)),
        "blocks_per_step": draw(st.integers(1, 5)),
        "window": draw(st.integers(1, 5)),
    }


def build(source_class, plan, **options):
    plan = dict(plan)
    plan["sources"] = {name: source_class(name, **source) for name, source in plan["sources"].items()}
    return Loader(**plan, **{"block": BLOCK, **({} if "steps" in options else {"epochs": 2}), **options})


def ids(blocks):
    return [[document.example_id for unit in block for document in unit.documents] for block in blocks]


def told(step):
    return ids(step.blocks), step.epoch, step.progress, step.documents, step.tokens


def run(loader):
    with loader:
        return [told(step) for step in loader]


@pytest.mark.capability("Every example is trained exactly once an epoch")
@settings(max_examples=40)
@given(plans(names=("only",)))
def test_an_epoch_holds_every_example_once(made_up_source, plan):
    source = made_up_source("only", **plan["sources"]["only"])
    steps = run(build(made_up_source, plan))
    for epoch in (0, 1):
        seen = [name for blocks, of, *_ in steps if of == epoch for block in blocks for name in block]
        assert sorted(seen) == sorted(source.ids())


@settings(max_examples=40)
@given(plans())
def test_a_mixture_draws_each_source_pass_by_pass(made_up_source, plan):
    loader = build(made_up_source, plan)
    steps = run(loader)
    seen = Counter(name for blocks, *_ in steps for block in blocks for name in block)
    assert loader.state()["draws"] == sum(loader.state()["cursors"].values())
    for name, source in plan["sources"].items():
        passes, part = divmod(loader.state()["cursors"][name], sum(map(len, source["lengths"])))
        counts = [seen[example] for example in made_up_source(name, **source).ids()]
        assert all(count in ((passes, passes + 1) if part else (passes,)) for count in counts)
    leader = loader._reader.mixture.leader
    assert loader.state()["cursors"][leader] == 2 * sum(map(len, plan["sources"][leader]["lengths"]))


@settings(max_examples=40)
@given(plans())
def test_steps_are_full_to_the_end_of_an_epoch_and_blocks_are_never_over_full(made_up_source, plan):
    with build(made_up_source, plan) as loader:
        steps = list(loader)
    for epoch, of_epoch in groupby(steps, key=lambda step: step.epoch):
        *full, last = of_epoch
        assert all(len(step.blocks) == plan["blocks_per_step"] for step in full), epoch
        assert 1 <= len(last.blocks) <= plan["blocks_per_step"]
    for step in steps:
        lengths = [sum(len(unit) for unit in block) for block in step.blocks]
        assert all(1 <= length <= BLOCK for length in lengths)
        assert step.tokens == sum(lengths)
        assert step.documents == sum(len(unit.documents) for block in step.blocks for unit in block)
    progress = [step.progress for step in steps]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    assert progress[0] > 0


@pytest.mark.capability("The order of the data does not depend on the number of workers")
@settings(max_examples=40)
@given(plans(), st.sampled_from([2, 3, 5]))
def test_ranks_share_the_steps_of_one(made_up_source, plan, world):
    alone = run(build(made_up_source, plan))
    ranks = [run(build(made_up_source, plan, rank=rank, world=world)) for rank in range(world)]
    assert {len(steps) for steps in ranks} == {len(alone)}
    for (whole, *facts), *shares in zip(alone, *ranks, strict=True):
        assert all(share[1:] == tuple(facts) for share in shares)
        assert len({len(share[0]) for share in shares}) == 1
        dealt = [block for turn in zip(*(share[0] for share in shares), strict=True) for block in turn]
        assert dealt[: len(whole)] == whole
        assert all(block == [] for block in dealt[len(whole) :])
        assert len(dealt) - len(whole) < world


@pytest.mark.capability("A run stopped anywhere continues with exactly the next step")
@settings(max_examples=40)
@given(plans(), st.sampled_from([{"epochs": 2}, {"steps": 9}]), st.data())
def test_a_stop_anywhere_is_continued_exactly(made_up_source, plan, length, data):
    undisturbed = run(build(made_up_source, plan, **length))
    stop = data.draw(st.integers(0, len(undisturbed)))
    world = data.draw(st.sampled_from([1, 3]))
    with build(made_up_source, plan, rank=world - 1, world=world, **length) as loader:
        for _ in range(stop):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
    with build(made_up_source, plan, **length) as resumed:
        resumed.load(state)
        assert resumed.state() == state
        assert [told(step) for step in resumed] == undisturbed[stop:]
        resumed.load(state)  # also where it has been read before
        assert [told(step) for step in islice(resumed, 3)] == undisturbed[stop : stop + 3]


FRESH_PROCESS = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("made_up", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from postlude.data.loader import Loader
plan, state, block = json.load(sys.stdin)
plan["sources"] = {name: module.MadeUpSource(name, **source) for name, source in plan["sources"].items()}
with Loader(**plan, block=block, epochs=2) as loader:
    loader.load(state)
    steps = [[[d.example_id for u in b for d in u.documents] for b in s.blocks] for s in loader]
json.dump(steps, sys.stdout)
"""


def test_a_fresh_process_continues_exactly(made_up_source, pytestconfig):
    lengths = [[((7 * row + group) % BLOCK + 1,) for row in range(30)] for group in range(4)]
    plan = {
        "sources": {
            "a": {"lengths": lengths, "files": [[0, 1], [2, 3]], "seekable": False},
            "b": {"lengths": lengths[:1]},
        },
        "weights": {"a": 2.0, "b": 1.0},
        "seed": 4,
        "blocks_per_step": 3,
        "window": 4,
    }
    with build(made_up_source, plan) as loader:
        for _ in range(8):
            next(loader)
        state = loader.state()
        rest = [ids(step.blocks) for step in loader]
    where = pytestconfig.rootpath / "tests" / "data" / "conftest.py"
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(where)],
        input=json.dumps([plan, state, BLOCK]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == rest
    assert len(rest) > 8


@settings(max_examples=40)
@given(plans(), st.integers(1, 12))
def test_steps_go_on_over_epochs_until_they_are_done(made_up_source, plan, steps):
    with build(made_up_source, plan, steps=steps) as loader:
        progress = [step.progress for step in loader]
        assert next(loader, None) is None
    assert progress == [(i + 1) / steps for i in range(steps)]


@pytest.mark.capability("A stream is read group by group, never all at once")
@settings(max_examples=40)
@given(plans(names=("stream",)))
def test_a_stream_has_one_group_open_and_is_read_in_order(made_up_source, plan):
    plan["sources"]["stream"]["seekable"] = False
    source = made_up_source("stream", **plan["sources"]["stream"])
    run(Loader(**{**plan, "sources": {"stream": source}}, block=BLOCK, epochs=1))
    opened = [group for group, _ in groupby(group for group, _ in source.reads)]
    assert len(opened) == len(set(opened))
    for file in source.files:
        assert [group for group in opened if group in file] == [group for group in file if source.groups[group]]


def test_a_resume_reads_on_from_its_window(made_up_source):
    groups = [[(BLOCK,)] * 50 for _ in range(20)]
    plan = {"weights": {"a": 1.0}, "seed": 0, "block": BLOCK, "blocks_per_step": 10, "window": 10, "epochs": 1}
    source = made_up_source("a", groups, seekable=False)
    with Loader({"a": source}, **plan) as loader:
        for _ in range(60):
            next(loader)
        state = loader.state()
    source.reads.clear()
    with Loader({"a": source}, **plan) as loader:
        loader.load(state)
        assert sum(1 for _ in loader) == 40
    assert {group for group, _ in source.reads} == set(range(12, 20))


def test_only_so_many_windows_are_prepared_ahead(made_up_source):
    source = made_up_source("a", [[(BLOCK,)] * 5000])
    plan = {"weights": {"a": 1.0}, "seed": 0, "block": BLOCK, "blocks_per_step": 1, "window": 20, "epochs": 1}
    with Loader({"a": source}, **plan, ahead=2) as loader:
        next(loader)
        wait(loader._futures)
        assert 60 <= len(source.reads) <= 60 + 20  # one in hand, two ahead, and what was read beyond them


class Broken(Exception):
    pass


def _break_at_row(group, positions):
    if 70 in positions:
        raise Broken("row 70 is broken")


def test_an_error_of_a_source_reaches_the_trainer_with_its_traceback(made_up_source):
    source = made_up_source("a", [[(BLOCK,)] * 100], before_read=_break_at_row)
    plan = {"weights": {"a": 1.0}, "seed": 0, "block": BLOCK, "blocks_per_step": 3, "window": 4, "epochs": 1}
    loader = Loader({"a": source}, **plan)
    with pytest.raises(Broken, match="row 70 is broken") as raised:
        list(loader)
    assert "_break_at_row" in "".join(traceback.format_exception(raised.value))
    assert data_threads() == []
    with pytest.raises(Broken):  # never a silent end
        list(loader)
    handed_out = 3 * loader.state()["step"]
    source.before_read = lambda group, positions: None
    assert handed_out + sum(len(step.blocks) for step in loader) == 100


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("postlude-data")]


def test_the_thread_ends_with_the_last_step_and_with_close(made_up_source):
    plan = {"weights": {"a": 1.0}, "seed": 0, "block": BLOCK, "blocks_per_step": 3, "window": 4}
    loader = Loader({"a": made_up_source("a", [[(BLOCK,)] * 100])}, **plan, epochs=1)
    assert data_threads() == []
    list(loader)
    assert data_threads() == []
    loader = Loader({"a": made_up_source("a", [[(BLOCK,)] * 100])}, **plan, steps=1000)
    one = next(loader)
    assert len(data_threads()) == 1
    loader.close()
    loader.close()
    assert data_threads() == []
    assert ids(next(loader).blocks) != ids(one.blocks)  # it goes on where it was
    loader.close()


def test_a_close_does_not_wait_for_the_window_to_be_full(made_up_source):
    reading, go_on = threading.Event(), threading.Event()

    def before_read(group, positions):
        if len(source.reads) > 12_000:  # in the second window
            reading.set()
            go_on.wait(60)

    def let_go_when_stopped():
        loader._reader.stopped.wait(60)
        go_on.set()

    source = made_up_source("a", [[(1,)] * 100_000], before_read=before_read)
    plan = {"weights": {"a": 1.0}, "seed": 0, "block": 10_000, "blocks_per_step": 1, "window": 1, "steps": 9}
    loader = Loader({"a": source}, **plan)
    next(loader)
    reading.wait(60)
    helper = threading.Thread(target=let_go_when_stopped)
    helper.start()
    loader.close()
    helper.join(60)
    assert data_threads() == []
    assert len(source.reads) < 15_000


def test_what_is_waited_for_is_said(made_up_source):
    said, release = [], threading.Event()

    @contextmanager
    def waiting(what):
        said.append(what)
        release.set()
        yield

    source = made_up_source("a", [[(BLOCK,)] * 8], before_read=lambda group, positions: release.wait(60))
    plan = {"weights": {"a": 1.0}, "seed": 0, "block": BLOCK, "blocks_per_step": 4, "window": 4, "epochs": 1}
    with Loader({"a": source}, **plan, waiting=waiting) as loader:
        next(loader)
    assert "window 0 in epoch 0" in said[0]


@pytest.mark.capability("Data with nothing to train on is an error that says what was dropped and why")
def test_a_pass_that_yields_nothing_says_why(made_up_source):
    plan = {"seed": 0, "block": BLOCK, "blocks_per_step": 1, "window": 2, "epochs": 1}
    sources = {"a": made_up_source("a", [[()] * 40]), "b": made_up_source("b", [[()] * 3])}
    with pytest.raises(DataError) as raised:
        list(Loader(sources, {"a": 1.0, "b": 0.5}, **plan))
    for said in (
        f"block of {BLOCK} tokens",
        "'a' (40 records)",
        "made up to be dropped (40, such as a:0-",
        "batch.block",
    ):
        assert said in str(raised.value)


def test_a_source_without_rows_is_an_error(made_up_source):
    with pytest.raises(DataError, match="data set 'empty' has no records"):
        Loader(
            {"empty": made_up_source("empty", [[]])},
            {"empty": 1.0},
            seed=0,
            block=8,
            blocks_per_step=1,
            window=1,
            epochs=1,
        )


def test_other_data_than_the_state_was_made_with_are_an_error(made_up_source):
    plan = {"weights": {"a": 1.0}, "seed": 0, "block": BLOCK, "blocks_per_step": 1, "window": 2, "epochs": 1}
    state = Loader({"a": made_up_source("a", [[(3,)] * 4])}, **plan).state()
    with pytest.raises(DataError, match=r"\{'a': 4\}, now they are \{'a': 5\}"):
        Loader({"a": made_up_source("a", [[(3,)] * 5])}, **plan).load(state)


def test_long_units_do_not_come_first(made_up_source):
    source = made_up_source("a", [[(1 + row % BLOCK,) for row in range(4000)]])
    plan = {"weights": {"a": 1.0}, "seed": 0, "block": BLOCK, "blocks_per_step": 1, "window": 1000, "epochs": 1}
    with Loader({"a": source}, **plan) as loader:
        longest = [max(len(unit) for unit in step.blocks[0]) for step in islice(loader, 1000)]
    assert abs(sum(longest[:500]) - sum(longest[500:])) < 0.05 * sum(longest)


def test_a_unit_longer_than_the_block_is_refused_by_its_id(made_up_source):
    plan = {"weights": {"a": 1.0}, "seed": 0, "block": BLOCK, "blocks_per_step": 1, "window": 2, "epochs": 1}
    with pytest.raises(ValueError, match=f"a:0-1-0: {BLOCK + 1} tokens"):
        list(Loader({"a": made_up_source("a", [[(3,), (BLOCK + 1,)]])}, **plan))


def test_a_record_of_more_units_than_a_window_is_kept_together(made_up_source):
    source = made_up_source("a", [[(BLOCK,) * 30, (5,), (), ()]])
    plan = {"weights": {"a": 1.0}, "seed": 0, "block": BLOCK, "blocks_per_step": 4, "window": 2, "epochs": 1}
    steps = run(Loader({"a": source}, **plan))
    assert sorted(name for blocks, *_ in steps for block in blocks for name in block) == sorted(source.ids())


def test_a_loader_needs_exactly_one_length(made_up_source):
    source = {"a": made_up_source("a", [[(3,)]])}
    for length in ({}, {"epochs": 1, "steps": 1}):
        with pytest.raises(ValueError, match="give one of them"):
            Loader(source, {"a": 1.0}, seed=0, block=8, blocks_per_step=1, window=1, **length)


@pytest.mark.capability("The weights of a mixture may change at a step, and a resume draws the same")
@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_weights_that_change_at_a_step_leave_what_was_drawn_and_come_again_after_any_stop(made_up_source, plan, data):
    """Whenever the weights change and wherever it is stopped, before or after: the steps are the same."""
    whole = run(build(made_up_source, plan))
    changes = {
        data.draw(st.integers(0, len(whole) - 1)): {
            name: data.draw(st.sampled_from([0.1, 1.0, 9.0])) for name in plan["sources"]
        }
        for _ in range(data.draw(st.integers(1, 2)))
    }

    def go_on(loader, first, most=10_000):
        steps, states = [], [json.dumps(loader.state())]
        with loader:
            for number in range(first, first + most):
                if number in changes:
                    loader.reweigh(changes[number])
                step = next(loader, None)
                if step is None:
                    break
                steps.append(told(step))
                states.append(json.dumps(loader.state()))
        return steps, states

    steps, states = go_on(build(made_up_source, plan), 0)
    first = min(changes)
    assert steps[:first] == whole[:first]
    if len(plan["sources"]) == 1:
        assert steps == whole
    stop = data.draw(st.integers(0, len(steps)))
    again = build(made_up_source, plan)
    for number, weights in sorted(changes.items()):
        if number < stop:
            again.reweigh(weights)  # as a resume does, before it takes up the state
    again.load(json.loads(states[stop]))
    assert go_on(again, stop) == (steps[stop:], states[stop:])
    leader = build(made_up_source, plan)._reader.mixture.leader
    assert json.loads(states[-1])["cursors"][leader] == 2 * sum(map(len, plan["sources"][leader]["lengths"]))


def test_new_weights_hold_from_the_end_of_the_window_in_progress(made_up_source):
    even = {"lengths": [[(BLOCK,)] * 400], "files": [[0]], "seekable": True}
    plan = {
        "sources": {"a": even, "b": even},
        "weights": {"a": 1.0, "b": 1.0},
        "seed": 3,
        "blocks_per_step": 2,
        "window": 8,
    }
    with build(made_up_source, plan, steps=60) as loader:
        drawn = []
        for number in range(60):
            if number == 10:  # 20 blocks are handed out: the third window, up to the 24th, is in progress
                loader.reweigh({"a": 1.0, "b": 1e-9})
            drawn += [name[0] for block in ids(next(loader).blocks) for name in block]
    assert 6 <= drawn[:20].count("b") <= 14
    assert "b" in drawn[20:24]
    assert drawn[24:] == ["a"] * 96
