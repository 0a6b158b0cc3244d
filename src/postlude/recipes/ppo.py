"""Proximal policy optimisation (Schulman et al., 2017): a critic says what was to be expected before each token, and
advantages are generalised (GAE) from the reward after the last one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from postlude.manifest.change import Change, from_round, from_step, never
from postlude.manifest.component import Config, Named, Positive, Share
from postlude.manifest.schema import ModelPlace
from postlude.objectives.objective import Objective
from postlude.recipes.group_relative import Clip, ClipBelow, Coefficient
from postlude.recipes.online import OnlineRecipe
from postlude.training.optimizers import Optimizer
from postlude.training.program import Companion

if TYPE_CHECKING:
    from postlude.rollout.algorithm import Algorithm

HEAD_ON_POLICY = "policy"


class Critic(Config):
    """What says how good an answer will be before it is there."""

    changes: ClassVar[Mapping[str, Change]] = {
        **dict.fromkeys(("trunk", "model"), never("the critic has its weights")),
        "optimizer": never("its state was made for it"),
        **dict.fromkeys(("coefficient", "clip"), from_step("the loss has it")),
    }

    trunk: Literal["own", "policy"] = "own"
    """A model of its own, or a second head on the policy."""
    model: ModelPlace | None = None
    """What a model of its own starts from: by default the model that the stage starts from. A reward model brings a
    head that scores already."""
    optimizer: Annotated[Optimizer, Named("optimizers", default="adamw")] | None = None
    """How a model of its own is trained; by default as the policy is."""
    coefficient: Clip = 0.5
    """How much its loss counts; the policy's counts 1."""
    clip: Clip | None = 0.2
    """Its values count as changed by at most so much in a round; null for no limit."""

    @model_validator(mode="after")
    def _own_keys_have_a_use(self) -> Self:
        if self.trunk == "policy" and (self.model is not None or self.optimizer is not None):
            raise ValueError("'model' and 'optimizer' belong to a critic with 'trunk: own'")
        return self


class PPO(OnlineRecipe):
    """Proximal policy optimisation, with a critic."""

    changes = {
        "critic": never("it was built as it says"),
        **dict.fromkeys(("clip", "entropy"), from_step("the loss has it")),
        **dict.fromkeys(("gamma", "gae_lambda"), from_round("advantages are made with it")),
        "kl": from_round("the rewards of the round's samples are charged with it; what it was adapted to is let go"),
        "kl_target": from_round("the coefficient is adapted to it after the round"),
    }

    recipe: Literal["ppo"]
    group: Positive = 1
    passes: Positive = 2
    updates: Positive = 2
    critic_: Annotated[Critic, Field(alias="critic")] = Critic()
    """What says how good an answer will be before it is there."""
    clip: ClipBelow = 0.2
    """A token's probability counts as changed by at most so much."""
    gamma: Share = 1.0
    """How much of what comes a token later counts."""
    gae_lambda: Share = 0.95
    """Between 0, where the critic's next value is believed, and 1, where only the reward is."""
    kl: Coefficient = 0.05
    """How much each token's divergence from the reference is charged in the reward."""
    kl_target: Annotated[float, Field(gt=0)] | None = None
    """The divergence of a sample that ``kl`` is adapted to; without it ``kl`` stays."""
    entropy: Coefficient = 0.0
    """How much the entropy of the policy is rewarded."""

    @model_validator(mode="after")
    def _compares_with_a_use(self) -> Self:
        if not self.kl and (self.reference is not None or self.kl_target is not None):
            raise ValueError("'reference' and 'kl_target' are read with 'kl' above 0 only: set it, or leave them out")
        return self

    @property
    def compares(self) -> bool:
        return self.kl > 0

    @property
    def critic(self) -> str:
        return HEAD_ON_POLICY if self.critic_.trunk == "policy" else "critic"

    def algorithm(self) -> Algorithm:
        from postlude.rollout.algorithm import Generalized

        return Generalized(self.gamma, self.gae_lambda, self.kl, self.kl_target)

    def objective(self) -> Objective:
        from postlude.objectives.actor_critic import ActorCritic

        policy = self.policy_gradient(clip_low=self.clip, clip_high=self.clip, entropy_coefficient=self.entropy)
        return ActorCritic(policy, self.critic, self.critic_.coefficient, self.critic_.clip)

    def companions(self) -> Mapping[str, Companion]:
        if self.critic == HEAD_ON_POLICY:
            return super().companions()
        optimizer = self.critic_.optimizer or Optimizer.of(self.optimizer)
        return {**super().companions(), "critic": Companion(self.critic_.model or self.model, optimizer)}
