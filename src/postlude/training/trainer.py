"""The trainer: runs a program over packed steps until they end, and can be stopped at any moment.

It never knows which recipe it runs. What makes a resume exact: the loader's state is that of the last step
handed out, randomness is keyed by (seed, step, rank) and has no history, normalisers are counted before the
forward pass, and what was measured reaches the disk before the checkpoint that stands for it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from postlude import storage
from postlude.data.batch import PackedBatch, collate
from postlude.data.document import Block
from postlude.data.loader import StepBlocks
from postlude.errors import UserError
from postlude.manifest.amend import amended, change_of
from postlude.manifest.schema import TrainingStage
from postlude.training import checkpoint
from postlude.training.amendments import Amendments
from postlude.training.meters import Meters, Phases
from postlude.training.optimizers import Optimizer
from postlude.training.precision import LossScale, Precision
from postlude.training.program import Program, Summary
from postlude.training.schedules import Schedule
from postlude.training.step import Executor, StepResult
from postlude.training.update import Sample
from postlude.training.workers import Workers


class Diverged(UserError):
    """Several steps in a row had no finite gradient."""


class Journal(Protocol):
    """Where a stage's numbers go. The leading rank's reaches the run directory and the sinks."""

    def metrics(self, line: Mapping[str, Any]) -> None:
        """One line for each optimiser step."""

    def examples(self, step: int, epoch: int, rows: Sequence[tuple[str, str, float, int]]) -> None:
        """This rank's losses by example."""

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened."""

    def flush(self) -> None:
        """Return when all of the above is on the disk."""

    @property
    def examples_told(self) -> int:
        """How many losses by example this rank has told."""

    def account(self, examples: int) -> dict[str, Any]:
        """What a checkpoint of this moment stands for; so many losses by example were told on all ranks."""


class Steps(Protocol):
    """What is trained on: an iterator over steps that can be stopped and continued."""

    def __iter__(self) -> Iterator[StepBlocks]: ...

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as JSON: the same on every rank."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with the step that comes after a state."""

    def close(self) -> None:
        """Leave nothing at work."""


