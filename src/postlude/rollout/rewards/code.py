"""The reward ``code``: the program in the completion passes the tests of the record."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from postlude.data.example import Record
from postlude.manifest.component import Positive
from postlude.manifest.problem import ManifestError
from postlude.rollout.reward import Asked, RewardFunction
from postlude.rollout.sandbox import NotIsolated, SandboxLimits, passes

_FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)


class Code(RewardFunction):
    """1 where the Python program in the completion passes every test of the record, 0 elsewhere.

    The program is the last fenced block, or all of the completion without one. Each test runs after it in a process of
    its own, without network, and with no file that it can write but its own (:mod:`postlude.rollout.sandbox`).
    """

    tests: str = "tests"
    """The column of the tests: Python that raises where the program is wrong, as a text or a list of them."""
    partial: bool = False
    """The reward is the share of the tests that pass."""
    seconds: Annotated[float, Field(gt=0)] | Positive = 5
    """That a test may take."""
    memory_mib: Positive = 512
    """That a test may take."""
    isolated: bool = True
    """False leaves programs the network, other processes and files: for machines whose kernel cannot isolate them."""

    def check(self) -> None:
        try:
            works = passes("", "", self._limits)
        except NotIsolated as error:
            raise ManifestError(
                "The reward 'code' cannot isolate programs: the kernel gives this user no namespaces, or is older than "
                "Linux 5.12. Run as a user that may have them, or set isolated: false where programs may do anything "
                "that this user may."
            ) from error
        if not works:
            raise ManifestError(
                "The reward 'code' cannot run an empty program: raise 'memory_mib', or 'seconds'. An interpreter alone "
                "needs some 64 MiB."
            )

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        tests = record.get(self.tests)
        tests = [tests] if isinstance(tests, str) else tests
        if not isinstance(tests, list | tuple) or not tests:
            raise ValueError(f"the record has no '{self.tests}' to run; name its column as 'tests'")
        blocks = _FENCED.findall(completion)
        program = blocks[-1] if blocks else completion
        if self.partial:
            return sum(passes(program, str(test), self._limits) for test in tests) / len(tests)
        return all(passes(program, str(test), self._limits) for test in tests)

    @property
    def _limits(self) -> SandboxLimits:
        return SandboxLimits(float(self.seconds), self.memory_mib * 2**20, self.isolated)
