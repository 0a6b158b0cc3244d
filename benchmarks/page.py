"""How fast the page has the curves of a very large run (benchmarks/big_run.py), and in how much memory, beside
TensorBoard with the same metrics.

python benchmarks/page.py FOLDER [--share 0.01] [--without-tensorboard]

- *cold*: from the start of the process until the curves of all metrics are there, TensorBoard's as soon as they reach
  the last step.
- *warm*: the same curves once more of the process that has them: ours at 600 pixel columns with their extremes as the
  JSON that is sent, TensorBoard's as the JSON that its server answers to its page's request (1,000 points drawn by
  chance, which is what it keeps).

Both read from a warm page cache. The server's memory is that of its readers, with the losses, rollouts and readings.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import big_run
import numpy as np
import psutil

from postlude import storage
from postlude.runs import Run
from postlude.runs.columns import Columns
from postlude.runs.losses import Losses
from postlude.runs.samples import Rollouts
from postlude.runs.workers import Workers

WIDTH = 600
TURNS = 5
PATIENCE_SECONDS = 1800


def timed(name: str, act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    spent = time.perf_counter() - begun
    print(f"  {name}: {spent:.3f} s", flush=True)
    return spent


def mib(process: psutil.Process) -> float:
    return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)]) / 2**20


# --- ours ---------------------------------------------------------------------------------------------------


def read(uri: str) -> None:
    """In a process of its own: read the run as the page's server does, and tell what each view takes."""
    stage, this = Run(uri).stage("policy"), psutil.Process()
    columns, losses = Columns(stage.metrics), Losses(stage.examples)
    rollouts, workers = Rollouts(stage.rollouts), Workers(stage.readings)

    def curves() -> int:
        drawn = {name: columns.curve(name, WIDTH) for name in columns.names}
        sent = json.dumps({name: [curve.steps.tolist(), curve.values.tolist()] for name, curve in drawn.items()})
        assert big_run.SPIKE_LOSS in drawn["loss"].values, "the spike is not in the picture"
        return len(sent)

    begun = psutil.Process().create_time()
    timed("metrics, read once", columns.update)
    curves()
    print(f"  cold, since the process began: {time.time() - begun:.1f} s", flush=True)
    timed("warm, curves of every metric", curves)
    best = min(timed("again", curves) for _ in range(TURNS - 1))
    print(f"ours, warm: {best:.3f} s, {curves() / 2**20:.1f} MiB sent; {mib(this):,.0f} MiB in use", flush=True)
    timed("losses by example, read once", losses.update)
    worst = losses.ranked("worst", 20)
    timed("the worst, the forgotten, by source", lambda: (losses.ranked("forgotten", 20), losses.by_source()))
    timed("the history of an example", lambda: losses.history(worst[0].example_id))
    timed("nothing new", losses.update)
    timed("rollouts, read once", rollouts.update)
    timed("a first page of groups", rollouts.groups)
    timed("another, by reward", lambda: rollouts.groups("reward", outcome="dropped"))
    timed("the samples of a group", lambda: rollouts.samples(64))
    timed("readings, read once", workers.update)
    timed(
        "every worker",
        lambda: [(workers.curve(r, "resident_bytes", WIDTH), workers.bands(r, WIDTH)) for r in workers.ranks],
    )
    print(f"server: {mib(this):,.0f} MiB with everything, {peak_mib():,.0f} at most", flush=True)


def peak_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


# --- TensorBoard's ------------------------------------------------------------------------------------------


