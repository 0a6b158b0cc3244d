"""The views, one file each. Each has ``show(followed, stage, view)``, which builds its elements below those that are
there and registers its refresh (:func:`postlude.dashboard.frame.refreshed`); ``view`` is what stands in the address.
"""

from __future__ import annotations

from collections.abc import Callable

from postlude.dashboard.followed import Followed
from postlude.dashboard.views import data, events, rollouts, runs, stage, steer, workers

Show = Callable[[Followed, str | None, dict[str, str]], None]

VIEWS: dict[str, tuple[str, Show]] = {
    "overview": ("Overview", runs.show),
    "stage": ("Stage", stage.show),
    "workers": ("Workers", workers.show),
    "data": ("Data", data.show),
    "rollouts": ("Rollouts", rollouts.show),
    "events": ("Events", events.show),
    "steer": ("Steer", steer.show),
}
"""In the order of the navigation: the key of the address, the title, and what builds it."""

OF_STAGE = {"stage", "workers", "data", "rollouts", "steer"}
"""Those that show one stage, which is chosen above them."""
