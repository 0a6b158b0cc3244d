"""The reward ``code``: the program in the completion passes the tests of the record."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from postlude.data.example import Record
from postlude.manifest.component import Positive
from postlude.manifest.problem import ManifestError
from postlude.rollout.reward import Asked, RewardFunction
from postlude.rollout.sandbox.run import NotIsolated, SandboxLimits, passes, walls_of
from postlude.rollout.sandbox.walls import NOTHING

_FENCED = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)```", re.DOTALL)
"""Linear: what ends no block is followed by no further mark at which another could begin."""


class Code(RewardFunction):
    """1 where the Python program in the completion passes every test of the record, 0 elsewhere.

    The program is the last fenced block, or all of the completion without one. Each test is run by a process that does
    not run the program, and asks the program's for what it names (:mod:`postlude.rollout.sandbox`).
    """

    tests: str = "tests"
    """The column of the tests: Python that raises where the program is wrong, as a text or a list of them."""
    partial: bool = False
    """The reward is the share of the tests that pass."""
    seconds: Annotated[float, Field(gt=0)] | Positive = 5
    """That a test may take."""
    memory_mib: Positive = 512
    """That a test may have, with all the processes that the program starts."""
    isolated: bool = True
    """False leaves programs the network and files: for machines whose kernel cannot isolate them."""

    def check(self) -> None:
        try:
            works = passes("", "", self._limits)
        except NotIsolated as error:
            if not self.isolated:
                raise ManifestError(
                    "The reward 'code' cannot limit programs: this kernel has no filter of system calls (seccomp) for "
                    "this user, or /proc does not tell what a process has started. Run it on Linux with both."
                ) from error
            raise ManifestError(
                "The reward 'code' cannot isolate programs: there is no bubblewrap, and the kernel gives this user "
                "neither namespaces nor Landlock (Linux 6.2). Install bubblewrap, run as a user that may have them, or "
                "set isolated: false where programs may do anything that this user may."
            ) from error
        if not works:
            raise ManifestError(
                "The reward 'code' cannot run an empty program: raise 'memory_mib', or 'seconds'. An interpreter alone "
                "needs some 64 MiB."
            )

    def remark(self) -> str | None:
        walls = walls_of(self._limits)
        if walls == NOTHING:
            return "programs are not isolated: they may read, write and reach what this user may"
        return f"programs are isolated by {walls}"

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
