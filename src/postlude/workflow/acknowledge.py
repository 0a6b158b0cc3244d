"""``postlude acknowledge``: a person knows of alarms."""

from __future__ import annotations

from collections.abc import Sequence

from postlude.errors import UserError
from postlude.nearest import suggestion_or_list
from postlude.runs import open_run
from postlude.telemetry import events
from postlude.telemetry.alarms import standing


def acknowledge(place: str, names: Sequence[str]) -> str:
    """Acknowledge the alarms of a run that bear one of these names, or all, and tell which. It changes nothing of how
    the run goes on: a rule is armed again once its alarm is over.

    UserError if there is no such alarm.
    """
    run = open_run(place)
    stand = standing(events.read(run.events))
    known = {each.alarm.what for each in stand}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"The run '{place}' has no alarm '{unknown[0]}'.{suggestion_or_list(unknown[0], known)}")
    chosen = [each.alarm for each in stand if not each.acknowledged and (not names or each.alarm.what in names)]
    for alarm in chosen:
        events.record(run.events, "alarm_acknowledged", alarm.stage, what=alarm.what)
    return f"acknowledged: {'; '.join(alarm.what for alarm in chosen) or 'none was left'}"
