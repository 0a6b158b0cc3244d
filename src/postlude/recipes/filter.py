"""Filtering: records are read, judged by filters and rewards, and those that are kept become a data set."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from postlude.manifest.component import Config, Positive
from postlude.manifest.starter import StarterFiles
from postlude.recipes.answering import Rewarding
from postlude.recipes.recipe import Datasets, WorkRecipe
from postlude.rollout.reward import Reward


class KeepRecords(Config):
    """Which records are kept."""

    exactly_one: ClassVar[tuple[tuple[str, ...], ...]] = (("above", "share"),)

    above: float | None = None
    """Those whose reward is above this."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """This share of all the records, those with the highest rewards."""


class Filter(WorkRecipe, Rewarding):
    """Records of data sets that their filters, and a reward, let through, as a data set."""

    does: ClassVar[str] = "postlude.stages.filtering:Filtering"
    free: ClassVar[tuple[str, ...]] = ("reward_seconds", "reward_workers")
    starter = StarterFiles("postlude.recipes.starters", "filter.yaml", {".jsonl": "sums-doubtful.jsonl"})

    recipe: Literal["filter"]
    data: Datasets
    """The data sets, with the filters that each has of its own. They have one format, which reads what is kept, too."""
    reward: list[Reward] = []
    """What says how good the last turn of a conversation, or a completion, is; written into the records."""
    keep: KeepRecords | None = None
    """``{above: THRESHOLD}`` or ``{share: SHARE}``; without it every record that the filters let through."""
    portion: Positive = 256
    """Records that are judged, and committed, at a time."""

    @model_validator(mode="after")
    def _keep_can_be_told(self) -> Self:
        if self.keep is not None and not self.reward:
            raise ValueError("what is kept depends on the reward, so 'reward' is needed")
        return self
