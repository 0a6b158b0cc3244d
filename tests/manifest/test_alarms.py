"""Rules for alarms are checked as strictly as all else, change no stage, and hold by default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from postlude.manifest.alarms import KINDS, AlarmRule, Receiver, rules_for
from postlude.manifest.load import load, restore
from postlude.manifest.lock import bearing, dump_lock, lock, read_lock
from postlude.manifest.problem import ManifestError
from postlude.manifest.text import parse

RULES = """
alarms:
  - {name: loss spike, deviates: 12}
  - {name: no progress, off: true}
  - {metric: eval_held_loss, stalls: 5}
  - {name: far, metric: kl, above: 0.2, for: 3, stages: [second]}
notify:
  - {webhook: "https://hooks.example.org/T0/very-secret-1"}
  - {command: [logger, -t, postlude], deadline_seconds: 2}
"""


def test_a_default_rule_is_changed_under_its_name():
    rule = AlarmRule.model_validate({"name": "loss spike", "least": 2.0})
    default = AlarmRule.model_validate({"name": "loss spike"})
    assert rule == default.model_copy(update={"least": 2.0})
    other = AlarmRule.model_validate({"name": "loss spike", "above": 12.0, "for": 3})
    assert (other.kind, other.metric, other.deviates, other.for_) == ("above", "loss", None, 3)
    assert AlarmRule.model_validate(rule.model_dump(by_alias=True)) == rule


def test_every_default_rule_is_one_and_says_how():
    rules = rules_for(None, "sft")
    assert len({rule.called for rule in rules}) == len(rules)
    assert {rule.kind for rule in rules} < set(KINDS)


def test_the_documentation_has_the_default_rules():
    page = (Path(__file__).parents[2] / "docs" / "alarms.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| `(\{.+\})` \|", page, re.MULTILINE)
    written = [AlarmRule.model_validate({**parse(keys, name).plain(), "name": f"{name}."}) for name, keys in rows]
    rules = [rule.model_copy(update={"name": f"{rule.name}."}) for rule in rules_for(None, "sft")]
    assert written == rules


def test_rules_hold_where_they_are_to(example):
    manifest = load(example + RULES, "x.yaml").manifest
    first, second = ({rule.called: rule for rule in rules_for(manifest.alarms, name)} for name in ("first", "second"))
    assert (first["loss spike"].deviates, first["loss spike"].metric) == (12.0, "loss")
    assert "no progress" not in first
    assert first["eval_held_loss stalls 5"].window == 1
    assert set(second) - set(first) == {"far"}
    assert {rule.called for rule in rules_for(None, "first")} - set(first) == {"no progress"}


def test_rules_bear_on_no_stage_and_are_not_there_unless_said(example):
    plain, ruled = load(example, "x.yaml"), load(example + RULES, "x.yaml")
    assert {"alarms", "notify"}.isdisjoint(plain.tree)
    assert "alarms" in ruled.tree
    assert bearing(plain, "first") == bearing(ruled, "first")
    assert restore(ruled.tree) == ruled.manifest


def test_an_address_is_kept_as_a_secret(example):
    text = dump_lock(lock(load(example + RULES, "x.yaml")))
    assert "very-secret-1" not in text
    restore(read_lock(text).manifest)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("{metric: loss}", "exactly one of"),
        ("{metric: loss, above: 1, below: 2}", "exactly one of"),
        ("{name: loss spike, above: 1, below: 2}", "exactly one of"),
        ("{name: los spike, above: 1}", "metric"),
        ("{name: [loss], above: 1}", "name"),
        ("{metric: loss, abve: 1}", "above"),
        ("{metric: loss, rises: 0.5}", "greater than 1"),
        ("{metric: loss, above: 1, stages: [frist]}", "'first'"),
        ("{metric: loss, not_finite: false}", "not_finite"),
    ],
)
def test_what_is_no_rule_is_refused_with_its_line(example, rule, why):
    with pytest.raises(ManifestError) as refused:
        load(example + f"\nalarms:\n  - {rule}\n", "x.yaml")
    assert f"x.yaml:{example.count(chr(10)) + 3}:" in str(refused.value)
    assert why in str(refused.value)


def test_a_receiver_is_an_address_or_a_program():
    for keys in ({}, {"webhook": "https://a.example", "command": ["a"]}, {"webhook": "ftp://a"}, {"command": []}):
        with pytest.raises(ValidationError):
            Receiver.model_validate(keys)
