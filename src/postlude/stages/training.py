"""Stages that train a model: from the newest checkpoint to the artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from postlude import storage
from postlude.data import preview as packed
from postlude.data.annotations import StoredStreams
from postlude.data.document import Block
from postlude.data.measure import measure
from postlude.data.synthetic import try_synthetic
from postlude.errors import DataError
from postlude.model.export import send_model, write_model
from postlude.model.flops import packed_flops
from postlude.recipes.recipe import TrainingRecipe
from postlude.runs import settle
from postlude.stages.annotate import annotate, forget_annotations
from postlude.stages.boundaries import remark_on_boundaries
from postlude.stages.memory import check_memory
from postlude.stages.models import lineage_of
from postlude.stages.parts import Parts
from postlude.stages.prompts import encoders_of
from postlude.stages.rehearsal import rehearse
from postlude.stages.report import StageReport
from postlude.stages.training_data import TrainingData
from postlude.stages.training_models import TrainingModels
from postlude.telemetry.recorder import Recorder
from postlude.training.amendments import Amendments
from postlude.training.interruption import Interruption
from postlude.training.meters import Meters
from postlude.training.program import Program, Summary
from postlude.training.trainer import Steps, Trainer


@dataclass(frozen=True)
class Supply:
    """What a trainer is fed with."""

    steps: Steps
    evaluations: Mapping[str, Sequence[Block]] = field(default_factory=dict)
    """Held-out blocks by data set, for the loss."""
    examine: Callable[[], Mapping[str, Mapping[str, float]]] = dict
    """What is measured of the model on held-out data beside the loss, by name."""
    amend: Callable[[Any], None] = lambda config: None
    """Go on as a config says that was amended."""
    between_rounds: Callable[[], bool] = lambda: True
    """Whether the next step begins a round."""


class Training:
    """A stage that trains on data."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config = parts, parts.config_of(TrainingRecipe)
        self.data = TrainingData(parts)
        self.models = TrainingModels(self.data)

    def run(self, recorder: Recorder, stop: Interruption) -> Summary:
        return self.train(recorder, stop, self._supply)

    def _supply(self, stored: Sequence[StoredStreams]) -> Supply:
        loader = self.data.loader(stored)
        return Supply(loader, self.data.evaluations(stored), amend=lambda config: loader.reweigh(config.data))

    # --- the story of a training stage ----------------------------------------------------------------------

    def train(
        self, recorder: Recorder, stop: Interruption, supply: Callable[[Sequence[StoredStreams]], Supply]
    ) -> Summary:
        """Go on from the newest sound checkpoint with what ``supply`` gives, and write the artifact. What frozen models
        say of the data beforehand is handed to ``supply``."""
        workers = self.parts.workers
        checkpoint = workers.from_lead(self._go_back(recorder) if workers.leads else None)
        stored = annotate(self.models, recorder, stop)
        if stored is None:
            return Summary(0, interrupted=True)
        check_memory(self.models)
        trainer = self._trainer(recorder, stop, lambda: supply(stored))
        if checkpoint is not None:
            trainer.restore(checkpoint[1])
        else:
            self.data.check_template()  # one that an earlier version began goes on as it was
        recorder.event("stage_started", from_step=trainer.step)
        summary = trainer.fit()
        if not summary.interrupted:
            self._write_artifact(summary)
            if workers.leads:
                recorder.event("stage_finished", steps=summary.steps)
                forget_annotations(self.parts)
        workers.barrier()
        return summary

    def _go_back(self, recorder: Recorder) -> tuple[int, str] | None:
        """To where training goes on from, as step and URI: what stands in the stage is of that moment then."""
        stage = self.parts.stage
        newest = self._newest_sound(recorder)
        step, account = (newest[0], newest[2]) if newest else (0, {})
        rows, damages = stage.cut_back(step)
        if (known := account.get("examples", rows)) != rows:
            damages.append(f"'{stage.examples}' holds {rows:,} losses by example where {known:,} were written.")
        for damage in damages:
            recorder.event("alarm", what="set aside", reason=damage, step=step)
        recorder.begin_account(rows)
        return newest[:2] if newest else None

    def _newest_sound(self, recorder: Recorder) -> tuple[int, str, Mapping[str, Any]] | None:
        """The newest checkpoint whose files are what was written, and for which the lines are there that it stands for:
        step, URI and account. Damaged ones are told and passed; where lines are lost for all, the newest is taken."""
        stage, newest = self.parts.stage, None
        for checkpoint in stage.checkpoints():
            try:
                account = storage.verify(checkpoint.uri).extra.get("account", {})
            except storage.CorruptError as error:
                recorder.event("checkpoint_skipped", step=checkpoint.step, reason=str(error))
                continue
            restored, lost = settle(stage, checkpoint.step, account)
            for reason in restored:
                recorder.event("alarm", what="lines written again", reason=reason, step=checkpoint.step)
            if not lost:
                return checkpoint.step, checkpoint.uri, account
            for reason in lost:
                recorder.event("checkpoint_skipped", step=checkpoint.step, reason=reason)
            newest = newest or (checkpoint.step, checkpoint.uri, account)
        if newest is not None:
            recorder.event("alarm", what="lines are lost", reason="No checkpoint has them.", step=newest[0])
        return newest

    def _trainer(self, recorder: Recorder, stop: Interruption, supply: Callable[[], Supply]) -> Trainer:
        """The trainer, at step 0."""
        program, workers, stage = self.models.program, self.parts.workers, self.parts.stage
        models = [role.model for role in program.roles.values()]
        headless = [
            role.model for name, role in program.roles.items() if "lm" not in program.objective.heads.get(name, ())
        ]
        fed = supply()

        amendments = Amendments(stage)

        def committed(uri: str, step: int) -> None:
            recorder.event("checkpoint_saved", step=step, uri=uri)
            stage.prune(trainer.config.checkpoint.keep)
            amendments.checkpointed(step)

        def amend(config: TrainingRecipe) -> Program:
            fed.amend(config)
            return self.models.amended(config)

        trainer = Trainer(
            self.config,
            program,
            fed.steps,
            workers,
            seed=self.parts.manifest.seed,
            precision=self.models.precision,
            journal=recorder,
            meters=Meters(packed_flops(models, headless), workers, self.models.precision, self.parts.task.threads),
            evaluations=fed.evaluations,
            examine=fed.examine,
            checkpoint_uri=stage.checkpoint_uri,
            on_commit=committed,
            amendments=amendments,
            amend=amend,
            between_rounds=fed.between_rounds,
            stop=stop,
        )
        return trainer

    def _write_artifact(self, summary: Summary) -> None:
        """By the leading rank; the others send it their parts of a model that they hold together."""
        model = self.models.program.roles["policy"].model
        if not self.parts.workers.leads:
            send_model(model)
            return
        with self.parts.stage.write_artifact() as folder:
            write_model(model, self.finished_tokenizer, folder, self._lineage(summary), stop_ids=self.data.stop_ids)

    def _lineage(self, summary: Summary) -> dict[str, Any]:
        precision = self.models.precision
        return self.parts.lineage(
            summary.steps,
            model=lineage_of(self.config.model),
            data={name: dataset.fingerprint for name, dataset in self.data.datasets.items()},
            stop_ids=self.data.stop_ids,
            amendments=[assignment for _, assignment in self.parts.stage.applied_amendments()],
            precision={"name": precision.name, "reason": precision.reason},
        )

    @property
    def finished_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.data.finished_tokenizer

    # --- before it runs -------------------------------------------------------------------------------------

    def preview(self, blocks: int, example: str | None = None) -> packed.Preview:
        with self.data.loader() as loader:
            # One that it never comes to would be looked for without end where nothing else ends the epochs.
            return packed.preview(islice(loader, self.config.steps), self.data.tokenizer, blocks, example)

    def preflight(self, report: StageReport, synthetic: int | None) -> None:
        """Its data are read, rendered, masked and packed; its memory is planned; and one real optimiser step is made on
        this machine's CPU, with a model of the same architecture made small."""
        manifest, sources = self.parts.manifest, self.data.sources
        self.data.check_template()
        for name, source in sources.items() if synthetic else ():
            report.synthetic[name] = try_synthetic(
                source.dataset.format, source.encoder.encode, synthetic or 0, manifest.seed
            )
        try:
            report.statistics = measure(
                sources,
                self.config.data,
                seed=manifest.seed,
                block=self.config.batch.block,
                window=self.config.batch.window,
                rows={name: dataset.rows for name, dataset in self.data.datasets.items()},
            )
        except DataError as error:
            if not set(self.config.data) <= set(report.awaited):
                raise
            # A few records of small random models may be such that nothing in them can be trained on.
            report.remarks.append(f"not tried further, since the records of a trial are of no use: {error}")
            return
        report.held_out = {
            name: sum(len(unit.documents) for block in blocks for unit in block)
            for name, blocks in self.data.evaluations().items()
        }
        for name, source in [*sources.items(), *self.data.held_out_sources.items()]:
            left_out = {kind: dropped.count for kind, dropped in source.statistics.unprinted.items()}
            report.leave_out(name, left_out, manifest.data[name].drop_unprinted)
        small = Training(self.parts.rehearsal())
        report.rehearsal = rehearse(self.models, small.models, small.data.loader)
        report.remarks += [remark for source in self.data.conversations.values() for remark in source.encoder.remarks]
        encoders = encoders_of(self.parts, self.data.tokenizer, sources)
        for name, source in sources.items():
            report.remarks += remark_on_boundaries(source, encoders[name], manifest.data[name].tokenize == "apart")
        if report.awaited:
            report.remarks.append("what is counted of data that are not there yet is a trial of a few records")
