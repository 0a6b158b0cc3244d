"""Errors that a user can cause: one clear paragraph that says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from postlude.manifest.problem import Problem


class UserError(Exception):
    """Something the user can mend. The command line prints it without a traceback."""

    exit_code: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"kind": type(self).__name__, "message": str(self)}


class ManifestError(UserError):
    """The manifest is wrong."""

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)
        """Each thing that is wrong, where the message lists several."""

    def to_json(self) -> dict[str, Any]:
        problems = [problem.to_json() for problem in self.problems]
        return {**super().to_json(), **({"problems": problems} if problems else {})}


class DataError(UserError):
    """The data are wrong."""

    exit_code = 3


class ComputeError(UserError):
    """The machines cannot run what the manifest asks for."""

    exit_code = 4
