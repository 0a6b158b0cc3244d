"""Models that ranks hold together, as the ranks of a test run them: one process group works on every model in turn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 150,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama own head": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3 tied": {"tie_word_embeddings": True},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 20, "tie_word_embeddings": False},
    "gemma3_text tied": {**SLIDING, "query_pre_attn_scalar": 20, "final_logit_softcapping": 5.0, "pad_token_id": 0},
    "mistral": {},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "smollm3 tied": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "norm_topk_prob": True},
    "gpt_oss": {**SLIDING, "num_experts_per_tok": 2, "num_local_experts": 4},
}
BLOCK = 48


@dataclass(frozen=True)
class Mesh:
    """What the ranks of a mesh are told."""

    folder: str
    """Of the checkpoints, by name."""
    names: tuple[str, ...]
    tensor: int = 1
    replicas: int = 1
    adapter: dict[str, Any] | None = None
    """To train that alone, on a frozen base."""


def write_checkpoints(folder: Path, names: tuple[str, ...]) -> None:
    """A model with random weights for each name, as transformers writes them; none of them starts at zero or one. One
    with an own head has it in its files, and its configuration says that it has none."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in names:
        architecture = name.split()[0]
        tied = {"tie_word_embeddings": False} | ARCHITECTURES[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**SIZES, **tied}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)
        if name.endswith("own head"):
            file = folder / name / "model.safetensors"
            tensors = load_file(file)
            head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
            save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})


def batches(share: int, shares: int):
    """This share of the four blocks of every step: documents of random tokens, most of them trained."""
    from postlude.data.batch import collate
    from postlude.data.document import Document, Unit

    rng = np.random.default_rng(0)
    blocks = []
    for block in range(4):
        units = []
        for number in range(4):
            length = int(rng.integers(3, 12))
            weight = (rng.random(length) < 0.7).astype(np.float32)
            document = Document(f"{block}:{number}", "made", rng.integers(0, 150, length), {"weight": weight})
            units.append(Unit((document,)))
        blocks.append(tuple(units))
    return [collate([block]) for block in blocks[share::shares]]


def on_mesh(task: Mesh) -> dict[str, dict[str, Any]]:
    """What each model does on the mesh: its loss and gradients, weights after steps of SGD, losses of AdamW."""
    from postlude.manifest.compute import Shape
    from postlude.training.workers import Workers

    def shape(world: int):
        return Shape.of(world, task.tensor, task.replicas)

    workers = Workers.join(shape=shape)
    try:
        return {name: measured(Path(task.folder, name), workers, task.adapter) for name in task.names}
    finally:
        workers.leave()


