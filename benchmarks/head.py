"""The fused head against full logits and against torch's own chunked loss, same machine, same inputs.

    python benchmarks/head.py [--quick]

Vocabulary 151,936, 2,048 tokens of which half are trained, two threads, forward and backward with the gradients
of hidden states and weight. The sides:

- ``full``: as transformers computes it: logits of every position, in fp32, and cross entropy with ignored targets.
- ``torch``: ``F.linear_cross_entropy`` at its best settings, once as one would call it (every position, ignored
  targets) and once with the untrained rows dropped by hand, as ours has them.
- ``ours``: the trained rows through :class:`postlude.objectives.head.FusedHead`.

Then eight such micro-batches: gradients added up by autograd, and in place by promise of the upstream factor.

Each measurement is a process of its own; the sides take turns, several rounds of them. Memory is the growth of the
peak resident set over one pass after the inputs are there; time is the median of the passes. Losses and gradients
of the hidden states are compared with float64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from postlude.objectives.head import FusedHead
from postlude.telemetry.hardware import peak_resident_bytes, reset_peak, resident_bytes

THREADS, IGNORED = 2, -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# --- the sides: the summed loss of the trained rows ---------------------------------------------------------


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), targets, ignore_index=IGNORED, reduction="sum")


def torch_all(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=256, acc_policy="accurate")
    return F.linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, reduction="sum", options=options)


def torch_dropped(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    rows = (targets != IGNORED).nonzero().squeeze(1)
    return torch_all(hidden.index_select(0, rows), weight, targets[rows])


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: float | None = None) -> Tensor:
    rows = (targets != IGNORED).nonzero().squeeze(1)
    head = FusedHead(weight, upstream=upstream)
    return head.negative_log_likelihood(hidden.index_select(0, rows), targets[rows], torch.ones(len(rows)))[0]


def ours_in_place(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ours(hidden, weight, targets, upstream=1.0)


def float64(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    wide, total = weight.detach().double(), torch.zeros((), dtype=torch.float64)
    for rows in (targets != IGNORED).nonzero().squeeze(1).split(64):
        loss = F.cross_entropy(hidden[rows].double() @ wide.t(), targets[rows], reduction="sum")
        loss.backward()
        total += loss.detach()
    return total.requires_grad_()


SIDES: dict[str, Loss] = {
    "full": full,
    "torch": torch_all,
    "torch, dropped": torch_dropped,
    "ours": ours,
    "ours, in place": ours_in_place,
    "float64": float64,
}

# --- one measurement, in a process of its own ---------------------------------------------------------------


def inputs(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weight that give logits of a trained model's spread (deviation 3), half the targets ignored."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=random).to(dtype)
    weight = torch.randn(vocabulary, width, generator=random).mul_(3 / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=random)
    targets[: tokens // 2] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets[torch.randperm(tokens, generator=random)]


def measure_here(case: dict) -> dict:
    torch.set_num_threads(THREADS)
    hidden, weight, targets = inputs(case["tokens"], case["vocabulary"], case["width"], DTYPES[case["dtype"]])
    loss_of, seconds, growth = SIDES[case["side"]], [], 0
    loss_of(*inputs(8, 64, 8, DTYPES[case["dtype"]])).backward()  # what a first call loads is not counted
    for repeat in range(case["repeats"]):
        hidden.grad = weight.grad = None
        reset_peak()
        base, begin, total = resident_bytes(), time.perf_counter(), 0.0
        for _ in range(case["micro_batches"]):
            loss = loss_of(hidden, weight, targets)
            loss.backward()
            total += float(loss.detach())
        seconds.append(time.perf_counter() - begin)
        growth = max(growth, peak_resident_bytes() - base if repeat == 0 else 0)
    torch.save(hidden.grad, case["gradient"])
    trained = int((targets != IGNORED).sum()) * case["micro_batches"]
    return {"seconds": statistics.median(seconds), "growth": growth, "loss": total / trained}


def measure(**case: object) -> dict:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(THREADS)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- the tables ---------------------------------------------------------------------------------------------


def compare(title: str, sides: list[str], to: str, rounds: int, folder: Path, **shape: object) -> Table:
    """Take turns among the sides; the table's ratios are ours (the last side) to each, errors those to float64."""
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            found[side].append(measure(side=side, gradient=str(folder / side), **shape))
    exact = measure(side="float64", gradient=str(folder / "exact"), **{**shape, "repeats": 1, "micro_batches": 1})
    gradient = torch.load(folder / "exact").double()
    table = Table(title=title)
    table.add_column("side")
    for column in ("MiB", "seconds", f"MiB to {to}", f"seconds to {to}", "loss error", "gradient error"):
        table.add_column(column, justify="right")

    def median(side: str, key: str) -> float:
        return statistics.median(run[key] for run in found[side])

    for side in sides:
        own = torch.load(folder / side).double() / shape["micro_batches"]
        table.add_row(
            side,
            f"{median(side, 'growth') / 2**20:,.0f}",
            f"{median(side, 'seconds'):.2f}",
            f"{median(side, 'growth') / median(to, 'growth'):.3f}",
            f"{median(side, 'seconds') / median(to, 'seconds'):.3f}",
            f"{abs(found[side][0]['loss'] - exact['loss']):.1e}",
            f"{float((own - gradient).norm() / gradient.norm()):.1e}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small vocabulary, one round")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    if arguments.case:
        print(json.dumps(measure_here(json.loads(arguments.case))))
        return
    quick = arguments.quick
    tokens, vocabulary = (512, 32768) if quick else (2048, 151936)
    shape = {"tokens": tokens, "vocabulary": vocabulary}
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as place:
        # A processor without bf16 products takes minutes for torch's bf16 passes, so there is one of each.
        for width, dtype, sides, rounds in (
            (256, "fp32", ["full", "torch", "torch, dropped", "ours"], 3),
            (1024, "fp32", ["torch", "torch, dropped", "ours"], 3),
            (256, "bf16", ["torch, dropped", "ours"], 1),
            (1024, "bf16", ["torch, dropped", "ours"], 1),
        ):
            case = {**shape, "width": width, "dtype": dtype, "micro_batches": 1, "repeats": 2 if rounds > 1 else 1}
            title = f"hidden {width}, {dtype}, {tokens:,} tokens, half of them trained"
            console.print(compare(title, sides, sides[0], 1 if quick else rounds, Path(place), **case))
        case = {**shape, "width": 256, "dtype": "fp32", "micro_batches": 8, "repeats": 1}
        sides = ["torch, dropped", "ours", "ours, in place"]
        title = f"hidden 256, fp32, 8 micro-batches of {tokens:,} tokens"
        console.print(compare(title, sides, sides[0], 1 if quick else 3, Path(place), **case))


if __name__ == "__main__":
    main()
