"""The schemas of the lines in a run directory; docs/run_directory.md shows them as tables. How versions work says
:mod:`postlude.storage.schema`. What events say besides stands in :mod:`postlude.telemetry.events`, what the ledger of
prompts keeps in a checkpoint in :mod:`postlude.rollout.ledger`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict

from postlude.storage import Line

Number = int | float


class EventLine(Line):
    """``events.jsonl``: what happened in the run. Each kind has fields of its own."""

    time: str
    """ISO 8601, UTC."""
    kind: str
    stage: str | None = None
    """The stage it belongs to; None for the run as a whole."""


class MetricsLine(Line):
    """``metrics.jsonl``: one optimiser step of the stage, or one portion of its work. Any other key is a metric, too: a
    number, or null where it was not measured."""

    __pydantic_extra__: dict[str, Number | bool | str | None]

    step: int
    """Optimiser steps made, or portions done, with this one: counted from 1."""
    epoch: int | None = None
    """Passes over the data before this step's."""
    progress: float | None = None
    """The share of the stage that is done with it, 0 to 1."""
    loss: Annotated[float | None, "nats a token"] = None
    """The objective's, before the update; of another unit where the objective says so."""
    lr: float | None = None
    """The learning rate of this update, of matrices where roles have their own."""
    grad_norm: float | None = None
    """Of the policy's gradient before clipping; ``grad_norm_NAME`` is that of another model."""
    update_ratio: float | None = None
    """The norm of the optimiser's update over that of the policy's weights, in a sample of a million of them;
    ``update_ratio_NAME`` is that of another model. Null where a step was left out."""
    tokens: Annotated[Number | None, "tokens"] = None
    """Of all ranks, that were computed."""
    trained_tokens: Annotated[Number | None, "tokens"] = None
    """Those that bear on the loss."""
    documents: int | None = None
    skipped: bool | None = None
    """Whether the update was left out, because the loss or a gradient was not finite."""
    loss_scale: float | None = None
    """By which losses are multiplied, where half precision needs it."""
    tokens_per_second: Annotated[float | None, "tokens/s"] = None
    mfu: float | None = None
    """Model FLOPs utilisation, a share of the peak of all workers."""
    memory_bytes: Annotated[int | None, "bytes"] = None
    """The most in use by the leading rank since its start: of its GPU, else of the machine."""
    seconds: Annotated[float | None, "s"] = None
    """The whole step, its evaluation and checkpoint too; ``seconds_PHASE`` is what a phase of it took."""


class RolloutLine(Line):
    """``rollouts/part-*.jsonl``: what became of a sample, or of a prompt that was never answered. With the step that
    trains on it, or at which it was dropped: so it is the ledger of prompts, line by line."""

    model_config = ConfigDict(extra="forbid")

    step: int
    """The optimiser step before which it was told."""
    issue: int | None = None
    """The number of the draw that gave the prompt: what the ledger knows it by."""
    epoch: int | None = None
    prompt_id: str | None = None
    """``DATASET:DIGEST``, as in the losses by example."""
    sample: int | None = None
    """Which of the prompt's samples it is."""
    prompt: Any = None
    """What was asked: messages, or a text."""
    completion: str | None = None
    """What the last turn says."""
    ended: str | None = None
    """Why the answer ended: stop, length, or cut where it was not complete."""
    tokens: Annotated[int | None, "tokens"] = None
    """That were sampled."""
    versions: Sequence[int] | None = None
    """Of the weights that sampled it: the oldest and the newest; -1 where nothing was sampled."""
    turns: Sequence[str] | None = None
    """What was sampled in each turn, where an environment answered."""
    replies: Sequence[Any] | None = None
    """What an environment said after each turn but the last."""
    reward: float | None = None
    """The weighted sum."""
    rewards: Mapping[str, float | None] | None = None
    """Its parts, by reward."""
    unscored: str | None = None
    """Why it has no reward."""
    advantage: float | None = None
    """The mean over its trained tokens."""
    outcome: str | None = None
    """``trained`` or ``dropped``; it lacks of a sample left out of a prompt of which others are trained."""
    reason: str | None = None
    """Why it was dropped."""
    token_texts: Sequence[str] | None = None
    """Of each token, the prompt's too, what it adds to the text. This and what follows of some samples only."""
    token_runs: Sequence[int] | None = None
    """How many tokens were given, then sampled, then given, and so on."""
    token_versions: Sequence[int] | None = None
    """Of the sampled tokens a version of the weights and how many were sampled with it, one pair after another."""
    engine_logp: Annotated[str | None, "nats"] = None
    """Of each sampled token, as the engine says. It and those below are float32, little-endian, in Base64."""
    trainer_logp: Annotated[str | None, "nats"] = None
    """As the policy says that is trained."""
    entropy: Annotated[str | None, "nats"] = None
    """Of the distribution that each was sampled from, as the policy says."""


class ReadingLine(Line):
    """``readings.jsonl``: one worker at one moment. A resume repeats steps here: the time orders the lines."""

    model_config = ConfigDict(extra="forbid")

    time: str
    """ISO 8601, UTC."""
    rank: int
    host: str
    round_trip_seconds: Annotated[float, "s"]
    """How long the controller waited for the answer."""
    step: int
    """The worker's last."""
    resident_bytes: Annotated[int, "bytes"]
    """Memory of the machine that the process holds."""
    device_bytes: Annotated[int | None, "bytes"] = None
    """Memory of its GPU in use."""
    seconds: Annotated[Mapping[str, float], "s"] = {}
    """Means over its last steps, by phase, ``seconds`` being the whole step."""
    link: Annotated[Mapping[str, float], "s, bytes/s"] = {}
    """Measured when the ranks met: ``rank_round_trip_seconds``, ``collective_bytes_per_second``,
    ``host_to_device_bytes_per_second``, ``device_to_host_bytes_per_second``."""
    engines: Annotated[Mapping[str, Mapping[str, float]], "s"] = {}
    """What the engines that it asks have answered since it started, by name: ``requests``, ``tokens``, the ``seconds``
    that took, and the ``version`` of their weights, in steps."""


class AmendmentLine(Line):
    """``amendments.jsonl``: a request (``id``, ``assignment``), or that it holds (``applied``, ``from_step``); a
    request for a checkpoint (``checkpoint``), or that there is one (``checkpointed``, ``step``)."""

    version = 2

    id: int | None = None
    """The number of the request: how many there were when it was made. Of two with one number the first holds."""
    assignment: str | None = None
    """``KEY=VALUE``."""
    time: str | None = None
    """When it was asked for, ISO 8601, UTC."""
    by: str | None = None
    """Who asked for it."""
    undoes: int | None = None
    """The number of the request that it takes back."""
    applied: int | None = None
    """The number of a request that holds."""
    from_step: int | None = None
    """The first step with it."""
    checkpoint: int | None = None
    """The number of a request for a checkpoint."""
    checkpointed: int | None = None
    """The number of one that is answered."""
    step: int | None = None
    """The step of the checkpoint that answers it."""


class ExampleRow(Line):
    """``examples/part-*.parquet``: one document in one step."""

    step: int
    epoch: int
    example_id: str
    source: str
    """The name of the data set."""
    loss: Annotated[float, "nats"]
    """Summed over its tokens; of another unit where the objective says so."""
    tokens: Annotated[int, "tokens"]
    """That the loss runs over."""
