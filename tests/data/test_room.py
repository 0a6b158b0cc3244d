"""What runs beside this process has a deadline and a bound on its memory; what exceeds them is told in its place."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from typing import Any

import psutil
import pytest

from postlude.data import room
from postlude.data.encode import Encoder
from postlude.data.example import BadRecord, Conversation
from postlude.data.room import Exceeded, Room
from postlude.data.tokenizer import CHATML, load_tokenizer
from postlude.errors import DataError
from postlude.manifest.schema import TokenizerFrom

STAYS = "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def stay(*_: Any) -> Any:
    while True:
        pass


def process_of(_: int) -> int:
    return os.getpid()


def at(place: int, does: Any) -> Room[int, int]:
    """A room in which one task does something, and the others are squared."""
    return Room(lambda task: does(task) if task == place else task**2, "this")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(room, "SECONDS", 1.0)
    monkeypatch.setattr(room, "MEMORY_BYTES", 2**27)


def raised(error):
    def does(_):
        raise error

    return does


def test_its_process_is_not_taken_for_what_it_is_a_copy_of():
    assert psutil.Process(Room(process_of, "this")(0)).name() == room.NAME


@pytest.mark.capability("Deadlines for rewards, templates and expressions that are not ours")
@pytest.mark.parametrize(
    ("does", "said"),
    [
        (stay, "this took longer than 1 seconds"),
        (lambda _: len(bytearray(2**29)), "this needed too much memory"),
        (lambda _: os._exit(0), "this ended its process"),
        (raised(BadRecord("is none")), "is none"),
        (raised(DataError("cannot be.")), "cannot be."),
    ],
    ids=["stays", "needs", "ends", "bad record", "error"],
)
def test_what_exceeds_is_told_in_its_place(does, said):
    results = at(300, does).map(range(600))
    assert str(results[300]) == said
    assert [result for result in results if not isinstance(result, Exception)] == [n**2 for n in range(600) if n != 300]


def test_what_is_a_fault_is_raised():
    with pytest.raises(ZeroDivisionError):
        at(2, lambda _: 1 // 0).map(range(4))


def test_each_place_of_several_is_told():
    results = Room(lambda task: stay() if task % 2 else task, "this").map(range(4))
    assert [isinstance(result, Exceeded) for result in results] == [False, True, False, True]


def test_a_process_that_was_killed_is_made_anew():
    room_ = Room(lambda _: os.getpid(), "this")
    first = room_(0)
    assert first != os.getpid()
    assert room_(0) == first
    psutil.Process(first).kill()
    assert room_(0) not in (first, os.getpid())
    copied: Room[int, int] = pickle.loads(pickle.dumps(Room(abs, "this")))
    assert copied(-1) == 1


def test_one_process_works_for_all_the_rooms_there_are():
    first, second = Room(process_of, "this"), Room(process_of, "this")
    assert first(0) == second(0) == first(1)
    later = Room(process_of, "this")
    assert later(0) == first(0) != os.getpid()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(first, (0,)) not in (first(0), os.getpid())
    assert later(0) == first(0)


def encoded(*contents: str, **settings: Any) -> Any:
    examples = [
        (content, Conversation([{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]))
        for content in contents
    ]
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    return Encoder(tokenizer, block=10_000, **settings).encode(examples, "source")


def test_a_template_that_does_not_end_is_named_and_the_others_are_encoded():
    template = CHATML.replace("{%", "{% if messages[0].content == 'stay' %}" + STAYS + "{% endif %}{%", 1)
    first, second, third = encoded("a", "stay", "b", template=template)
    assert isinstance(second.error, BadRecord)
    assert "took longer than 1 seconds" in str(second.error)
    assert first.documents
    assert third.documents
    assert first.error is third.error is None


def test_a_template_whose_constant_part_does_not_end_is_told():
    [only] = encoded("a", template=STAYS + CHATML)
    assert "took longer than 1 seconds" in str(only.error)
