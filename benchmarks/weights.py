"""How long an external engine takes to have the policy's newest weights: native and vLLM.

    python benchmarks/weights.py [--engine native]

A Llama of 83M parameters, fp32. A policy writes its weights into shared memory, and the engine reads them, or is sent
them over the network (here: to this machine), or is given an adapter alone. Told are the medians of both over a few
updates, and the bytes a second of the two together. vLLM is measured where `make vllm` has made its environment.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from postlude.errors import ComputeError
from postlude.manifest.adapter import Adapter
from postlude.manifest.component import lookup
from postlude.manifest.schema import ModelFrom, NewModel
from postlude.model.attached import AdapterRequest
from postlude.model.export import write_weights
from postlude.model.language_model import LanguageModel
from postlude.model.load import load_model
from postlude.rollout.engine import Request, Sampling
from postlude.rollout.serving.server import SHARED_MEMORY, Server, Serving
from postlude.rollout.serving.weight_transfer import write_for_engines
from postlude.training.workers import Workers

SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "vocab_size": 16384,
    "tie_word_embeddings": True,
}
RANK = 16
UPDATES = 7
PROMPT = (1, 2, 3)


def new_policy(adapter: Adapter | None = None) -> LanguageModel:
    asked = None if adapter is None else AdapterRequest(adapter, 1, lambda stored: torch.float32)
    return load_model(ModelFrom(new=NewModel(architecture="llama", config=SHAPE)), None, None, seed=1, adapter=asked)


def measure(server: Server, policy: LanguageModel, alone: bool = False) -> list[float]:
    """Median seconds to write the weights, and to have them taken over."""
    written, taken = [], []
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as room:
        before = None
        for version in range(UPDATES):
            folder = Path(room) / f"version-{version}"
            folder.mkdir()
            begin = time.perf_counter()
            write_for_engines(policy, folder, torch.float32, Workers(), alone, before)
            middle = time.perf_counter()
            if version:
                server.update(folder, version)
                written.append(middle - begin)
                taken.append(time.perf_counter() - middle)
            else:
                server.start(Path(room), folder, version)
            server.generate([Request("one", PROMPT)], Sampling(4, frozenset()))
            before = folder
        server.kill()
    return [statistics.median(written), statistics.median(taken)]


def measured(name: str, size: int) -> dict[str, list[float]]:
    """The medians of each way in which an engine is given weights. ComputeError if there is no such engine."""
    choice: Any = lookup("engines", name)
    serving = Serving(256, 8, size, "float32", 600.0)
    choice().check()
    found = {name: measure(choice().server(serving), new_policy())}
    if name == "vllm":
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as room:
            write_weights(new_policy(), room, torch.float32)
            server = choice().server(serving)
            server.start(Path(room), Path(room), 0)
            sent = choice(addresses=[server.address], network=True).server(serving)
            found["vllm, over the network"] = measure(sent, new_policy())
            server.kill()
        alone = choice().server(replace(serving, adapter_rank=RANK))
        found[f"vllm, an adapter of rank {RANK}"] = measure(alone, new_policy(Adapter(rank=RANK)), alone=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["native", "vllm"])
    asked = parser.parse_args()
    size = 4 * sum(parameter.numel() for parameter in new_policy().parameters())
    table = Table(title=f"A weight update of {size / 2**20:,.0f} MiB")
    for column in ("engine", "written in", "taken over in", "GiB/s"):
        table.add_column(column, justify="right")
    for name in [asked.engine] if asked.engine else ["native", "vllm"]:
        try:
            for way, (write, take) in measured(name, size).items():
                table.add_row(way, f"{write:.2f} s", f"{take:.2f} s", f"{size / (write + take) / 2**30:.2f}")
        except ComputeError as error:
            print(f"{name} is left out: {error}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
