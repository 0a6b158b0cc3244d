"""The key ``adapter`` of a stage that trains: a few small matrices beside frozen weights."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from postlude.manifest.component import Config, Positive

Held = Literal["int8", "nf4"]
"""How the weights of frozen linear layers are packed: 8 bits with a scale for each row, or 4 bits of a normal
distribution with a scale for each 64."""


class Adapter(Config):
    """Low-rank adaptation (Hu et al., 2021): beside each weight W that is adapted ``alpha / rank * B @ A`` is learned,
    and W stays as it is."""

    kind: Literal["lora"] = "lora"
    rank: Positive | None = None
    """Rows of A and columns of B; by default 16."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """By default twice the rank."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Which linear layers: ``attention`` and ``mlp`` are those in each layer's attention and outside of it, anything
    else is the end of a layer's name, as ``q_proj``. By default all that there are."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """On what goes into A; none by default."""
    rslora: bool | None = None
    """Whether to scale by ``alpha / sqrt(rank)`` (Kalajdzievski, 2023)."""
    dora: bool | None = None
    """Whether to learn the length of each row of the weight apart from its direction (Liu et al., 2024)."""
    base: Held | None = None
    """Hold the linear layers of the base in 8 or 4 bits; each product unpacks its weight. By default they stay as they
    are stored. Needs torchao."""
    continue_: Annotated[bool, Field(alias="continue")] = False
    """Whether to train the adapter on that the model is, instead of a new one. Its shape is then given already."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        shape = ("rank", "alpha", "targets", "dropout", "rslora", "dora")
        keys = [name for name in shape if getattr(self, name) is not None]
        if self.continue_ and keys:
            raise ValueError(f"'continue' takes the adapter as it is: leave out {', '.join(keys)}")
        if self.base is not None and self.dora:
            raise ValueError("'dora' learns from the weights of the base what 'base' packs away: leave one of them out")
        return self

    @property
    def rank_in_full(self) -> int:
        return self.rank or 16

    @property
    def alpha_in_full(self) -> float:
        return self.alpha or 2.0 * self.rank_in_full
