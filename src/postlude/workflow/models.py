"""``postlude generate``, ``export`` and ``verify``: what can be done with any artifact or model directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from postlude import storage
from postlude.manifest.errors import UserError
from postlude.manifest.schema import ModelFrom
from postlude.runs import artifact_of

if TYPE_CHECKING:
    from postlude.model.verify import Verification


def place_of(model: str) -> str:
    """The directory or hub name that MODEL means: a path, a hub name, or RUN/STAGE."""
    return artifact_of(model) or model


def generate(
    model: str, prompt: str | Sequence[dict[str, str]], max_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Pieces of the reply to a prompt, or to the messages of a conversation, as they are made."""
    from postlude.model.generate import generate as stream

    yield from stream(place_of(model), prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)


def export(place: str, out: str, merge: bool = False) -> None:
    """Copy the artifact of RUN or RUN/STAGE to ``out``: a Hugging Face directory with its lineage.

    ``merge`` is for artifacts that are adapters; a whole model has nothing to merge. UserError if ``out`` is there.
    """
    artifact = artifact_of(place)
    if artifact is None:
        raise UserError(f"'{place}' is not a run or a stage of one. Give RUN or RUN/STAGE.")
    if merge:
        raise UserError(f"The model of '{place}' is whole: there is no adapter to merge. Leave --merge out.")
    if storage.exists(out):
        raise UserError(f"'{out}' is there already and is not overwritten. Remove it or give another place.")
    for name in storage.list_directory(artifact):
        if name != storage.MARKER:
            copied = storage.open_file(storage.join(artifact, name), "rb")
            with copied as source, storage.open_file(storage.join(out, name), "wb") as target:
                shutil.copyfileobj(source, target)


def verify(model: str) -> Verification:
    """Packed logits of a model against the plain forward pass of each document."""
    from postlude.model.load import load_model
    from postlude.model.verify import verify as compare

    return compare(load_model(ModelFrom(path=model), place_of(model), None, seed=0))
