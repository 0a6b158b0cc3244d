"""One thing that is wrong with a manifest, and the error that lists them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from postlude.errors import UserError
from postlude.manifest.value import Origin


@dataclass(frozen=True)
class Problem:
    """What is wrong and where."""

    origin: Origin
    key: str
    """The path of the key; empty where the text as a whole is wrong."""
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin.place, self.key, self.what) if part)

    def to_json(self) -> dict[str, str | int]:
        """For editors and scripts."""
        origin = {name: getattr(self.origin, name) for name in ("file", "line", "column", "assignment")}
        return {**origin, "key": self.key, "what": self.what}


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


def refusal(name: str, problems: Iterable[Problem]) -> ManifestError:
    """The error that lists every problem once, in the order of the file, the command line last.

    ``name`` is the manifest's; empty for an assignment that stands alone.
    """
    listed = sorted(
        dict.fromkeys(problems),
        key=lambda problem: (bool(problem.origin.assignment), problem.origin.line, problem.origin.column),
    )
    places = "one place" if len(listed) == 1 else f"{len(listed)} places"
    lines = "\n".join(f"  {problem}" for problem in listed)
    subject = f"The manifest {name}" if name else "The assignment"
    return ManifestError(f"{subject} is wrong in {places}:\n{lines}", listed)
