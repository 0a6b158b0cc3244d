"""A plugin for stages that wait: none goes on to a step behind the number that the file ``GATE`` holds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postlude.telemetry.recorder import Recorder

_told = Recorder.metrics


def _wait(recorder: Recorder, line: Mapping[str, Any]) -> None:
    _told(recorder, line)
    while line["step"] >= int(Path(os.environ["GATE"]).read_text()):
        time.sleep(0.02)


Recorder.metrics = _wait  # type: ignore[method-assign]
