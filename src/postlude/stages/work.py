"""Stages that do something else than train: they generate, filter, evaluate, merge.

Their work is cut into portions, which are a pure function of manifest and data. Ranks share the portions, each is
committed when it is done, and a resume does those that are missing; so the artifact is the same however often the
stage was stopped.

A portion is a file of JSON lines that is there whole or not at all, with its digest in its name: one that is damaged is
done anew. Its line of metrics follows from it, so a resume writes those that a kill cut off. Ranks take turns in
rounds: after each the lead tells how far it is.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby, islice
from typing import Any

from rich.console import RenderableType
from rich.pretty import Pretty
from transformers import PreTrainedTokenizerBase

from postlude import storage
from postlude.data.dataset import Dataset
from postlude.data.example import Example, Record
from postlude.data.preview import Preview
from postlude.data.records import record_json
from postlude.errors import DataError
from postlude.rollout.reward import Reward, remarks_on
from postlude.stages.models import Models, TooLarge
from postlude.stages.parts import Parts
from postlude.stages.prompts import Row, no_preview, rows_of, tell_unprinted
from postlude.stages.report import StageReport, Trial
from postlude.telemetry.progress import console
from postlude.telemetry.recorder import Recorder
from postlude.training.interruption import Interruption
from postlude.training.program import Summary

Entry = Mapping[str, Any]
"""Something that a portion of the work gives; JSON can hold it."""

Tell = Callable[..., None]
"""Takes an event, its kind and fields."""

REHEARSED_RECORDS = 4
"""So many records of each data set a preflight works on."""


class Work(ABC):
    """A stage that does something else than train, on one rank. The same on every rank, whatever their number.

    A kind of it says what its portions are, what each gives, and how the artifact is made of all of them; what all
    share is below.
    """

    portions: int = 0
    """How many portions there are; with none, all of the work is done in :meth:`finish`."""
    reads: Mapping[str, str] = {}
    """Fingerprints of the data sets that it reads, by name: a resume with others is refused."""

    def __init__(self, parts: Parts) -> None:
        """UserError for what cannot be worked on."""
        self.parts, self.models = parts, Models(parts)
        self._folder = storage.join(parts.stage.uri, "portions")
        self._done: dict[int, str] = {}
        """The files of the portions, by their numbers."""

    # --- what a kind of work says ---------------------------------------------------------------------------

    def do(self, portion: int, tell: Tell) -> list[Entry]:
        """Do one portion."""
        raise NotImplementedError

    def measure(self, entries: Sequence[Entry]) -> Mapping[str, float]:
        """A portion's line of metrics. ``tokens`` are those that were computed."""
        return {"tokens": 0}

    @abstractmethod
    def finish(self, portions: Iterable[Sequence[Entry]], folder: str) -> Mapping[str, Any]:
        """Write the artifact into a local folder, from what the portions gave, in order. On the leading rank.

        Returns the report on it, which is written beside it as ``report.json``. DataError if nothing came out.
        """

    def parents(self) -> Mapping[str, Any]:
        """For the lineage: the models that the work is done with, by what they are in it."""
        return {}

    def events(self, report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What to tell of the report: kinds of events with their fields."""
        yield from ()

    def table(self, report: Mapping[str, Any]) -> RenderableType:
        """The report for a person."""
        return Pretty(report)

    def counts(self) -> Mapping[str, Any]:
        """What a preflight tells of the data, read whole."""
        return {}

    @property
    def rewards(self) -> Sequence[Reward]:
        """What says how good answers are."""
        return ()

    def remarks(self) -> Sequence[str]:
        """What should be known of the data before the work begins."""
        return ()

    def preview(self, blocks: int, example: str | None = None) -> Preview:
        """The prompts that are put to a model. ManifestError where none are."""
        raise no_preview(self.parts)

    def close(self) -> None:  # noqa: B027  (most kinds have none)
        """Leave no process at work."""

    # --- the story of a stage that does not train -----------------------------------------------------------

    def run(self, recorder: Recorder, stop: Interruption) -> Summary:
        """Do the portions that are missing, and write the artifact, or stop before when asked to."""
        workers = self.parts.workers
        with closing(self):
            if not workers.from_lead(self.parts.stage.has_artifact()):
                if not self._do_all(recorder, stop):
                    return Summary(0, interrupted=True)
                if workers.leads:
                    report = self._write_artifact(self._read(portion) for portion in range(self.portions))
                    for kind, fields in self.events(report):
                        recorder.event(kind, **fields)
                    console().print(self.table(report))
                    recorder.event("stage_finished", steps=self.portions)
            if workers.leads:
                storage.remove(self._folder)
            workers.barrier()
        return Summary(self.portions)

    def _do_all(self, recorder: Recorder, stop: Callable[[], bool]) -> bool:
        """Do what is missing, on every rank; False if asked to stop before the end.

        DataError if the data changed since the stage began.
        """
        workers, count, measured = self.parts.workers, self.portions, 0
        done: dict[int, str] = {}
        if workers.leads:
            self._hold_to_plan(recorder)
            whole = storage.whole_files(self._folder, ".jsonl")
            done = {int(name.partition(".")[0]): uri for name, uri in whole.items()}
            measured = self._hold_to_metrics(recorder, done)
        done = workers.from_lead(done)
        recorder.event("stage_started", from_step=next(n for n in range(count + 1) if n not in done))
        if remarks := remarks_on(self.rewards):
            recorder.event("rewards_work", remarks=remarks)
        for first in range(0, count, workers.world):
            if workers.sum_numbers({"stop": float(stop())})["stop"]:
                return False
            own = first + workers.rank
            begin = time.monotonic()
            if own < count and own not in done:
                done[own] = self._write(own, self.do(own, recorder.event))
            rounds = workers.gather((own, time.monotonic() - begin, done.get(own, "")))
            self._done.update({portion: uri for portion, _, uri in rounds})
            if workers.leads:
                seconds = {portion: spent for portion, spent, _ in rounds}
                for portion in range(max(first, measured), min(first + workers.world, count)):
                    recorder.metrics(self._line(portion, seconds[portion]))
        recorder.flush()
        return True

    def _write_artifact(self, portions: Iterable[Sequence[Entry]]) -> dict[str, Any]:
        """Write the artifact, with its report and lineage. The report."""
        with self.parts.stage.write_artifact() as folder:
            report = dict(self.finish(portions, folder))
            origin = self.parts.lineage(self.portions, models=dict(self.parents()), data=dict(self.reads))
            for name, content in {"report.json": report, "lineage.json": origin}.items():
                storage.write_text(storage.join(folder, name), json.dumps(content, indent=2) + "\n")
        return report

    # --- portions -------------------------------------------------------------------------------------------

    def _line(self, portion: int, seconds: float) -> dict[str, Any]:
        measured = self._measured(portion)
        rate = {"tokens_per_second": measured["tokens"] / seconds} if measured.get("tokens") and seconds else {}
        return {**measured, "seconds": seconds, **rate}

    def _measured(self, portion: int) -> dict[str, Any]:
        """A line of metrics, without what it took."""
        return {"step": portion + 1, "progress": (portion + 1) / self.portions, **self.measure(self._read(portion))}

    def _hold_to_metrics(self, recorder: Recorder, done: Mapping[int, str]) -> int:
        """Keep the lines of metrics that say what the portions do, and are in order; the others are written anew. How
        many are kept."""
        metrics, numbers = self.parts.stage.metrics, iter(range(self.portions))
        self._done.update(done)
        if damage := metrics.drop_damaged():
            recorder.event("alarm", what="metrics written anew", reason=damage)

        def is_so(line: Mapping[str, Any]) -> bool:
            portion = next(numbers, None)
            if portion is None or line["step"] != portion + 1:
                return False
            return portion not in done or line.items() >= self._measured(portion).items()

        return metrics.cut(is_so)

    def _write(self, portion: int, entries: Sequence[Entry]) -> str:
        # Not the exact JSON of metrics: that takes a text such as "NaN" for a number, and a model may well say it.
        lines = "".join(record_json(entry) + "\n" for entry in entries)
        return storage.write_once(storage.join(self._folder, f"{portion:08d}.jsonl"), lines.encode())

    def _read(self, portion: int) -> list[Entry]:
        return [json.loads(line) for line in storage.read_text(self._done[portion]).splitlines()]

    def _hold_to_plan(self, recorder: Recorder) -> None:
        """Write down what the portions are made of, or refuse to mix them with others."""
        uri = storage.join(self._folder, "plan.json")
        plan: dict[str, Any] = {"portions": self.portions, "data": dict(self.reads)}
        try:
            before = storage.read_document(uri)
        except storage.NotFound:
            storage.write_document(uri, plan)
            return
        except storage.CorruptError as error:  # that the stage itself is the same is told by its identity
            recorder.event("alarm", what="plan written anew", reason=str(error))
            storage.write_document(uri, plan)
            return
        if before != plan:
            changed = [name for name, fingerprint in plan["data"].items() if before["data"].get(name) != fingerprint]
            raise DataError(
                f"The data of the stage '{self.parts.task.stage}' changed since it began: {', '.join(changed)}. Put "
                "them back as they were, or give the run another name."
            )

    # --- records --------------------------------------------------------------------------------------------

    def rows(self, datasets: Mapping[str, Dataset]) -> list[Row]:
        """The records of data sets, in order: all, or in a rehearsal the first ones of each."""
        most = REHEARSED_RECORDS if self.parts.mode.small else None
        return [row for name, dataset in datasets.items() for row in islice(rows_of({name: dataset}), most)]

    # --- before it runs -------------------------------------------------------------------------------------

    def preflight(self, report: StageReport, synthetic: int | None) -> None:
        """Its data are read whole, and a few records go all the way.

        Small random models stand in for the stage's. What comes out is written into the preflight's own run, where it
        stands in for the data that the stage will make: so the stages after it are tried on records of the right shape.
        """
        report.remarks += remarks_on(self.rewards)
        with closing(self):
            counts = self.counts()
            tell_unprinted(report, self.parts, counts)
            report.remarks += self.remarks()
        small = type(self)(self.parts.rehearsal())
        if not small.portions:
            report.trial = Trial(counts, None, "its models are not made yet, or it needs the whole of them")
            return
        with closing(small):
            try:
                entries = [small.do(portion, lambda kind, **fields: None) for portion in range(small.portions)]
                report.trial = Trial(counts, small._write_artifact(entries))
            except TooLarge as error:
                report.trial = Trial(counts, None, str(error))

    @property
    def finished_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.parts.base_tokenizer


def read_rows(
    datasets: Mapping[str, Dataset], rows: Sequence[Row]
) -> Iterator[tuple[str, Record, list[tuple[str, Example]]]]:
    """Data set, record and examples of each row; the latter two are empty for a bad record that is skipped."""
    for (name, group), run in groupby(rows, key=lambda row: row[:2]):
        for record, examples in datasets[name].read(group, [position for *_, position in run]):
            yield name, record, examples