def write_events(columns: Columns, folder: Path) -> None:
    """The metrics as a TensorBoard event file: an event a step, as TensorFlow's record format has it."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: columns.column(name)[1].astype("<f4") for name in columns.names}
    steps = columns.steps
    with (folder / "events.out.tfevents.0000000000.big").open("wb") as file:
        version = np.frombuffer(b"\x09" + struct.pack("<d", 0.0) + b"\x1a\x0dbrain.Event:2", np.uint8)
        file.write(records(version[None]))
        for digits in range(1, 5):  # steps whose varint has so many bytes are alike but for their numbers
            places = np.flatnonzero((steps >= 128 ** (digits - 1) * (digits > 1)) & (steps < 128**digits))
            for block in np.array_split(places, max(len(places) // 20_000, 1)):
                if len(block):
                    file.write(records(events(steps[block], digits, {n: v[block] for n, v in told.items()})))


def events(steps: np.ndarray, digits: int, values: dict[str, np.ndarray]) -> np.ndarray:
    """Serialised Event protocol buffers with a scalar summary each, [steps, bytes]."""
    parts = [np.tile(np.frombuffer(b"\x09", np.uint8), (len(steps), 1))]
    parts += [(1.7e9 + steps.astype("<f8")).view(np.uint8).reshape(-1, 8)]
    shifted = [(steps >> 7 * place) & 127 | (128 if place + 1 < digits else 0) for place in range(digits)]
    parts += [np.full((len(steps), 1), 0x10, np.uint8), np.stack(shifted, 1).astype(np.uint8)]
    summary = []
    for name, column in values.items():
        tag = name.encode()
        value = b"\x0a" + bytes([len(tag)]) + tag + b"\x15"
        head = b"\x0a" + bytes([len(value) + 4]) + value
        summary += [np.tile(np.frombuffer(head, np.uint8), (len(steps), 1)), column.view(np.uint8).reshape(-1, 4)]
    size = sum(part.shape[1] for part in summary)
    length = bytes([size & 127 | 128, size >> 7]) if size > 127 else bytes([size])
    parts += [np.tile(np.frombuffer(b"\x2a" + length, np.uint8), (len(steps), 1)), *summary]
    return np.concatenate(parts, 1)


def records(rows: np.ndarray) -> bytes:
    """Rows as TensorFlow records: length, its masked CRC-32C, the data, theirs."""
    length = np.tile(np.frombuffer(struct.pack("<Q", rows.shape[1]), np.uint8), (len(rows), 1))
    return np.concatenate([length, masked(length), rows, masked(rows)], 1).tobytes()


def masked(rows: np.ndarray) -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    sums = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        sums = table[(sums ^ column) & 255] ^ (sums >> 8)
    sums = ~sums
    told = ((sums >> 15) | (sums << 17)) + np.uint32(0xA282EAD8)
    return told.astype("<u4").view(np.uint8).reshape(-1, 4)


@contextmanager
def tensorboard(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """Its server, over a folder of event files."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--port",
        str(port),
        "--load_fast=auto",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield psutil.Process(server.pid), f"http://127.0.0.1:{port}/data/plugin/timeseries/timeSeries"
    finally:
        server.terminate()
        server.wait(30)


def ask(url: str, names: list[str]) -> list[dict]:
    requests = [{"plugin": "scalars", "tag": name} for name in names]
    data = urllib.parse.urlencode({"requests": json.dumps(requests)}).encode()
    with urllib.request.urlopen(url, data, timeout=120) as answer:
        return json.load(answer)


def compare(folder: Path, columns: Columns) -> None:
    names, last = columns.names, int(columns.steps[-1])
    begun = time.perf_counter()
    with tensorboard(folder) as (process, url):
        while time.perf_counter() - begun < PATIENCE_SECONDS:
            with suppress(OSError, ValueError):
                answers = ask(url, names)
                ends = [max(point["step"] for point in one["runToSeries"]["big"]) for one in answers
                        if one.get("runToSeries")]  # fmt: skip
                if len(ends) == len(names) and min(ends) == last:
                    break
            time.sleep(0.5)
        else:
            print("TensorBoard did not reach the last step")
        print(f"TensorBoard, cold: {time.perf_counter() - begun:.1f} s", flush=True)
        warm = min(timed("again", lambda: ask(url, names)) for _ in range(TURNS))
        print(f"TensorBoard, warm: {warm:.3f} s; {mib(process):,.0f} MiB in use")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--without-tensorboard", action="store_true")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.read:
        read(chosen.read)
        return
    run = Run(storage.join(str(chosen.folder), "big"))
    if not run.exists():
        timed("the run, written", lambda: big_run.make(str(chosen.folder), chosen.share))
    print("The page's server:", flush=True)
    subprocess.run([sys.executable, __file__, str(chosen.folder), "--read", run.uri], check=True, env=dict(os.environ))
    if chosen.without_tensorboard:
        return
    columns = Columns(run.stage("policy").metrics)
    columns.update()
    written = chosen.folder / "tensorboard"
    if not written.exists():
        timed("event file, written", lambda: write_events(columns, written / "big"))
    compare(written, columns)


if __name__ == "__main__":
    main()
