"""An example as its stage encodes it, each token trained or not.

It is found by ``postlude preview`` in a process of its own with a deadline: that loads tokenizers, runs what code the
manifest names, and may have to look through all of the data. So only who may amend a run can ask for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from postlude import storage
from postlude.errors import UserError
from postlude.manifest.lock import read_lock
from postlude.runs import Run

SECONDS = 60.0
_LONGEST = 2000
"""Of what a process says of its end, so many of the last characters are told."""

_one_at_a_time = asyncio.Semaphore(1)


async def find(run: Run, stage: str, example_id: str, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """The documents of an example, each with ``tokens`` of which each has ``id``, ``text``, ``trained``; none where the
    data have no such example any more. UserError where it cannot be found out, or not in time."""
    async with _one_at_a_time:
        text = await asyncio.to_thread(run.read_manifest_lock)
        locked = read_lock(text or "", run.manifest_lock)
        with storage.scratch_folder("preview") as scratch:
            path = storage.local_path(storage.join(scratch, "manifest.yaml"))
            storage.write_text(path, json.dumps(locked.manifest))
            command = ["preview", path, f"--stage={stage}", f"--example={example_id}", "--json"]
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "postlude", *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            try:
                told, wrong = await asyncio.wait_for(process.communicate(), seconds)
            except TimeoutError as error:
                raise UserError(
                    f"The example was not found in {seconds:.0f} seconds. `postlude preview MANIFEST --stage {stage} "
                    f"--example ID` looks for it for as long as it takes."
                ) from error
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    if process.returncode:
        raise UserError(wrong.decode(errors="replace").strip()[-_LONGEST:] or f"It ended with {process.returncode}.")
    documents: list[dict[str, Any]] = [
        document for block in json.loads(told)["blocks"] for document in block["documents"]
    ]
    return documents
