"""What encryption costs: a checkpoint to a local disk and back beside the same in clear, and one tensor of an artifact.

python benchmarks/storage.py FOLDER [--bytes 2e9] [--tensor 3e7] [--turns 3]

- *save*: from the first byte until the checkpoint is committed; *load*: verified against its marker, then read.
- Memory is the most that the process had more during that than before. Each measurement has a process of its own, clear
  and encrypted in turn; told is the median. What is loaded was written just before, so it comes from the page cache.
- *one tensor*: the bytes that are read from the disk for one tensor in the middle of a safetensors file, by the offsets
  in its header, over those that it has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from postlude import storage
from postlude.model import checkpoint_reader
from postlude.storage import keys, rules
from postlude.training.checkpoint import _Writer

TENSOR_BYTES = 2**26


def tensors(size_bytes: int) -> dict[str, torch.Tensor]:
    count = max(1, size_bytes // TENSOR_BYTES)
    return {f"layers.{number}": torch.randn(size_bytes // count // 4) for number in range(count)}


def memory_bytes(what: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))


def save(uri: str, state: dict[str, torch.Tensor]) -> None:
    storage.begin(uri)
    writer = _Writer(uri)
    dcp.save(state, storage_writer=writer, no_dist=True)
    storage.commit(uri, writer.files.digests, {"step": 1})


def load(uri: str, state: dict[str, torch.Tensor]) -> None:
    storage.verify(uri)
    checkpoint_reader.load(uri, state, alone=True)


def measure(act: str, uri: str, size_bytes: int) -> dict[str, float]:
    """Seconds and bytes of memory of one act in this process."""
    state = tensors(size_bytes)
    if act == "load":
        state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    save(f"{uri}-small", tensors(2**20))  # what is made once in a process
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = memory_bytes("VmRSS"), time.perf_counter()
    (save if act == "save" else load)(uri, state)
    return {"seconds": time.perf_counter() - begun, "memory": memory_bytes("VmHWM") - before}


def read_one_tensor(folder: str, size_bytes: int, tensor_bytes: int) -> float:
    """The bytes read for one tensor of an encrypted artifact over those that it has."""
    state = {f"layers.{number}": torch.randn(tensor_bytes // 4) for number in range(max(3, size_bytes // tensor_bytes))}
    uri = f"{folder}/model"
    with storage.new_folder(uri) as work:
        save_file(state, f"{work}/model.safetensors")
    place = f"{uri}/model.safetensors"
    length = int.from_bytes(storage.read_range(place, 0, 8), "little")
    header = json.loads(storage.read_range(place, 8, length))
    name = sorted(state)[len(state) // 2]
    begin, end = header[name]["data_offsets"]

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    empty = read_so_far() - read_so_far()
    before = read_so_far()
    content = storage.read_range(place, 8 + length + begin, end - begin)
    took = read_so_far() - before + empty
    assert torch.equal(torch.frombuffer(bytearray(content), dtype=torch.float32), state[name])
    return took / (end - begin)


def use_key(folder: str) -> None:
    """Have what stands below FOLDER/encrypted be so."""
    path = Path(folder, "master.key")
    if not path.exists():
        keys.new_key_file(str(path))
    rules.use([rules.Rule(prefix=f"{folder}/encrypted", encrypt=rules.Encryption(key=f"file:{path}"))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--bytes", type=float, default=2e9)
    parser.add_argument("--tensor", type=float, default=3e7)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("ACT", "URI"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder, size = str(Path(given.folder).absolute()), int(given.bytes)
    Path(folder).mkdir(parents=True, exist_ok=True)
    use_key(folder)
    if given.one:
        print(json.dumps(measure(*given.one, size)))
        return
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(given.turns):
        for act in ("save", "load"):
            for kind in ("clear", "encrypted"):
                command = [
                    sys.executable,
                    __file__,
                    folder,
                    "--bytes",
                    str(size),
                    "--one",
                    act,
                    f"{folder}/{kind}/step-1",
                ]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results.setdefault((act, kind), []).append(json.loads(output.splitlines()[-1]))
    for act in ("save", "load"):
        seconds, memory = (
            [statistics.median(one[what] for one in results[act, kind]) for kind in ("clear", "encrypted")]
            for what in ("seconds", "memory")
        )
        print(
            f"{act}: {size / 1e9:.2f} GB, clear {seconds[0]:.2f} s, encrypted {seconds[1]:.2f} s, "
            f"{seconds[1] / seconds[0]:.3f} times; memory {(memory[1] - memory[0]) / 2**20:+.0f} MiB"
        )
    share = read_one_tensor(f"{folder}/encrypted", size, int(given.tensor))
    print(f"one tensor of {given.tensor / 1e6:.0f} MB: {share:.4f} times its bytes")


if __name__ == "__main__":
    main()
