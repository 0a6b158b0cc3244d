"""Alarms in the manifest: rules over what is measured, with those that hold where nothing is said, and who is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from postlude.manifest.component import Config, Name, Positive, Share

Above0 = Annotated[float, Field(gt=0)]
KINDS = ("above", "below", "deviates", "rises", "falls", "climbs", "stalls", "not_finite", "off")


class AlarmRule(Config):
    """When a metric is a case for a person. Exactly one of the kinds, from ``above`` to ``off``, says how."""

    exactly_one: ClassVar[tuple[tuple[str, ...], ...]] = (KINDS,)

    name: Annotated[str, Field(pattern=r"^\S(.{0,60}\S)?$")] | None = None
    """What the alarm is called. That of a default rule changes this rule: what is not said stays as it is. By default
    the metric and the kind."""
    metric: str
    """A key of ``metrics.jsonl`` or one that is made of them; with ``*`` all that fit, each by itself. Those that begin
    with ``worker_`` are of the readings, each worker by itself."""
    stages: list[Name] | None = None
    """Only these stages; by default all."""
    above: float | None = None
    """A threshold: it is more than this."""
    below: float | None = None
    """A threshold: it is less than this."""
    deviates: Above0 | None = None
    """It is so many deviations from the median of its last values. A deviation is 1.4826 times the median distance from
    the median: for a normal distribution the standard deviation."""
    rises: Annotated[float, Field(gt=1)] | None = None
    """It is more than so many times the median of its last values."""
    falls: Annotated[float, Field(gt=0, lt=1)] | None = None
    """It is less than this share of the median of its last values."""
    climbs: Annotated[float, Field(ge=1)] | None = None
    """Each of its last values is above the one before, and the last more than so many times the first."""
    stalls: Positive | None = None
    """So many values came without one that is better than all before."""
    not_finite: Literal[True] | None = None
    """It is infinite or not a number, where all other kinds pass it over."""
    off: Literal[True] | None = None
    """Never: for a default rule that is not wanted."""
    over: Positive | None = None
    """How many last values are looked at: by default 50, and of ``stalls`` 1, whose values are their means."""
    after: Positive = 20
    """How many values there must be before their median says anything; never more than ``over``."""
    least: Annotated[float, Field(ge=0)] = 0.0
    """In units of the metric: how far it must be from the median, from the first value, or from the best one before."""
    direction: Literal["up", "down"] | None = None
    """Which deviations count; by default both."""
    better: Literal["lower", "higher"] = "lower"
    """Which value is the better one, for ``stalls``."""
    for_: Annotated[Positive, Field(alias="for")] = 1
    """So many values in a row must be so before it is told."""
    quiet: Positive = 20
    """So many values in a row must not be so before it is over, and armed again."""
    margin: Share = 0.1
    """How far within its limit, as a share of it, a value must be to count as not so while the alarm lasts."""
    without: str | None = None
    """From the first line on that has this metric the rule rests."""

    @model_validator(mode="before")
    @classmethod
    def _from_default(cls, keys: Any) -> Any:
        """A default rule under its name, with what is said here in place of it."""
        name = keys.get("name") if isinstance(keys, dict) else None
        if not isinstance(name, str) or name not in _BY_NAME:
            return keys
        default = _BY_NAME[name]
        given = {key: value for key, value in keys.items() if value is not None}
        says_how = any(key in given for key in KINDS)
        return {key: value for key, value in default.items() if not (says_how and key in KINDS)} | given

    @property
    def called(self) -> str:
        """The name, or the metric and the kind."""
        return self.name or f"{self.metric} {self.kind} {getattr(self, self.kind)}"

    @property
    def kind(self) -> str:
        """Which of :data:`KINDS` it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def window(self) -> int:
        """How many last values are looked at."""
        return self.over or (1 if self.kind == "stalls" else 50)

    @property
    def of_workers(self) -> bool:
        """Whether its metrics are of the readings."""
        return self.metric.startswith("worker_")


MIB = 2**20
_DEFAULTS: tuple[dict[str, Any], ...] = (
    {"name": "not finite", "metric": "*loss", "not_finite": True},
    {"name": "gradient not finite", "metric": "grad_norm*", "not_finite": True, "for": 4},
    {"name": "loss spike", "metric": "loss", "deviates": 8.0, "least": 0.5, "direction": "up"},
    {"name": "gradient spike", "metric": "grad_norm*", "rises": 10.0, "least": 1.0},
    {"name": "update spike", "metric": "update_ratio*", "rises": 10.0, "least": 0.001},
    {"name": "no progress", "metric": "loss", "stalls": 2000, "over": 100, "without": "groups_alike"},
    {"name": "no progress of the reward", "metric": "reward", "stalls": 500, "over": 50, "better": "higher"},
    {"name": "trained share fallen", "metric": "trained_share", "falls": 0.5, "for": 5},
    {"name": "entropy collapse", "metric": "entropy", "below": 0.01, "for": 5},
    {"name": "groups all alike", "metric": "groups_alike", "above": 0.9, "for": 20},
    {"name": "far from the reference", "metric": "kl", "above": 0.5, "for": 5},
    {"name": "the engine is not the policy", "metric": "engine_gap_share", "above": 1.0},
    {"name": "throughput fallen", "metric": "tokens_per_second", "falls": 0.5, "for": 50, "over": 200, "after": 100},
    {
        "name": "memory spike",
        "metric": "worker_resident_bytes",
        "rises": 1.5,
        "least": 256.0 * MIB,
        "over": 12,
        "after": 3,
        "quiet": 3,
    },
    {
        "name": "growth of host memory",
        "metric": "worker_resident_bytes",
        "climbs": 1.2,
        "least": 256.0 * MIB,
        "over": 12,
    },
    {
        "name": "growth of GPU memory",
        "metric": "worker_device_bytes",
        "climbs": 1.2,
        "least": 256.0 * MIB,
        "over": 12,
    },
    {"name": "straggler", "metric": "worker_behind", "above": 2.0, "for": 3, "quiet": 3},
)
_BY_NAME = {rule["name"]: rule for rule in _DEFAULTS}


class Receiver(Config):
    """Who is told of alarms, beside the run directory: exactly one of ``webhook`` and ``command``."""

    exactly_one: ClassVar[tuple[tuple[str, ...], ...]] = (("webhook", "command"),)

    webhook: str | None = None
    """An address to which each alarm is posted as JSON. It is kept as a secret."""
    command: Annotated[list[str], Field(min_length=1)] | None = None
    """A program with its arguments, started for each alarm, with the alarm as JSON on its standard input."""
    deadline_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    """How long one alarm may take; then it is given up."""

    @field_validator("webhook")
    @classmethod
    def _is_an_address(cls, webhook: str | None) -> str | None:
        # In the lock stands a digest.
        if webhook is not None and not webhook.startswith(("http://", "https://", "sha256:")):
            raise ValueError("it must begin with https:// or http://")
        return webhook


def rules_for(given: Sequence[AlarmRule] | None, stage: str) -> list[AlarmRule]:
    """The rules that hold in a stage: the defaults, and those given, which replace one before of their name."""
    held = [rule for rule in given or () if rule.stages is None or stage in rule.stages]
    last = {rule.name: rule for rule in held if rule.name}
    defaults = [AlarmRule.model_validate(rule) for rule in _DEFAULTS if rule["name"] not in last]
    return [rule for rule in (*defaults, *held) if rule.off is None and last.get(rule.name or "", rule) is rule]
