"""TensorBoard beside the page: its event file of a very large run, and how fast its server has the curves of that."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil

from postlude.runs.columns import Columns

TURNS = 5
PATIENCE_SECONDS = 500


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


def compare(folder: Path, columns: Columns) -> float:
    """Seconds until its server has every curve to the last step; a bound from below where that takes too long."""
    names, last = columns.names, int(columns.steps[-1])
    begun = time.perf_counter()
    with tensorboard(folder) as (process, url):
        reached = 0
        while reached < last and time.perf_counter() - begun < PATIENCE_SECONDS:
            time.sleep(0.5)
            with suppress(OSError, ValueError):
                runs = [one["runToSeries"]["big"] for one in ask(url, names) if one.get("runToSeries")]
                reached = min((max(point["step"] for point in run) for run in runs), default=0)
        cold = time.perf_counter() - begun
        memory = process.memory_info().rss + sum(each.memory_info().rss for each in process.children(recursive=True))
        print(f"TensorBoard, cold: {cold:.1f} s to step {reached:,} of {last:,}, {memory / 2**20:,.0f} MiB", flush=True)
        warm = []
        for _ in range(TURNS):
            asked = time.perf_counter()
            ask(url, names)
            warm.append(time.perf_counter() - asked)
        print(f"TensorBoard, warm, all curves of 1,000 points drawn by chance: {min(warm):.3f} s", flush=True)
    return cold
