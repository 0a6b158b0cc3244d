"""How long an engine that is apart takes to have the policy's newest weights: native and vLLM.

    python benchmarks/weights.py [--engine native]

A Llama of 83M parameters, fp32. A policy writes its weights into shared memory, and the engine reads them; told are
the medians of both over a few updates, and the bytes a second of the two together. vLLM is measured where `make vllm`
has made its environment.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from postlude.manifest.component import lookup
from postlude.manifest.errors import ComputeError
from postlude.manifest.schema import ModelFrom, NewModel
from postlude.model.export import write_weights
from postlude.model.language_model import LanguageModel
from postlude.model.load import load_model
from postlude.rollout.engine import Request, Sampling
from postlude.rollout.serving import SHARED_MEMORY, Serving

SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "vocab_size": 16384,
    "tie_word_embeddings": True,
}
UPDATES = 7
PROMPT = (1, 2, 3)


def measure(name: str, policy: LanguageModel, size: int) -> tuple[float, float]:
    """Median seconds to write the weights, and to have them taken over. ComputeError if there is no such engine."""
    choice = lookup("engines", name)()
    choice.check()  # type: ignore[attr-defined]
    server = choice.server(Serving(256, 8, size, "float32", 600.0))  # type: ignore[attr-defined]
    written, taken = [], []
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as room:
        try:
            for version in range(UPDATES):
                folder = Path(room) / f"version-{version}"
                folder.mkdir()
                begin = time.perf_counter()
                write_weights(policy, folder, torch.float32)
                middle = time.perf_counter()
                if version:
                    server.update(folder, version)
                    written.append(middle - begin)
                    taken.append(time.perf_counter() - middle)
                else:
                    server.start(Path(room), folder, version)
                server.generate([Request("one", PROMPT)], Sampling(4, frozenset()))
        finally:
            server.kill()
    return statistics.median(written), statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["native", "vllm"])
    asked = parser.parse_args()
    policy = load_model(ModelFrom(new=NewModel(architecture="llama", config=SHAPE)), None, None, seed=1)
    size = 4 * sum(parameter.numel() for parameter in policy.parameters())
    table = Table(title=f"A weight update of {size / 2**20:,.0f} MiB")
    for column in ("engine", "written in", "taken over in", "GiB/s"):
        table.add_column(column, justify="right")
    for name in [asked.engine] if asked.engine else ["native", "vllm"]:
        try:
            write, take = measure(name, policy, size)
        except ComputeError as error:
            print(f"{name} is left out: {error}")
            continue
        table.add_row(name, f"{write:.2f} s", f"{take:.2f} s", f"{size / (write + take) / 2**30:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
