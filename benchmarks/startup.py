"""Wall seconds of commands that should answer at once, beside TRL's, medians of turns.

python benchmarks/startup.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
COMMANDS = {
    "postlude --help": [str(BIN / "postlude"), "--help"],
    "trl --help": [str(BIN / "trl"), "--help"],
    "postlude validate examples/demo.yaml": [str(BIN / "postlude"), "validate", str(ROOT / "examples/demo.yaml")],
}


def main() -> None:
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(5):
        for name, command in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run(
                command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=True
            )
            taken[name].append(time.perf_counter() - begin)
    table = Table(title="Wall seconds, medians of 5")
    table.add_column("command")
    table.add_column("seconds", justify="right")
    for name, seconds in taken.items():
        table.add_row(name, f"{statistics.median(seconds):.2f}")
    Console().print(table)
    ratio = statistics.median(taken["trl --help"]) / statistics.median(taken["postlude --help"])
    print(f"trl --help takes {ratio:.1f} times as long as postlude --help")


if __name__ == "__main__":
    main()
