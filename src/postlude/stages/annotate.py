"""The pass before the first step: a frozen model is run over a stage's data once, and what it says is stored.

Notable:

- The data are cut into parts of :data:`ROWS` records. What a part holds is a pure function of data and model, whichever
  rank computes it and however often the pass was stopped: a run that was killed in it goes on where it was, and trains
  on the same bits.
- Ranks share the parts in turn, in rounds, after each of which they may be asked to stop.
- The parts stand under a fingerprint of all that they follow from; what has another is removed.
"""

from __future__ import annotations

import gc
import glob
from collections.abc import Callable
from typing import Any

import torch

from postlude import __version__, storage
from postlude.data.annotations import AnnotationFiles, StoredStreams, document_key, with_values
from postlude.data.document import Block, Unit
from postlude.data.records import digest, record_json
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelPlace
from postlude.model.load import configuration
from postlude.stages.parts import Parts
from postlude.stages.training_models import TrainingModels
from postlude.telemetry.progress import waiting
from postlude.telemetry.recorder import Recorder
from postlude.training.frozen import FrozenModel
from postlude.training.program import Annotation

ROWS = 256
"""Records in a part."""


def annotate(models: TrainingModels, recorder: Recorder, stop: Callable[[], bool]) -> list[StoredStreams] | None:
    """Have every frozen model that the recipe names say what it has to say of the data, for the loaders to add that to
    the documents. None if asked to stop before the end. UserError before any work for a model that does not fit.
    """
    annotations = models.config.annotations()
    if not annotations:
        return []
    check_annotations(models)
    passes = [_Pass(models, name, annotation) for name, annotation in annotations.items()]
    if models.parts.workers.leads:
        kept = {storage.name(work.parts.uri) for work in passes}
        for name in storage.list_directory(models.parts.stage.annotations):
            if name not in kept:
                storage.discard(storage.join(models.parts.stage.annotations, name))
    models.parts.workers.barrier()
    if not all(work.run(recorder, stop) for work in passes):
        return None
    return [work.open() for work in passes]


def forget_annotations(parts: Parts) -> None:
    """Remove what was stored, once the artifact stands. On the leading rank."""
    parts.stage.drop_annotations()
    storage.remove(_fetched(parts))


def check_annotations(models: TrainingModels) -> None:
    """ManifestError for a frozen model whose tokens are others, or too few for what is asked of it."""
    for name, annotation in models.config.annotations().items():
        policy = models.vocabulary(models.config.model)
        models.check_same_tokens(name, annotation.start)
        try:
            annotation.annotator.vocabulary(models.vocabulary(annotation.start), policy)
        except ValueError as error:
            raise ManifestError(f"stages.{models.parts.task.stage}.{name}: {error}.") from error


def annotated(models: TrainingModels, block: Block) -> Block:
    """A block with all streams, computed at once and not stored."""
    for annotation in models.config.annotations().values():
        documents = [document for unit in block for document in unit.documents]
        values = iter(_frozen(models, annotation).values(documents))
        block = tuple(Unit(tuple(with_values(document, next(values)) for document in unit.documents)) for unit in block)
    return block


def _frozen(models: TrainingModels, annotation: Annotation) -> FrozenModel:
    """The model of an annotation, on this rank's device, in the precision of the stage."""
    model, batch = models.model(annotation.start), models.config.batch
    return FrozenModel(
        model.requires_grad_(False).eval(),
        annotation.annotator,
        policy_vocabulary=models.program.roles["policy"].model.vocabulary,
        device=models.parts.workers.device,
        precision=models.precision,
        block=batch.block,
        micro=batch.micro or batch.block,
        pads=models.config.compile,
    )