def alone(folder: Path, names: tuple[str, ...], adapter: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The same in this process."""
    from postlude.training.workers import Workers

    return {name: measured(folder / name, Workers(), adapter) for name in names}


def model_of(place: Path, workers, adapter: dict[str, Any] | None = None):
    import torch

    from postlude.manifest.adapter import Adapter
    from postlude.manifest.schema import ModelFrom
    from postlude.model.attached import AdapterRequest
    from postlude.model.load import load_divided, load_model

    start = ModelFrom(path=str(place))
    asked = (
        None if adapter is None else AdapterRequest(Adapter.model_validate(adapter), 1, lambda stored: torch.float32)
    )
    if workers.mesh is None:
        return load_model(start, str(place), None, seed=0, adapter=asked)
    return load_divided(start, str(place), None, seed=0, mesh=workers.mesh, device=workers.device, adapter=asked)


def executor_of(model, workers, optimizer):
    from postlude.objectives.nll import NegativeLogLikelihood
    from postlude.training.meters import Phases
    from postlude.training.precision import Precision
    from postlude.training.program import Program, Role
    from postlude.training.step import Executor

    model.make_trainable(True)
    model.train()
    program = Program(NegativeLogLikelihood().build(), {"policy": Role(model, optimizer)})
    return Executor(program, workers, Precision("fp32", "a test"), Phases(), lambda batch: 0.0)


def whole(tensor) -> np.ndarray:
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy().copy()


def measured(place: Path, workers, adapter: dict[str, Any] | None = None) -> dict[str, Any]:
    from postlude.model.verify import verify
    from postlude.training.optimizers import SGD, AdamW
    from postlude.training.precision import LossScale, Precision

    found: dict[str, Any] = {}
    scale = LossScale(Precision("fp32", "a test"))
    work = batches(workers.data_rank, workers.data_world)
    for kind in (SGD(lr=0.05), AdamW(lr=1e-3)):
        model = model_of(place, workers, adapter)
        executor = executor_of(model, workers, kind)
        (optimizer,) = kind.build([(n, p) for n, p in model.named_parameters() if p.requires_grad])
        if isinstance(kind, AdamW):
            found["verified"] = verify(model).same
        losses = []
        for step in range(3):
            result = executor.forward_backward(work, scale)
            losses.append(result.loss)
            if isinstance(kind, SGD) and step == (0 if adapter is None else 2):  # at first B is zero, and A has none
                found["norm"] = result.grad_norms["policy"]
                found["gradients"] = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
        found[f"losses of {type(kind).__name__}"] = losses
        if isinstance(kind, SGD):
            found["answers as handed over"] = answers_as_handed_over(model, workers)
            found["weights"] = {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}
    return found


def answers_as_handed_over(model, workers) -> bool:
    """Whether what engines are given is the model: transformers finds the same tokens as likely with it."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM

    from postlude.data.batch import collate
    from postlude.data.document import Document, Unit
    from postlude.rollout.serving.weight_transfer import write_for_engines

    ids = np.random.default_rng(1).integers(0, model.vocabulary, 12)
    with tempfile.TemporaryDirectory() as folder:
        write_for_engines(model, Path(folder), torch.float32, workers)
        workers.barrier()
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        workers.barrier()  # the others link to the files of the first
    model.eval()
    with torch.no_grad():
        ours = model.logits(model.hidden(collate([(Unit((Document("one", "made", ids),)),)])))
        theirs = read(torch.from_numpy(ids)[None]).logits[0]
    model.train()
    model.release()
    return torch.allclose(ours, theirs, atol=1e-4)


# --- whole stages ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageOnMesh:
    """A stage of a run for the ranks to work on; ``pause`` leaves it at its first checkpoint, ``dies`` kills the
    leading rank when it has written some tensors of the artifact."""

    tree: dict[str, Any]
    run: str
    parallel: dict[str, Any]
    pause: bool = False
    dies: bool = False


def work_on_stage(task: StageOnMesh) -> int:
    """Work on the stage ``tune`` of a run, from where it is."""
    import copy

    from postlude.stages.stage import run_stage
    from postlude.stages.task import StageTask
    from postlude.telemetry.progress import StageProgress
    from postlude.training.interruption import Interruption

    tree = copy.deepcopy(task.tree)
    tree["stages"]["tune"]["parallel"].update(task.parallel)
    stop = Interruption()
    if task.pause:
        stop.request(at_checkpoint=True)
    if task.dies:
        _die_while_writing(3)
    with StageProgress("tune") as display:
        return run_stage(StageTask(tree, "tune", task.run, 1), stop, display).steps


def _die_while_writing(tensors: int) -> None:
    """Let this process be killed when it has written so many tensors."""
    import os
    import signal

    from postlude.model.sharded_export import WeightFiles

    written = []
    add = WeightFiles.add

    def last(files, name, tensor):
        add(files, name, tensor)
        written.append(name)
        if len(written) == tensors:
            os.kill(os.getpid(), signal.SIGKILL)

    WeightFiles.add = last


@dataclass(frozen=True)
class Overflow:
    """Training in fp16 on a mesh, with a gradient that overflows on one rank in one step."""

    folder: str
    name: str
    rank: int
    step: int
    tensor: int = 1


def train_with_overflow(task: Overflow) -> list[dict[str, Any]]:
    """The metrics of five steps on this rank."""
    from postlude_example.harness import Lines, Units, made_units

    from postlude.data.document import define_stream
    from postlude.data.loader import Loader
    from postlude.manifest.compute import Shape
    from postlude.objectives.nll import NegativeLogLikelihood
    from postlude.recipes.sft import SFT
    from postlude.training.meters import Meters
    from postlude.training.precision import Precision
    from postlude.training.program import Program, Role
    from postlude.training.trainer import Trainer
    from postlude.training.workers import Workers

    class AllLines(Lines):
        COMPARED = ("loss", "grad_norm", "skipped", "loss_scale")

    define_stream("return", "float32")
    workers = Workers.join(shape=lambda world: Shape.of(world, task.tensor, 1))
    try:
        model = model_of(Path(task.folder, task.name), workers)
        config = SFT.model_validate(
            {
                "recipe": "sft",
                "model": {"path": "x"},
                "data": {"units": 1.0},
                "steps": 5,
                "batch": {"tokens": 128, "block": 64},
                "optimizer": {"name": "sgd", "lr": 0.01},
                "schedule": "constant",
            }
        )
        precision = Precision("fp16", "a test")
        journal = AllLines()
        loader = Loader(
            {"units": Units(made_units(False))},
            {"units": 1.0},
            seed=0,
            block=64,
            blocks_per_step=2,
            window=64,
            epochs=None,
            steps=5,
            rank=workers.data_rank,
            world=workers.data_world,
        )
        trainer = Trainer(
            config,
            Program(NegativeLogLikelihood().build(), {"policy": Role(model.requires_grad_(True), config.optimizer)}),
            loader,
            workers,
            seed=0,
            precision=precision,
            journal=journal,
            meters=Meters(None, workers, precision, 1),
        )

        def overflow(module, outgoing):
            struck = workers.rank == task.rank and trainer.step == task.step - 1
            return (outgoing[0] * float("inf"),) if struck else outgoing

        model.causal.model.layers[1].mlp.register_full_backward_pre_hook(overflow)
        trainer.fit()
        return journal.lines
    finally:
        workers.leave()


@dataclass(frozen=True)
class Growing:
    """A model with new tokens for the ranks to load."""

    place: str
    tokens: Any
    tensor: int


def grown_rows(task: Growing) -> dict[str, np.ndarray]:
    """The rows of embedding and head, gathered."""
    from postlude.manifest.compute import Shape
    from postlude.manifest.schema import ModelFrom
    from postlude.model.load import load_divided
    from postlude.training.workers import Workers

    workers = Workers.join(shape=lambda world: Shape.of(world, task.tensor, 1))
    try:
        told = {"seed": 0, "mesh": workers.mesh, "device": workers.device, "new_tokens": task.tokens}
        model = load_divided(ModelFrom(path=task.place), task.place, None, **told)
        return {
            "embed_tokens": whole(model.causal.get_input_embeddings().weight),
            "lm_head": whole(model.causal.get_output_embeddings().weight),
        }
    finally:
        workers.leave()
