"""The plan over random graphs: what is changed runs again with all that hangs on it; a stop anywhere changes no end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.runs import Identity
from postlude.workflow.plan import Decision, Standing, decide
from postlude.workflow.run import can_begin

Graph = dict[str, list[str]]


class World:
    """Stages whose config is one number, and what stands of them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.config = dict.fromkeys(graph, 0)
        self.standing = {name: Standing() for name in graph}

    def identify(self, name: str, inputs: Mapping[str, str], revisions: Mapping[str, int]) -> Identity:
        return Identity(config={"number": self.config[name]}, inputs=inputs, input_revisions=revisions)

    def plan(self, forced: set[str] | None = None) -> list[Decision]:
        return decide(self.graph, self.identify, self.standing, forced=forced or set())

    def carry_out(self, decisions: list[Decision]) -> None:
        for one in decisions:
            if one.action != "keep":
                self.standing[one.stage] = Standing(one.identity, True, True, 1, one.identity.revision)

    def copy(self) -> World:
        other = World(self.graph)
        other.config, other.standing = dict(self.config), dict(self.standing)
        return other

    def below(self, names: set[str]) -> set[str]:
        found = set(names)
        for name, needed in self.graph.items():
            if found & set(needed):
                found.add(name)
        return found


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    names = [f"s{number}" for number in range(draw(st.integers(1, 7)))]
    return {
        name: sorted(draw(st.sets(st.sampled_from(names[:place]), max_size=3))) if place else []
        for place, name in enumerate(names)
    }


@pytest.mark.capability("What runs and why is planned from the manifest and the run alone")
@given(graphs(), st.data())
def test_what_is_changed_runs_again_with_all_that_hangs_on_it_and_nothing_else(
    graph: Graph, data: st.DataObject
) -> None:
    world = World(graph)
    assert {one.action for one in world.plan()} == {"run"}
    world.carry_out(world.plan())
    for _ in range(3):
        changed = data.draw(st.sets(st.sampled_from(sorted(graph))))
        for name in changed:
            world.config[name] += data.draw(st.integers(1, 2))
        planned = world.plan()
        again = {one.stage for one in planned if one.action == "run again"}
        assert again == world.below(changed)
        assert {one.stage for one in planned if one.action == "keep"} == set(graph) - again
        for one in planned:
            before = world.standing[one.stage].revision
            assert one.identity.revision == before + (one.stage in again)
            assert bool(one.reasons) == (one.stage in again)
        # Stopped after any part of the plan, the next plan leads to the same end.
        whole, parts = world.copy(), world.copy()
        whole.carry_out(planned)
        parts.carry_out(planned[: data.draw(st.integers(0, len(planned)))])
        half = data.draw(st.sampled_from(sorted(graph)))
        if half in again and parts.standing[half].identity != whole.standing[half].identity:
            parts.standing[half] = Standing(revision=world.standing[half].revision + 1)  # moved aside and not begun
        parts.carry_out(parts.plan())
        assert parts.standing == whole.standing
        assert {one.action for one in whole.plan()} == {"keep"}
        world = whole


@given(graphs(), st.data())
def test_what_is_forced_runs_again_and_what_hangs_on_it_follows(graph: Graph, data: st.DataObject) -> None:
    world = World(graph)
    world.carry_out(world.plan())
    name = data.draw(st.sampled_from(sorted(graph)))
    forced = world.below({name})
    first = world.plan(forced)
    assert {one.stage for one in first if one.action == "run again"} == forced
    world.carry_out([one for one in first if one.stage == name])
    assert {one.stage for one in world.plan() if one.action == "run again"} == forced - {name}


@given(graphs(), st.data())
def test_an_unfinished_stage_goes_on_unless_an_input_is_new(graph: Graph, data: st.DataObject) -> None:
    world = World(graph)
    world.carry_out(world.plan())
    name = data.draw(st.sampled_from(sorted(graph)))
    world.standing[name] = replace(world.standing[name], done=False, step=7)
    decision = next(one for one in world.plan() if one.stage == name)
    assert (decision.action, decision.step) == ("resume", 7)
    if graph[name]:
        world.config[graph[name][0]] += 1
        assert next(one for one in world.plan() if one.stage == name).action == "run again"


@given(graphs(), st.data())
def test_no_two_stages_of_a_pool_and_no_stage_before_its_needs(graph: Graph, data: st.DataObject) -> None:
    some = st.lists(st.sampled_from("xyz"), min_size=1, max_size=2, unique=True)
    pools = {name: data.draw(some) for name in graph}
    left = {one.stage: replace(one, pools=pools[one.stage]) for one in World(graph).plan()}
    at_work: dict[str, Decision] = {}
    done: set[str] = set()
    while left or at_work:
        for one in can_begin(left, at_work):
            assert set(one.needs) <= done
            at_work[one.stage] = left.pop(one.stage)
        taken = [pool for one in at_work.values() for pool in one.pools]
        assert len(set(taken)) == len(taken) > 0
        ended = data.draw(st.sampled_from(sorted(at_work)))
        del at_work[ended]
        done.add(ended)
    assert done == set(graph)