class _Pass:
    """One frozen model's pass over all the data of the stage, those that are held out included."""

    def __init__(self, models: TrainingModels, name: str, annotation: Annotation) -> None:
        self._models, self._name, self._annotation = models, name, annotation
        self._sources = [models.data.encoded(dataset) for dataset in models.data.all_datasets]
        self._spans = [
            (source, group, range(start, min(start + ROWS, rows)))
            for source in self._sources
            for group, rows in enumerate(source.groups)
            for start in range(0, rows, ROWS)
        ]
        folder = storage.join(models.parts.stage.annotations, f"{name}-{self._fingerprint()}")
        self.parts = AnnotationFiles(folder, annotation.annotator.streams)

    def run(self, recorder: Recorder, stop: Callable[[], bool]) -> bool:
        """Compute the parts that are missing, on every rank. False if asked to stop before the end."""
        workers = self._models.parts.workers
        done = workers.from_lead(self._stands(recorder) if workers.leads else None)
        if done is None:
            return True
        missing = [number for number in range(len(self._spans)) if number not in done]
        digests = self.parts.digests(number for number in done if number % workers.world == workers.rank)
        model = _frozen(self._models, self._annotation) if missing else None
        for first in range(0, len(missing), workers.world):
            recorder.preparing(f"the {self._name} reads the data", 1 - (len(missing) - first) / len(self._spans))
            if workers.sum_numbers({"stop": float(stop())})["stop"]:
                return False
            for number in missing[first : first + workers.world][workers.rank :][:1]:
                assert model is not None
                self._compute(number, model)
                digests |= self.parts.digests([number])
        del model
        gc.collect()
        if workers.device.type == "cuda":
            torch.cuda.empty_cache()
        gathered = workers.gather(digests)
        if workers.leads:
            self.parts.commit({name: found for part in gathered for name, found in part.items()})
            recorder.event("streams_stored", name=self._name, parts=len(self._spans), computed=len(missing))
        workers.barrier()
        return True

    def open(self) -> StoredStreams:
        """What was stored, where it can be mapped into memory; remote parts are fetched once, by the leading rank."""
        workers = self._models.parts.workers
        into = storage.join(_fetched(self._models.parts), storage.name(self.parts.uri))
        if workers.leads:
            with waiting("stored streams to be fetched"):
                storage.fetch(self.parts.uri, into)
        workers.barrier()
        return StoredStreams(storage.fetch(self.parts.uri, into), self.parts.streams, self._name)

    def _stands(self, recorder: Recorder) -> set[int] | None:
        """The parts that stand; None if the pass is finished. What is damaged is told, and computed anew."""
        if storage.is_committed(self.parts.uri):
            try:
                with waiting("stored streams to be verified"):
                    storage.verify(self.parts.uri)
                return None
            except storage.CorruptError as error:
                recorder.event("alarm", what=f"what the {self._name} said is computed anew", reason=str(error))
                storage.discard(self.parts.uri)
        return self.parts.done()

    def _compute(self, number: int, model: FrozenModel) -> None:
        source, group, positions = self._spans[number]
        documents = {
            document_key(document): document
            for units in source.units(group, positions)
            for unit in units
            for document in unit.documents
            if document.trained.any()
        }
        self.parts.write(number, list(documents.values()), model.values(list(documents.values())))

    def _fingerprint(self) -> str:
        """What the values follow from."""
        models, batch = self._models, self._models.config.batch
        place = models.parts.place_of(self._annotation.start)
        tokenizer = models.data.tokenizer
        follows_from: dict[str, Any] = {
            "model": _files_of(place) if place else record_json(self._annotation.start.model_dump(mode="json")),
            "seed": models.parts.manifest.seed,
            "annotator": repr(self._annotation.annotator),
            "policy": models.vocabulary(models.config.model),
            "data": [[source.dataset.fingerprint, source.encoder.given_template] for source in self._sources],
            "recipe": [models.config.recipe, models.config.version],
            "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map],
            "begun": str(models.parts.today),
            "batch": [batch.block, batch.micro, models.config.compile],
            "precision": models.precision.name,
            "postlude": __version__,
        }
        return digest(record_json(follows_from, canonical=True))[:16]


def _files_of(place: str) -> list[list[str]]:
    """A model's files, each with a text that changes with it. A hub name stands for itself."""
    if storage.is_committed(place):
        files = storage.read_marker(place).files
        return [[name, files[name].sha256] for name in sorted(files) if name != "lineage.json"]
    if not storage.is_directory(place):
        return [[place, str(getattr(configuration(ModelPlace(path=place), place, None), "_commit_hash", None))]]
    found = storage.expand(storage.join(glob.escape(place), "**"))
    return [[storage.name(uri), storage.modified_fingerprint(uri)] for uri in found if not storage.is_directory(uri)]


def _fetched(parts: Parts) -> str:
    """Where this machine keeps what it fetched of a remote run."""
    return storage.join(parts.run.cache, "annotations", parts.task.stage)
