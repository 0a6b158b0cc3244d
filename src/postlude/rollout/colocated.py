"""The policy as an engine: the very weights that are trained, answering where they stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from postlude.model.language_model import LanguageModel
from postlude.rollout.engine import Completion, Enough, Request, Sampling, with_version
from postlude.rollout.native import NativeEngine
from postlude.training.precision import Precision


class PolicyEngine(NativeEngine):
    """Answers with a model that is trained in this process, ``batch`` completions at a time, in its precision.

    Nothing is copied: the weights are those of the last step.
    """

    def __init__(self, policy: LanguageModel, precision: Precision, batch: int) -> None:
        super().__init__(policy.causal, policy.vocabulary, batch)
        self.policy, self._precision = policy, precision
        self._version = 0

    def update(self, version: int) -> None:
        """Note that the weights are now those after ``version`` steps."""
        self._version = version

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        """See :meth:`postlude.rollout.engine.Engine.generate`."""
        if not requests:
            return []
        with (
            self.policy.plain(),
            self._precision.autocast(self.policy.device),
            torch.compiler.set_stance("force_eager"),
        ):
            return with_version(super().generate(requests, sampling, enough), self._version)
