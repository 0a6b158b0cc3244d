"""``postlude generate``, ``export`` and ``verify``: what can be done with any artifact or model directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from postlude import storage
from postlude.errors import UserError
from postlude.manifest.schema import ModelFrom
from postlude.runs import LINEAGE, artifact_of, find
from postlude.workflow.begin import ADAPTER_CONFIG, verify_model

if TYPE_CHECKING:
    from postlude.model.verify import Verification


def generate(
    model: str, prompt: str | Sequence[dict[str, str]], max_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Pieces of the reply of a model (a path, a hub name, or RUN/STAGE) to a prompt, or to the messages of a
    conversation, as they are made."""
    from postlude.rollout.talk import talk

    verify_model(model)
    yield from talk(artifact_of(model) or model, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)


def export(place: str, out: str, merge: bool = False) -> None:
    """Copy the artifact of RUN or RUN/STAGE to ``out``: a Hugging Face directory with its lineage.

    An adapter is a directory as PEFT has it; ``merge`` makes a whole model of it and its base. UserError if ``out`` is
    there, if there is nothing to merge, or if PEFT could not load the adapter.
    """
    artifact = artifact_of(place)
    if artifact is None:
        raise UserError(f"'{place}' is not a run or a stage of one. Give RUN or RUN/STAGE.")
    verify_model(artifact)
    adapter = storage.exists(storage.join(artifact, ADAPTER_CONFIG))
    if merge and not adapter:
        raise UserError(f"The model of '{place}' is whole: there is no adapter to merge. Leave --merge out.")
    if storage.exists(out):
        raise UserError(f"'{out}' is there already and is not overwritten. Remove it or give another place.")
    if merge:
        from postlude.model.export import write_merged

        with storage.new_folder(out) as folder:
            write_merged(artifact, Path(storage.local_path(folder)))
        return
    if adapter:
        _check_base_is_whole(artifact)
    for name in storage.list_directory(artifact):
        if name != storage.MARKER:
            storage.copy_file(storage.join(artifact, name), storage.join(out, name))


def _check_base_is_whole(artifact: str) -> None:
    """UserError if an adapter belongs to another adapter: PEFT could not put both together."""
    with storage.open_file(storage.join(artifact, ADAPTER_CONFIG), "rb") as stream:
        base = json.load(stream)["base_model_name_or_path"]
    if storage.exists(storage.join(base, ADAPTER_CONFIG)):
        raise UserError(
            f"The adapter of '{artifact}' belongs to a model that is itself an adapter on another, at '{base}', which "
            "PEFT does not load. Export it with --merge."
        )


def verify(model: str) -> Verification:
    """Packed logits of a model against the plain forward pass of each document; and the artifact of a stage against
    the checkpoint of its last step, where that is there and local."""
    from postlude.model.load import load_model
    from postlude.model.verify import verify as compare

    verify_model(model)
    place = artifact_of(model) or model
    report = compare(load_model(ModelFrom(path=model), place, None, seed=0))
    checkpoint = _last_checkpoint(place)
    if checkpoint is None:
        return report
    from postlude.model.verify_source import differences_from_checkpoint

    return replace(report, not_as_trained=tuple(differences_from_checkpoint(place, checkpoint)))


def _last_checkpoint(artifact: str) -> str | None:
    """That of the step with which the stage of an artifact ended."""
    stage = storage.parent(artifact.rstrip("/"))
    if not storage.is_local(artifact) or not storage.exists(artifact) or artifact_of(stage) is None:
        return None
    steps = json.loads(storage.read_committed(artifact, LINEAGE)).get("steps")
    return next((checkpoint.uri for checkpoint in find(stage).checkpoints() if checkpoint.step == steps), None)