class Trainer:
    """One stage's training on one rank.

    ``evaluations`` maps a name to this rank's held-out blocks, the same number on every rank; ``examine`` measures
    otherwise, and returns numbers by name of what is held out. ``stop`` is asked
    between steps whether to checkpoint and leave, and told whether the last step has a checkpoint already.
    ``checkpoint_uri`` gives the place of the checkpoint of a step. ``amend`` has what it is fed with go on as a config
    says that was amended, and gives the program of it; ``between_rounds`` says whether the next step begins a round.
    """

    def __init__(
        self,
        config: TrainingStage,
        program: Program,
        loader: Steps,
        workers: Workers,
        *,
        seed: int,
        precision: Precision,
        journal: Journal,
        meters: Meters,
        evaluations: Mapping[str, Sequence[Block]] | None = None,
        examine: Callable[[], Mapping[str, Mapping[str, float]]] = dict,
        checkpoint_uri: Callable[[int], str] | None = None,
        on_commit: Callable[[str, int], None] = lambda uri, step: None,
        amendments: Amendments | None = None,
        amend: Callable[[Any], Program] | None = None,
        between_rounds: Callable[[], bool] = lambda: True,
        stop: Callable[[bool], bool] = lambda at_checkpoint: False,
    ) -> None:
        self._begun, self._assignments, self._amended, self._between_rounds = config, list[str](), amend, between_rounds
        self.config, self.program, self.loader, self.workers = config, program, loader, workers
        self.seed, self.precision, self.journal, self.meters = seed, precision, journal, meters
        self.evaluations, self.examine = evaluations or {}, examine
        self.checkpoint_uri, self.amendments, self.stop = checkpoint_uri, amendments, stop
        self.optimizers = {
            name: role.optimizer.build([(n, p) for n, p in role.model.named_parameters() if p.requires_grad])
            for name, role in program.roles.items()
            if role.optimizer is not None
        }
        self.scale = LossScale(precision)
        self.phases = Phases(synchronize=workers.device.type == "cuda")
        self.executor = Executor(program, workers, precision, self.phases, meters.flops)
        self.checkpointer = checkpoint.Checkpointer(workers, on_commit)
        self.summary = Summary(0)
        self.step = 0
        self._saved_step = -1
        self.progress = 0.0
        self.skipped_in_a_row = 0
        self.totals = {"tokens": 0.0, "trained_tokens": 0.0, "skipped_steps": 0.0}

    # --- the loop -------------------------------------------------------------------------------------------

    def fit(self) -> Summary:
        """Train to the end of the loader, or until ``stop`` says so; the last state is then checkpointed."""
        self.summary = summary = Summary(self.step)
        if self.step == 0:
            self._evaluate()
        steps = iter(self.loader)
        try:
            while True:
                if self._control():
                    summary.interrupted = True
                    break
                with self.phases.measure("data_wait"):
                    work = next(steps, None)
                if work is None:
                    break
                self.train(work)
                if self._due(self.config.checkpoint.every) and not self.skipped_in_a_row:
                    self.save(background=True)
            if self.config.evaluate and not summary.interrupted and not self._due(self.config.evaluate.every):
                self._evaluate()
            self.save(background=False)
        finally:
            self.checkpointer.close()
            self.loader.close()
        summary.steps = self.step
        return summary

    def _control(self) -> bool:
        """Between two steps: checkpoint where that is asked for, and apply amendments that are due; say whether any
        rank was asked to stop."""
        amendments = self.amendments if self.workers.leads else None
        due = amendments.due(self.step + 1, self._waits) if amendments else []
        may_save = self.step > 0 and not self.skipped_in_a_row
        saves = amendments is not None and may_save and amendments.wants_checkpoint(self.step)
        answers = self.workers.gather((self.stop(self.step == self._saved_step), due, saves))
        _, due, saves = answers[0]
        if saves:  # before the amendments, which a resume from there applies itself
            was_saved = self.step == self._saved_step
            self.save(background=True)
            if amendments and was_saved and self.step == self._saved_step:
                amendments.checkpointed(self.step)
        self._amend(due)
        for assignment in due:
            self.journal.event("amendment_applied", assignment=assignment, step=self.step + 1)
        return any(stop for stop, *_ in answers)

    def _waits(self, assignment: str) -> bool:
        """Whether an amendment holds from a round on, and the next step begins none."""
        return not self._between_rounds() and change_of(self.config, assignment).holds == "round"

    def _amend(self, assignments: Sequence[str]) -> None:
        """Go on with a changed config, and all that follows from it."""
        if not assignments:
            return
        self._assignments += assignments
        self.config = amended(self._begun, self._assignments)
        if self._amended is not None:
            self.program = self._amended(self.config)
            self.executor = Executor(self.program, self.workers, self.precision, self.phases, self.meters.flops)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    # --- one step -------------------------------------------------------------------------------------------

    def train(self, work: StepBlocks) -> None:
        """One optimiser step, and its line of metrics. Diverged if too many in a row had to be skipped."""
        begin = time.perf_counter()
        torch.manual_seed(_key(self.seed, self.step, self.workers.data_rank))
        batches = self.micro_batches(work.blocks)
        result = self.executor.forward_backward(batches, self.scale)
        with self.phases.measure("optimizer"):
            rate = self._update(result)
        if not result.finite:
            self._skip(result)
        self.scale.update(result.finite)
        self.step, self.progress = self.step + 1, work.progress
        for name in ("tokens", "trained_tokens"):
            self.totals[name] += result.counts[name]
        self.journal.examples(self.step, work.epoch, result.examples if self.workers.speaks else [])
        line: dict[str, Any] = {
            "step": self.step,
            "epoch": work.epoch,
            "progress": work.progress,
            "loss": result.loss,
            **result.metrics,
            **work.metrics,
            "lr": rate,
            "grad_norm": result.grad_norms.get("policy"),
            **{f"grad_norm_{name}": norm for name, norm in result.grad_norms.items() if name != "policy"},
            "update_ratio": result.update_ratios.get("policy"),
            **{f"update_ratio_{name}": share for name, share in result.update_ratios.items() if name != "policy"},
            "tokens": int(result.counts["tokens"]),
            "trained_tokens": int(result.counts["trained_tokens"]),
            "documents": int(result.counts["documents"]),
            "skipped": not result.finite,
            **({"loss_scale": self.scale.scale} if self.scale.active else {}),
        }
        if self.config.evaluate and self._due(self.config.evaluate.every):
            line |= self._evaluate()
        line |= self.meters.read(result.counts, self.phases.take(), time.perf_counter() - begin)
        self.journal.metrics(line)
        self.summary.first_loss = result.loss if self.summary.first_loss is None else self.summary.first_loss
        self.summary.last_loss = result.loss
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise Diverged(self._diverged(batches))

    def micro_batches(self, blocks: Sequence[Block]) -> list[PackedBatch]:
        """This rank's blocks as batches of at most ``batch.micro`` tokens each."""
        batch = self.config.batch
        together = (batch.micro or batch.block) // batch.block
        pad_to = together * batch.block if self.config.compile else None
        parts = [blocks[start : start + together] for start in range(0, len(blocks), together)]
        return [collate(part, self.program.objective.streams, pad_to) for part in parts]

    def _update(self, result: StepResult) -> float:
        """Clip and step every optimiser, unless a gradient is not finite. Returns the policy's learning rate."""
        factor = Schedule.of(self.config.schedule).factor(self.step, self.progress)
        policy = Optimizer.of(self.config.optimizer)
        for name, optimizers in self.optimizers.items():
            component = policy if name == "policy" else Optimizer.of(self.program.roles[name].optimizer)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group.update(component.group_keys(group["role"], factor))
        if result.finite:
            self.executor.clip(result.grad_norms, self.config.max_grad_norm)
            samples = {name: Sample(each, self.workers.mesh) for name, each in self.executor.parameters.items()}
            for optimizer in (optimizer for group in self.optimizers.values() for optimizer in group):
                optimizer.step()
            result.update_ratios = {name: sample.moved() for name, sample in samples.items()}
            self.skipped_in_a_row = 0
        for optimizer in (optimizer for group in self.optimizers.values() for optimizer in group):
            optimizer.zero_grad(set_to_none=True)
        return policy.rate("matrices") * factor

    def _skip(self, result: StepResult) -> None:
        if not self.scale.may_shrink:  # an overflow that a smaller scale may mend is no sign of divergence
            self.skipped_in_a_row += 1
        self.totals["skipped_steps"] += 1
        self.journal.event("step_skipped", step=self.step + 1, loss=result.loss, grad_norm=result.grad_norms)

    def _diverged(self, batches: Sequence[PackedBatch]) -> str:
        ids = [name for names in self.workers.gather([i for b in batches for i in b.example_ids]) for name in names]
        kept = f"The checkpoint of step {self._saved_step}, before them, is kept." if self._saved_step > 0 else ""
        shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        return (
            f"{self.skipped_in_a_row} steps in a row, the last being step {self.step}, had a loss or gradient that "
            f"is not finite. {kept} The examples of the last batch were: {shown}. Look at these examples; lower "
            "optimizer.lr or max_grad_norm with `postlude amend` and run again; or begin a new run with another "
            "precision."
        )

    # --- evaluation -----------------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float]:
        """The loss on every held-out set, as keys of a metrics line; also told as an event."""
        line: dict[str, float] = {}
        with self.phases.measure("evaluate"):
            for role in self.program.roles.values():
                role.model.eval()
            for name, blocks in self.evaluations.items():
                result = self.executor.evaluate(self.micro_batches(blocks))
                line[f"eval_{name}_loss"] = result.loss
                line |= {f"eval_{name}_{metric}": value for metric, value in result.metrics.items()}
                self.summary.evaluations.setdefault(name, []).append(result.loss)
                self.journal.event("evaluation", step=self.step, name=name, loss=result.loss, metrics=result.metrics)
            for name, metrics in self.examine().items():
                line |= {f"eval_{name}_{metric}": value for metric, value in metrics.items()}
                self.journal.event("evaluation", step=self.step, name=name, metrics=dict(metrics))
            for role in self.program.roles.values():
                role.model.train(role.optimizer is not None)
        return line

    # --- checkpoints ----------------------------------------------------------------------------------------

    def save(self, background: bool) -> None:
        """Checkpoint the state after the last step; in the background, while training goes on, if asked to.

        A full disk ends the training or is an alarm, as the manifest says; the checkpoints before are not touched.
        """
        if self.checkpoint_uri is None:
            return
        self._settle()
        if self.step == self._saved_step:
            return
        self.journal.flush()
        examples = sum(self.workers.gather(self.journal.examples_told))
        small = {
            "account": self.journal.account(examples),
            "progress": self.progress,
            "loader": self.loader.state(),
            "scale": self.scale.state(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "totals": self.totals,
            "world": self.workers.world,
        }
        with self.phases.measure("checkpoint"):
            tensors = checkpoint.trained_state(self.program.roles, self.optimizers)
            self.checkpointer.save(self.checkpoint_uri(self.step), self.step, tensors, small, background)
            self._saved_step = self.step
        if not background:
            self._settle()

    def _settle(self) -> None:
        """Wait for the checkpoint in progress, if there is one, and see to it that it succeeded."""
        with self.phases.measure("checkpoint"):
            try:
                self.checkpointer.wait()
            except storage.StorageFull as error:
                self.journal.event("alarm", what="checkpoint not saved", reason=str(error), step=self._saved_step)
                self._saved_step = -1
                if self.config.checkpoint.on_full_disk == "stop":
                    raise

    def restore(self, uri: str) -> None:
        """Continue from a committed checkpoint: the next step is the one that would have come next."""
        tensors = checkpoint.trained_state(self.program.roles, self.optimizers)
        small = checkpoint.load(uri, tensors, self.workers)
        checkpoint.restore_optimizers(tensors, self.program.roles, self.optimizers)
        self.step = self._saved_step = small["step"]
        self.progress, self.skipped_in_a_row = small["progress"], small["skipped_in_a_row"]
        self.totals = small["totals"]
        self.scale.load(small["scale"])
        before = self.amendments.before(self.step + 1) if self.amendments and self.workers.leads else []
        self._amend(self.workers.from_lead(before))
        self.loader.load(small["loader"])  # what amendments have made of it, too


def _key(*parts: int) -> int:
    """A seed for torch from what identifies a use of randomness."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
