"""Errors that a user can cause: one clear paragraph that says what is wrong, where, and what to do."""

from __future__ import annotations

from typing import Any, ClassVar

from postlude.secrecy import without_secrets


class UserError(Exception):
    """Something the user can mend. The command line prints it without a traceback."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return without_secrets(super().__str__())

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"kind": type(self).__name__, "message": str(self)}


class DataError(UserError):
    """The data are wrong."""

    exit_code = 3


class ComputeError(UserError):
    """The machines cannot run what the manifest asks for."""

    exit_code = 4
