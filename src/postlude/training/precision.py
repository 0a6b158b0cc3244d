"""Precision: which dtype the matrix products run in, why, and the scale that fp16 gradients need.

Master weights, gradients and reductions are fp32 throughout; the chosen dtype is that of autocast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The compute dtype of a stage and the reason for it."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    @staticmethod
    def choose(name: str, device: torch.device, stored: torch.dtype | None, half: str = "fp16") -> Precision:
        """Resolve ``auto``: fp32 on a CPU; on CUDA ``half``, except that a checkpoint stored in bf16 trains in bf16."""
        if name != "auto":
            return Precision(name, "the manifest asks for it")
        if device.type == "cpu":
            return Precision("fp32", "auto: a CPU computes in fp32")
        if stored == torch.bfloat16:
            return Precision("bf16", "auto: the checkpoint is stored in bf16")
        if half == "bf16":
            return Precision("bf16", "auto: on CUDA a policy answers and is trained in bf16")
        return Precision("fp16", "auto: supervised training on CUDA, the checkpoint is not stored in bf16")

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The context that forward passes run in."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


class LossScale:
    """Dynamic loss scaling (Micikevicius et al., 2018): halved at an overflow, doubled after a run of good steps.

    Only fp16 needs it; elsewhere the scale is one and stays so. A power of two changes no bit of the mantissa.
    """

    GROWTH_INTERVAL = 1000

    def __init__(self, precision: Precision) -> None:
        self.active = precision.name == "fp16"
        self.scale = 2.0**16 if self.active else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """Take note of whether the step's gradients, the same on every rank, were finite."""
        if not self.active:
            return
        if not finite:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.scale, self.good_steps = min(self.scale * 2, 2.0**24), 0

    @property
    def may_shrink(self) -> bool:
        """Whether an overflow may be the scale's fault, and the next step succeed with a smaller one."""
        return self.active and self.scale > 1.0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        self.scale, self.good_steps = state["scale"], int(state["good_steps"])
