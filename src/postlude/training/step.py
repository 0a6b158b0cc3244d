"""One optimiser step over packed batches: count, forward and backward, sum, clip, update.

The normalisers are counted over every micro-batch of every rank before the first forward pass, so the loss is
right by construction, whatever the split. Nothing here knows what the objective computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from postlude.data.batch import PackedBatch
from postlude.model.language_model import LanguageModel
from postlude.model.mesh import Mesh, divided_along, own_part
from postlude.objectives.head import FusedHead
from postlude.objectives.objective import LanguageHead, Outcome, ScalarHead
from postlude.training.meters import Phases
from postlude.training.precision import LossScale, Precision
from postlude.training.program import Program, Role
from postlude.training.workers import Workers


@dataclass
class MicroBatch:
    """What an objective sees (:class:`postlude.objectives.objective.Step`): one batch, and every declared model."""

    batch: PackedBatch
    normalizers: Mapping[str, float]
    statistics: Mapping[str, float]
    roles: Mapping[str, Role]
    make_head: Callable[[str, str], LanguageHead | ScalarHead]
    _hidden: dict[str, Tensor] = field(default_factory=dict)

    def hidden(self, model: str = "policy") -> Tensor:
        """Hidden states at every token, [tokens, hidden]; a frozen model's without a graph."""
        if model not in self._hidden:
            role = self.roles[model]
            with torch.set_grad_enabled(torch.is_grad_enabled() and role.optimizer is not None):
                self._hidden[model] = role.model.hidden(self.batch)
        return self._hidden[model]

    def head(self, name: str, model: str = "policy") -> LanguageHead | ScalarHead:
        """A head of a model, one of those that the objective declares."""
        return self.make_head(name, model)

    def on(self, batch: PackedBatch) -> MicroBatch:
        """The same step on a batch that the objective makes of this one."""
        return replace(self, batch=batch, _hidden={})


@dataclass
class StepResult:
    """What a step came to, equal on every rank except for the losses by example."""

    loss: float
    metrics: dict[str, float]
    counts: dict[str, float]
    """The normalisers, and ``tokens``, ``trained_tokens``, ``documents`` and ``flops``, over the whole step."""
    grad_norms: dict[str, float] = field(default_factory=dict)
    """By role, before clipping."""
    update_ratios: dict[str, float | None] = field(default_factory=dict)
    """By role: the norm of the optimiser's update over that of the weights. Empty where the step was left out."""
    examples: list[tuple[str, str, float, int]] = field(default_factory=list)
    """This rank's documents: example id, source, summed loss, tokens it runs over."""

    @property
    def finite(self) -> bool:
        return all(torch.isfinite(torch.tensor([self.loss, *self.grad_norms.values()])).tolist())


