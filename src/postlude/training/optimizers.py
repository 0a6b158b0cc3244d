"""Optimisers that a manifest may name.

A component here is the configuration; ``build`` makes torch's optimiser. A list, because Muon only takes
matrices and leaves the rest to AdamW. The trainer asks the component for each group's keys before every step,
so a schedule or an amendment changes them without touching optimiser state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from postlude.manifest.change import Change, from_step, never
from postlude.manifest.component import Component

if TYPE_CHECKING:
    import torch

NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Optimizer(Component):
    """Base of the kind ``optimizers``."""

    changes: ClassVar[Mapping[str, Change]] = {
        "lr": from_step("the schedule multiplies it"),
        "weight_decay": from_step("weights shrink by so much of the rate"),
    }

    lr: Positive = 1e-5
    weight_decay: NotNegative = 0.0

    @property
    def state_per_parameter(self) -> int:
        """How many numbers the optimiser keeps for each parameter, for the memory plan."""
        return 2

    def build(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[torch.optim.Optimizer]:
        """Torch optimisers over the named parameters that are trained. Each of their groups has a key ``role``."""
        raise NotImplementedError

    def rate(self, role: str) -> float:
        """The peak learning rate of the groups with this role."""
        return self.lr

    def decay(self, role: str) -> float:
        """The weight decay of the groups with this role. Vectors (norms, biases) are never decayed."""
        return 0.0 if role == "vectors" else self.weight_decay

    def group_keys(self, role: str, factor: float) -> dict[str, Any]:
        """What the groups with this role have in a step, when the schedule gives ``factor`` of the peak rate."""
        return {"lr": self.rate(role) * factor, "weight_decay": self.decay(role)}


def _by_dimension(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[dict[str, Any]]:
    groups: dict[str, list[torch.nn.Parameter]] = {"matrices": [], "vectors": []}
    for _, parameter in parameters:
        groups["matrices" if parameter.ndim >= 2 else "vectors"].append(parameter)
    return [{"params": members, "role": role} for role, members in groups.items() if members]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), in torch's fused implementation."""

    changes = {
        "betas": from_step("so fast the running means forget"),
        "eps": from_step("it is added to the divisor of each update"),
    }

    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.9,
        0.999,
    ]
    eps: Positive = 1e-8

    def group_keys(self, role: str, factor: float) -> dict[str, Any]:
        return {**super().group_keys(role, factor), "betas": (self.betas[0], self.betas[1]), "eps": self.eps}

    def build(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[torch.optim.Optimizer]:
        import torch

        return [
            torch.optim.AdamW(
                _by_dimension(parameters),
                lr=self.lr,
                betas=(self.betas[0], self.betas[1]),
                eps=self.eps,
                fused=True,
            )
        ]


class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz steps (Jordan et al., 2024) for the matrices inside the layers;
    AdamW for embeddings, heads and vectors, at ``adamw_lr``. The update is scaled to AdamW's root mean square
    (Liu et al., 2025) by default, so that a rate that suits AdamW suits Muon."""

    changes = {
        "adamw_lr": from_step("the schedule multiplies it"),
        "momentum": from_step("so fast the running mean forgets"),
        "nesterov": from_step("it says which mean the update is made of"),
        "adjust": from_step("it says how the update is scaled"),
    }

    adamw_lr: Positive | None = None
    """Rate of the parameters that AdamW takes; by default ``lr``."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    nesterov: bool = True
    adjust: Literal["original", "match_rms_adamw"] = "match_rms_adamw"

    @property
    def state_per_parameter(self) -> int:
        return 1

    def rate(self, role: str) -> float:
        return self.lr if role == "orthogonal" else self.adamw_lr or self.lr

    def group_keys(self, role: str, factor: float) -> dict[str, Any]:
        own = {"momentum": self.momentum, "nesterov": self.nesterov, "adjust_lr_fn": self.adjust}
        return {**super().group_keys(role, factor), **(own if role == "orthogonal" else {})}

    def build(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[torch.optim.Optimizer]:
        import torch

        orthogonal: list[tuple[str, torch.nn.Parameter]] = []
        rest: list[tuple[str, torch.nn.Parameter]] = []
        for name, parameter in parameters:
            inside = parameter.ndim == 2 and ".layers." in f".{name}"
            (orthogonal if inside else rest).append((name, parameter))
        optimizers: list[torch.optim.Optimizer] = []
        if orthogonal:
            group = {"params": [parameter for _, parameter in orthogonal], "role": "orthogonal"}
            optimizers.append(
                torch.optim.Muon(
                    [group],
                    lr=self.lr,
                    momentum=self.momentum,
                    nesterov=self.nesterov,
                    adjust_lr_fn=self.adjust,
                )
            )
        if rest:
            optimizers.append(torch.optim.AdamW(_by_dimension(rest), lr=self.rate("matrices"), fused=True))
        return optimizers


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum on request."""

    changes = {"momentum": never("there is no running mean where it was 0, and one to be let go where it was not")}

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def state_per_parameter(self) -> int:
        return 1 if self.momentum else 0

    def build(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[torch.optim.Optimizer]:
        import torch

        return [torch.optim.SGD(_by_dimension(parameters), lr=self.lr, momentum=self.momentum)]
