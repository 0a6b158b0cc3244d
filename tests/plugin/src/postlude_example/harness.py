"""A few steps of an objective through the unmodified trainer, as a rank runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Task:
    """How the work is split, and which objective runs."""

    ranks: int
    block: int
    micro: int
    objective: str = "nll"

    def of(self, objective: str) -> Task:
        return replace(self, objective=objective)


class Units:
    """A source of units that are there already, for the loader."""

    def __init__(self, units) -> None:
        from postlude.data.statistics import SourceStatistics

        self.items = units
        self.groups, self.files, self.seekable = [len(units)], [[0]], True
        self.statistics = SourceStatistics("units", len(units))

    def units(self, group, positions):
        return [(self.items[position],) for position in positions]


class Lines:
    """A journal that keeps what a test compares."""

    COMPARED = ("loss", "grad_norm", "grad_norm_critic", "margin", "value_error", "tokens", "trained_tokens")

    def __init__(self) -> None:
        self.lines = []

    def metrics(self, line):
        self.lines.append({key: line[key] for key in self.COMPARED if key in line})

    def examples(self, step, epoch, rows): ...

    def event(self, kind, **fields): ...

    def flush(self): ...


def made_units(pairs: bool):
    """24 units of random documents: pairs where asked for, single ones otherwise; each token has a return."""
    from postlude.data.document import Document, Unit

    rng = np.random.default_rng(0)

    def document(number: int):
        length = int(rng.integers(3, 16))
        weight = (rng.random(length) < 0.6).astype(np.float32)
        weight[-1] = 1.0
        streams = {"weight": weight, "return": rng.normal(size=length).astype(np.float32)}
        return Document(f"units:{number}", "units", rng.integers(0, 64, length), streams)

    return [Unit(tuple(document(2 * n + k) for k in range(2 if pairs else 1))) for n in range(24)]


def train_all(tasks):
    """The metrics of three steps of each task, one task after another by the same ranks."""
    from postlude.training.workers import Workers

    workers = Workers.join()
    try:
        return [train(task, workers) for task in tasks]
    finally:
        workers.leave()


def train(task: Task, workers):
    """Three steps; every rank returns the same lines of metrics."""
    from postlude.data.document import define_stream
    from postlude.data.loader import Loader
    from postlude.manifest.component import lookup
    from postlude.manifest.schema import ModelFrom, NewModel
    from postlude.model.load import load_model
    from postlude.recipes.sft import SFT
    from postlude.training.meters import Meters
    from postlude.training.precision import Precision
    from postlude.training.program import Program, Role
    from postlude.training.trainer import Trainer
    from postlude_example.pairwise import ActorCritic, Pairwise

    define_stream("return", "float32")
    config = SFT.model_validate(
        {
            "recipe": "sft",
            "model": {"new": {"architecture": "llama"}},
            "data": {"units": 1.0},
            "steps": 3,
            "batch": {"tokens": task.block * 4, "block": task.block, "micro": task.micro, "window": 64},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "schedule": "constant",
        }
    )
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    new = ModelFrom(new=NewModel(architecture="llama", config={**shape, "vocab_size": 64}))
    policy = Role(load_model(new, None, None, seed=1), config.optimizer)
    if task.objective == "actor_critic":
        critic = load_model(new, None, None, seed=2)
        critic.add_scalar_head()
        optimizer = lookup("optimizers", "sgd")(lr=0.05)
        program = Program(ActorCritic(), {"policy": policy, "critic": Role(critic, optimizer)})
    else:
        objective = Pairwise() if task.objective == "pairwise" else config.objective()
        program = Program(objective, {"policy": policy})
    precision = Precision("fp32", "a test")
    # One step is one pass over all the units, so that every split sees the same ones in a step.
    loader = Loader(
        {"units": Units(made_units(task.objective == "pairwise"))},
        {"units": 1.0},
        seed=0,
        block=task.block,
        blocks_per_step=1000,
        window=64,
        epochs=3,
        rank=workers.rank,
        world=workers.world,
    )
    journal = Lines()
    trainer = Trainer(
        config,
        program,
        loader,
        workers,
        seed=0,
        precision=precision,
        journal=journal,
        meters=Meters(None, workers, precision, 1),
    )
    trainer.fit()
    return journal.lines