@dataclass(frozen=True)
class Executor:
    """Runs a program's objective over micro-batches, with or without gradients."""

    program: Program
    workers: Workers
    precision: Precision
    phases: Phases
    flops: Callable[[PackedBatch], float]

    @cached_property
    def parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """The trained parameters of each role that has an optimiser."""
        return {
            name: [parameter for parameter in role.model.parameters() if parameter.requires_grad]
            for name, role in self.program.roles.items()
            if role.optimizer is not None
        }

    def forward_backward(self, batches: Sequence[PackedBatch], scale: LossScale) -> StepResult:
        """The step's loss, its metrics, and its gradients (summed over ranks, unscaled) in ``.grad``."""
        result = self._run(batches, scale)
        with self.phases.measure("backward"):
            for name, parameters in self.parameters.items():
                gradients = self._gradients(parameters)
                if self.workers.mesh is None:
                    self.workers.sum_gradients(gradients)
                own = [own_part(gradient) for gradient in gradients]
                if scale.scale != 1.0 and own:
                    torch._foreach_mul_(own, 1.0 / scale.scale)
                result.grad_norms[name] = total_norm(gradients, self.workers.mesh)
        return result

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch]) -> StepResult:
        """The loss and metrics over batches taken as one step, without gradients."""
        result = self._run(batches, None)
        for role in self.program.roles.values():
            role.model.release()
        return result

    def clip(self, norms: Mapping[str, float], limit: float | None) -> None:
        """Scale each role's gradients down to the norm ``limit``; None leaves them."""
        if limit is None:
            return
        for name, parameters in self.parameters.items():
            gradients = [own_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
            if gradients:
                factor = limit / (torch.tensor(norms[name]) + 1e-6)
                torch._foreach_mul_(gradients, factor.clamp(max=1.0).to(gradients[0].device))

    def _gradients(self, parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
        if self.workers.world > 1:  # every rank must bring the same tensors to the sum
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    def _heads(self, scale: LossScale | None = None) -> Callable[[str, str], LanguageHead | ScalarHead]:
        """Makes the heads that an objective declares when it asks for them: sharded weights are gathered by then."""
        promised = scale.scale if scale and getattr(self.program.objective, "loss_is_likelihood", False) else None
        declared = self.program.objective.heads

        def make(name: str, role: str) -> LanguageHead | ScalarHead:
            if name not in declared.get(role, ()):
                raise KeyError((name, role))
            model = self.program.roles[role].model
            return language_head(model, promised, in_place=scale is not None) if name == "lm" else model.head(name)

        return make

    def _run(self, batches: Sequence[PackedBatch], scale: LossScale | None) -> StepResult:
        objective = self.program.objective
        totals = self.workers.sum_numbers(_total([self._counts(batch) for batch in batches]))
        placed = [batch.to(self.workers.device) for batch in batches]
        statistics = self._statistics(placed, totals)
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        examples: list[tuple[PackedBatch, Outcome]] = []
        for batch in placed:
            with self.phases.measure("forward"), self.precision.autocast(self.workers.device):
                micro = MicroBatch(batch, totals, statistics, self.program.roles, self._heads(scale))
                outcome = objective(micro)
            if scale is not None:
                with self.phases.measure("backward"):
                    (outcome.loss * scale.scale if scale.active else outcome.loss).backward()
            losses.append(outcome.loss.detach().double())
            for name, (numerator, denominator) in outcome.metrics.items():
                for part, value in ((f"{name}/above", numerator), (f"{name}/below", denominator)):
                    sums[part] = sums.get(part, 0.0) + torch.as_tensor(value).detach().double()
            examples.append((batch, outcome))
        summed = self.workers.sum_numbers(
            {"loss": float(torch.stack(losses).sum()), **{name: float(value) for name, value in sums.items()}}
        )
        metrics = {name.removesuffix("/above") for name in summed if name.endswith("/above")}
        return StepResult(
            loss=summed["loss"],
            metrics={name: _ratio(summed[f"{name}/above"], summed[f"{name}/below"]) for name in sorted(metrics)},
            counts=totals,
            examples=[row for batch, outcome in examples for row in _example_rows(batch, outcome)],
        )

    def _counts(self, batch: PackedBatch) -> dict[str, float]:
        return {
            "tokens": batch.real_tokens,
            "trained_tokens": int((batch.weight > 0).sum()),
            "documents": batch.documents,
            "flops": self.flops(batch),
            **self.program.objective.count(batch),
        }

    @torch.no_grad()
    def _statistics(self, batches: Sequence[PackedBatch], totals: Mapping[str, float]) -> dict[str, float]:
        """The declared pass that couples the batch: sums over the whole step of what the objective measures."""
        objective = self.program.objective
        if not objective.statistics:
            return {}
        measured = []
        for batch in batches:
            with self.phases.measure("forward"), self.precision.autocast(self.workers.device):
                micro = MicroBatch(batch, totals, {}, self.program.roles, self._heads())
                measured.append({name: float(value) for name, value in objective.measure(micro).items()})
        return self.workers.sum_numbers(_total(measured))


def language_head(
    model: LanguageModel, upstream: float | None = None, vocabulary: int | None = None, in_place: bool = False
) -> FusedHead:
    """The head ``lm`` of a model, on request over its first ``vocabulary`` tokens alone."""
    parameters = model.lm_head_parameters()
    parameters = parameters._replace(vocabulary=vocabulary or parameters.vocabulary)
    return FusedHead(**parameters._asdict(), upstream=upstream, in_place=in_place)


def total_norm(gradients: Sequence[Tensor], mesh: Mesh | None) -> float:
    """The norm of all gradients together, of which ranks may have parts: the same on every rank."""
    if mesh is None:
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    squares = torch.zeros(2, dtype=torch.float64)  # of what is whole along the tensor dimension, and of what is not
    for place, divided in enumerate((False, True)):
        own = [own_part(gradient) for gradient in gradients if divided_along(gradient, "tensor") is divided]
        if own:
            squares[place] = torch.stack(torch._foreach_norm(own)).double().square().sum()
    mesh.sum_over_shards(squares)
    mesh.sum_over_tensor(squares[1:])
    return float(squares.sum().sqrt())


def _total(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(sum(part[name] for part in parts)) for name in parts[0]}


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")


def _example_rows(batch: PackedBatch, outcome: Outcome) -> list[tuple[str, str, float, int]]:
    if outcome.example_loss is None or outcome.example_tokens is None:
        return []
    losses = outcome.example_loss.double().tolist()
    tokens = outcome.example_tokens.long().tolist()
    rows = zip(batch.example_ids, batch.sources, losses, tokens, strict=True)
    return [row for row in rows if row[3]]
