"""``postlude generate``, ``export`` and ``verify``: what can be done with any artifact or model directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from postlude import storage
from postlude.errors import UserError
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom
from postlude.runs import LINEAGE, artifact_of
from postlude.telemetry import openmp
from postlude.workflow.begin import ADAPTER_CONFIG, base_of, verify_model

if TYPE_CHECKING:
    from postlude.model.verify import Verification


def generate(
    model: str, prompt: str | Sequence[dict[str, str]], max_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Pieces of the reply of a model (a path, a hub name, or RUN/STAGE) to a prompt, or to the messages of a
    conversation, as they are made."""
    from postlude.rollout.talk import talk

    verify_model(model)
    openmp.give_way()
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
            _say_whence(artifact, folder)
        return
    if adapter:
        _check_base_is_whole(artifact)
    for name in storage.list_directory(artifact):
        if name != storage.MARKER:
            storage.copy_file(storage.join(artifact, name), storage.join(out, name))
    _say_whence(artifact, out)


def _say_whence(artifact: str, out: str) -> None:
    """Note in the lineage of an exported folder which artifact it was made of, for :func:`verify`."""
    from postlude.model.adapters.stored import digest_of
    from postlude.model.places import EXPORTED_FROM, absolute

    lineage = storage.join(out, LINEAGE)
    whence = {EXPORTED_FROM: {"place": absolute(artifact), "sha256": digest_of(artifact)}}
    content = json.loads(storage.read_text(lineage)) | whence
    storage.write_text(lineage, json.dumps(content, indent=2) + "\n")


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
    """Packed logits of a model against the plain forward pass of each document; and what it holds against the source
    that it claims. Of an artifact that cannot be loaded that is told together with the rest."""
    from postlude.model.load import load_model
    from postlude.model.verify import Verification
    from postlude.model.verify import verify as compare
    from postlude.model.verify_source import compare_with_source

    openmp.give_way()
    place = artifact_of(model) or model
    if base := base_of(place):
        verify_model(base)
    source = compare_with_source(place)
    try:
        report = compare(load_model(ModelFrom(path=model), place, None, seed=0))
    except ManifestError as error:
        if not source.has_lineage:
            raise
        source.faults["unreadable"] = [str(error)]
        return Verification("", "", "", 0.0, (), source)
    return replace(report, source=source)
