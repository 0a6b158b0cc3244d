"""The models of a stage that trains: the policy, those that the step needs beside it, and what they are computed in."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from postlude.manifest.adapter import Adapter
from postlude.manifest.schema import ModelPlace
from postlude.model.adapters.inject import WithoutAdapter
from postlude.model.added_tokens import config_with_tokens
from postlude.model.attached import AdapterRequest
from postlude.model.language_model import LanguageModel
from postlude.model.load import configuration, load_divided, load_model
from postlude.model.mesh import Mesh
from postlude.recipes.recipe import TrainingRecipe
from postlude.stages.models import stand_in_for
from postlude.stages.training_data import TrainingData
from postlude.training.optimizers import Optimizer
from postlude.training.precision import Precision
from postlude.training.program import Program, Role


class TrainingModels:
    """The models of a stage on one rank. In a rehearsal, small ones of the same architectures stand in for them."""

    def __init__(self, data: TrainingData) -> None:
        self.data, self.parts, self.config = data, data.parts, data.parts.config_of(TrainingRecipe)

    def configuration(self, start: ModelPlace) -> PreTrainedConfig:
        """The configuration of a model of the stage, or of what it will be made from; with the stage's new tokens, if
        it is the model that training starts from."""
        root = self.parts.root(start)
        config = configuration(root, self.parts.place_of(root), self.data.tokenizer)
        return config_with_tokens(config, self.data.new_tokens) if start == self.config.model else config

    def vocabulary(self, start: ModelPlace) -> int:
        """How many tokens a model has, without loading it."""
        return self.configuration(start).get_text_config().vocab_size

    def start_of(self, start: ModelPlace) -> ModelPlace:
        """What a model is loaded from: in a rehearsal a small random one."""
        return stand_in_for(self.configuration(start)) if self.parts.mode.small else start

    def model(
        self,
        start: ModelPlace,
        mesh: Mesh | None = None,
        scalar_head: bool = False,
        adapter: Adapter | None = None,
    ) -> LanguageModel:
        """A model on this rank's device, or its part of one, recomputing and compiled as the stage says."""
        parts, source = self.parts, self.start_of(start)
        place, device = parts.place_of(source), parts.workers.device
        keys: dict[str, Any] = {"seed": parts.manifest.seed, "adapter": None}
        if adapter is not None:
            keys["adapter"] = AdapterRequest(adapter, parts.manifest.seed, self._frozen_dtype)
        if start == self.config.model:
            keys["new_tokens"] = self.data.new_tokens
        if mesh is None:
            model = load_model(source, place, self.data.tokenizer, **keys).to(device)
        else:
            model = load_divided(
                source, place, self.data.tokenizer, mesh=mesh, device=device, scalar=scalar_head, **keys
            )
        recompute = self.config.recompute
        if isinstance(recompute, str) and recompute != "none":
            model.recompute_layers(recompute)
        if self.config.compile:
            model.compile_layers(1.0 if isinstance(recompute, str) else recompute)
        return model

    def _frozen_dtype(self, stored: torch.dtype) -> torch.dtype:
        """What weights that are not trained are held in: as they are stored, where that is what is computed in."""
        computed = self._precision_for(stored).dtype
        return stored if stored == computed else torch.float32

    @cached_property
    def program(self) -> Program:
        """The recipe's objective, and every model that it needs with its heads."""
        config = self.config
        objective, adapter, mesh = config.objective(), config.adapter, self.parts.workers.mesh

        def load(start: ModelPlace, name: str, adapter: Adapter | None = None) -> LanguageModel:
            return self.model(start, mesh, "scalar" in objective.heads.get(name, ()), adapter)

        policy = load(config.model, "policy", adapter)
        roles = {"policy": Role(policy, Optimizer.of(config.optimizer))}
        for name, companion in config.companions().items():
            self.check_same_tokens(name, companion.start)
            is_base = companion.start == config.model and companion.optimizer is None
            if is_base and adapter is not None and not adapter.continue_:
                roles[name] = Role(WithoutAdapter(policy), None)  # type: ignore[arg-type]
            else:
                roles[name] = Role(load(companion.start, name), companion.optimizer)
        for name, heads in objective.heads.items():
            if "scalar" in heads:
                roles[name].model.add_scalar_head()
        for name, role in roles.items():
            trained = role.optimizer is not None
            role.model.make_trainable(trained)
            role.model.train(trained)
            role.model.freeze_heads_except(objective.heads.get(name, ()))
        return Program(objective, roles)

    def amended(self, config: TrainingRecipe) -> Program:
        """The program as a config says that was amended: with the same models."""
        roles, companions = dict(self.program.roles), config.companions()
        roles["policy"] = replace(roles["policy"], optimizer=Optimizer.of(config.optimizer))
        for name in companions.keys() & roles.keys():
            roles[name] = replace(roles[name], optimizer=companions[name].optimizer)
        return Program(config.objective(), roles)

    def check_same_tokens(self, name: str, start: ModelPlace) -> None:
        """ManifestError if a model beside the policy takes the stage's ids for other tokens; of one that is not there
        yet, if what it is made from does."""
        root = self.parts.root(start)
        if self.parts.place_of(root) is not None:
            self.data.check_same_tokens(name, root)

    @cached_property
    def precision(self) -> Precision:
        """The compute dtype, with the reason for it."""
        return self._precision_for(self.program.roles["policy"].model.stored_dtype)

    def _precision_for(self, stored: torch.dtype | None) -> Precision:
        return Precision.choose(self.config.precision, self.parts.workers.device, stored, self.config.half)
