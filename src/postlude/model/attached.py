"""The adapter of a model that is trained, and how a stage asks for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig

from postlude.manifest.adapter import Adapter

ADAPTER_NAME = "default"
"""What PEFT calls the one adapter in a model."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to."""

    place: str
    digest: str | None
    """Of its files; None where the adapter does not say."""


@dataclass(frozen=True)
class Attached:
    """The adapter of a model that is trained."""

    config: LoraConfig
    base: Base


@dataclass(frozen=True)
class AdapterRequest:
    """The adapter that a stage asks for."""

    adapter: Adapter
    seed: int
    frozen_dtype: Callable[[torch.dtype], torch.dtype]
    """From the dtype that weights are stored in to that which the frozen ones are held in."""
