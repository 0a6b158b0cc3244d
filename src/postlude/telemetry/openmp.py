"""How the threads of OpenMP, which torch computes with, wait for each other. Imports nothing: it comes first of all."""

from __future__ import annotations

import os

SHORT_WAIT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long OpenMP's threads spin at a barrier before they sleep: turns of a loop (libgomp, that of torch),
milliseconds (Intel's and LLVM's). By itself libgomp spins for 300,000: where others want the cores, a thread then burns
the time of the one it waits for. Threads that sleep at once (``OMP_WAIT_POLICY=PASSIVE``) cost a quiet machine half.
"""


def wait_shortly() -> None:
    """Have OpenMP's threads of this process and all that it starts wait as :data:`SHORT_WAIT` says, unless the user
    has said how. Before torch is imported: OpenMP reads it once, as it is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in SHORT_WAIT.items():
            os.environ.setdefault(name, value)
