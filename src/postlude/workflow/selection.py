"""Which stages of the graph a command is about: all of them, one with what it needs, or a stretch."""

from __future__ import annotations

from dataclasses import dataclass

from postlude.manifest.graph import ancestors, descendants, order
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import Manifest
from postlude.nearest import suggestion_or_list


@dataclass(frozen=True)
class Selection:
    """What the options of ``postlude run`` choose."""

    stage: str | None = None
    """This stage and what it needs."""
    begin: str | None = None
    """``--from``: this stage, though it be finished, and what hangs on it."""
    until: str | None = None
    """This stage and what it needs; after ``begin`` only what lies between."""

    def stages(self, manifest: Manifest) -> list[str]:
        """The chosen stages, each after those that it needs. ManifestError for a name that is not there."""
        self._check(manifest)
        chosen = set(manifest.stages)
        end = self.stage or self.until
        if end is not None:
            chosen &= {end} | ancestors(manifest, end)
        if self.begin is not None:
            chosen &= {self.begin} | descendants(manifest, self.begin)
            # What else they need comes along, but for what the first of them needs: that must be there.
            needed = set[str]().union(*(ancestors(manifest, name) for name in chosen))
            chosen |= needed - ancestors(manifest, self.begin)
        return [name for name in order(manifest) if name in chosen]

    def forced(self, manifest: Manifest) -> set[str]:
        """The chosen stages that run again though they be finished."""
        if self.begin is None:
            return set()
        return ({self.begin} | descendants(manifest, self.begin)) & set(self.stages(manifest))

    def _check(self, manifest: Manifest) -> None:
        for option, name in (("--stage", self.stage), ("--from", self.begin), ("--until", self.until)):
            if name is not None and name not in manifest.stages:
                hint = suggestion_or_list(name, manifest.stages)
                raise ManifestError(f"{option}: there is no stage '{name}'.{hint}")
        if self.stage is not None and (self.begin is not None or self.until is not None):
            raise ManifestError(
                "--stage stands alone: it is one stage with what it needs. Leave it or --from/--until out."
            )
        if self.begin and self.until and self.begin not in {self.until} | ancestors(manifest, self.until):
            raise ManifestError(
                f"--from {self.begin} --until {self.until}: the stage '{self.until}' does not hang on '{self.begin}', "
                "so there is nothing between them. Give another stage, or one of the two options."
            )
