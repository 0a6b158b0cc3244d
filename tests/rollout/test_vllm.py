"""vLLM as an engine: the log-probabilities of the policy, over updates in the midst of requests, and a whole stage."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from postlude.errors import ComputeError
from postlude.manifest.adapter import Adapter
from postlude.manifest.schema import ModelFrom, NewModel
from postlude.model.attached import AdapterRequest
from postlude.model.language_model import LanguageModel
from postlude.model.load import load_model
from postlude.rollout.engine import Completion, Enough, Request, Sampling
from postlude.rollout.engines.vllm import Vllm
from postlude.rollout.serving import sender
from postlude.rollout.serving.external import ExternalEngine, Slot
from postlude.rollout.serving.server import Serving
from postlude.rollout.serving.vllm import VllmServer
from postlude.rollout.serving.vllm_client import VllmClient
from postlude.rollout.serving.weight_transfer import WeightTransfer, write_for_engines
from postlude.training.workers import Workers

SHAPE = {
    "max_position_embeddings": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PROMPTS = [[1, 403, 407, 261], [1, 317], [1, 291, 400, 313, 259, 390, 262, 401, 5], [1, 385]]
SERVING = Serving(context=4096, weights=10**6, concurrency=16, dtype="float32", seconds=120.0)


@pytest.fixture(scope="module")
def policy() -> LanguageModel:
    config = {**SHAPE, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
    return load_model(ModelFrom(new=NewModel(architecture="llama", config=config)), None, None, seed=1)


class Vllms(ExternalEngine):
    """Servers of vLLM, one after the other, that are given the policy's weights."""

    def __init__(self, choice: Vllm, serving: Serving, policy: LanguageModel) -> None:
        self.servers: list[VllmServer] = []
        """Those that were made; the last is at work."""

        def write(folder: Path, before: Path | None) -> None:
            write_for_engines(policy, folder, torch.float32, Workers(), serving.adapter_rank > 0, before)

        def make() -> VllmServer:
            self.servers.append(choice.server(serving))
            return self.servers[-1]

        self.transfer = WeightTransfer(write, lambda: choice.weights_folder(serving.weights))
        super().__init__([Slot("vllm", make, self.transfer)], self.transfer, serving.context, choice.updates_in_flight)


@pytest.fixture(scope="module")
def engine(vllm, policy) -> Iterator[Vllms]:
    engine = Vllms(vllm, SERVING, policy)
    engine.update(0)
    yield engine
    engine.close()


def requests(samples: int = 4) -> list[Request]:
    return [Request(str(i), tuple(ids), sample) for i, ids in enumerate(PROMPTS) for sample in range(samples)]


@torch.no_grad()
def gaps(policy: LanguageModel, made: Completion, temperature: float) -> torch.Tensor:
    """How far each log-probability is from the policy's."""
    ids = torch.tensor([[*made.request.tokens, *made.tokens]])
    with policy.plain():
        rows = (policy.causal(ids).logits[0] / temperature).log_softmax(-1)
    start = len(made.request.tokens)
    wanted = rows[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
    return (wanted - torch.tensor(made.log_probabilities)).abs()


@pytest.mark.long
def test_of_a_vanishing_share_of_probability_only_the_likeliest_token_is_left(engine):
    likeliest = engine.generate(requests(1), Sampling(16, frozenset([2]), 0.0))
    drawn = engine.generate(requests(1), Sampling(16, frozenset([2]), 1.0, top_p=1e-6, seed=9))
    assert [completion.tokens for completion in drawn] == [completion.tokens for completion in likeliest]


def move(policy: LanguageModel) -> None:
    """Other weights, far enough from the others that nobody takes one for the other."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.long
@pytest.mark.capability("Rollouts by vLLM")
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_log_probabilities_are_the_policys(engine, policy, temperature):
    sampling = Sampling(24, frozenset([2, *range(20)]), temperature, seed=4)
    made = engine.generate(requests(), sampling)
    assert [one.request for one in made] == requests()
    assert max(gaps(policy, one, temperature or 1.0).max() for one in made) < 1e-4
    assert {one.ended for one in made} <= {"stop", "length"}
    for one in made:
        assert (one.tokens[-1] in sampling.stop_ids) == (one.ended == "stop")
        assert not set(one.tokens[:-1]) & sampling.stop_ids
        assert one.versions == (one.versions[0],) * len(one.tokens)
    assert engine.generate(requests()[::-1], sampling)[::-1] == made


@pytest.mark.long
@pytest.mark.capability("Weights reach vLLM in the midst of requests, with a version for each token")
def test_requests_go_on_over_an_update(engine, policy):
    before = copy.deepcopy(policy)
    sampling = Sampling(300, frozenset(), temperature=0.9, seed=5)
    begin = time.perf_counter()
    engine.generate(requests(), sampling)
    takes = time.perf_counter() - begin
    for version, share in enumerate([0.4, 0.1, 0.2, 0.3, 0.5, 0.05] * 5, 1):
        before.load_state_dict(policy.state_dict())
        made: list[Completion] = []
        work = threading.Thread(target=lambda made=made: made.extend(engine.generate(requests(), sampling)))
        work.start()
        time.sleep(share * takes)
        move(policy)
        engine.update(version)
        work.join()
        assert len(made) == len(requests())
        for one in made:
            assert len(one.tokens) == 300
            old = torch.tensor([told == version - 1 for told in one.versions])
            assert all(told in (version - 1, version) for told in one.versions)
            assert old.tolist() == sorted(old.tolist(), reverse=True)
            assert not old.any() or gaps(before, one, 0.9)[old].max() < 1e-4
            assert old.all() or gaps(policy, one, 0.9)[~old].max() < 1e-4
        if any(len(set(one.versions)) == 2 for one in made):
            return
    pytest.fail("no update has met a request in its midst")


@pytest.mark.long
@pytest.mark.capability("A vLLM server that runs already, at an address")
def test_a_server_that_runs_already_takes_weights_through_a_folder(engine, policy, tmp_path):
    engine.generate(requests(1), Sampling(1, frozenset()))
    address = engine.servers[-1].address
    move(policy)
    other = Vllms(Vllm(addresses=[address], exchange=str(tmp_path)), SERVING, policy)
    other.update(30)
    made = other.generate(requests(), Sampling(24, frozenset(), seed=4))
    assert max(gaps(policy, one, 1.0).max() for one in made) < 1e-4
    assert all(set(one.versions) == {30} for one in made)
    other.close()
    assert not list(tmp_path.iterdir())
    assert engine.generate(requests(1), Sampling(1, frozenset()))  # the server is still there


@pytest.mark.long
@pytest.mark.capability("Weights are sent to a vLLM server over the network")
def test_a_server_that_sees_no_folder_is_sent_the_weights(engine, policy, tmp_path, monkeypatch):
    """In packs: of several tensors, and of a single one that is larger than a pack."""
    monkeypatch.setattr(sender, "PACK_BYTES", 100_000)
    engine.generate(requests(1), Sampling(1, frozenset()))
    choice = Vllm(addresses=[engine.servers[-1].address], network=True)
    choice.check()
    other = Vllms(choice, SERVING, policy)
    for version in (50, 51):
        move(policy)
        other.update(version)
        assert len(sender.pack(other.transfer.room / f"version-{version}")) > 2
        made = other.generate(requests(), Sampling(24, frozenset(), seed=4))
        assert max(gaps(policy, one, 1.0).max() for one in made) < 1e-4
        assert all(set(one.versions) == {version} for one in made)
    other.close()


@pytest.mark.long
def test_a_server_sleeps_while_nothing_is_asked(engine, policy, monkeypatch):
    """On a CPU it has nothing to give back: that it is told, and answers afterwards, is what there is to see."""
    engine.generate(requests(1), Sampling(1, frozenset()))
    monkeypatch.setattr(engine.servers[-1], "sleeps", True)
    client = VllmClient(engine.servers[-1].address)

    def is_asleep() -> bool:
        return client.call("GET", "/is_sleeping")["is_sleeping"]

    for version in (60, 61):
        assert engine.generate(requests(1), Sampling(2, frozenset()))
        assert is_asleep()
        move(policy)
        engine.update(version)
        assert not is_asleep()
        made = engine.generate(requests(), Sampling(8, frozenset(), seed=2))
        assert max(gaps(policy, one, 1.0).max() for one in made) < 1e-4
    monkeypatch.undo()
    engine.update(62)
    assert not is_asleep()
    assert not engine.deaths()


@pytest.mark.long
def test_more_prompts_than_a_step_computes_are_answered(engine, policy):
    """On a CPU vLLM ends where the last of them is read in two steps."""
    long = [Request(str(number), tuple(range(20, 320)), number) for number in range(16)]
    made = engine.generate(long, Sampling(4, frozenset(), seed=9))
    assert max(gaps(policy, one, 1.0).max() for one in made) < 1e-4
    assert not engine.deaths()


@pytest.mark.long
def test_what_is_not_needed_is_cut_where_it_is(engine, policy):
    """Two prompts of four are needed, whose completions are short; the others are long. A busy machine may stop this
    process for so long that nothing is left to be cut; not every time."""
    asked = [replace(one, limit=4 if place < 8 else None) for place, one in enumerate(requests())]
    bundles = tuple(tuple(range(4 * number, 4 * number + 4)) for number in range(4))
    for seed in range(8):
        sampling = Sampling(4000, frozenset(), temperature=0.9, seed=seed)
        made = engine.generate(asked, sampling, Enough(bundles, needed=2))
        if all(one.ended == "cut" and one.tokens for one in made[8:]):
            break
    assert [one.ended for one in made] == ["length"] * 8 + ["cut"] * 8
    assert any(one.tokens for one in made[8:])
    assert all(not one.tokens or gaps(policy, one, 0.9).max() < 1e-4 for one in made)
    going_on = [
        replace(one.request, tokens=one.request.tokens + one.tokens, position=len(one.tokens), limit=8)
        for one in made[8:]
    ]
    assert all(len(one.tokens) == 8 and one.ended == "length" for one in engine.generate(going_on, sampling))


@pytest.mark.long
def test_what_comes_late_to_the_server_is_cut_as_well(engine, monkeypatch):
    """The long request is on its way while the short one ends: the server does not know it when it is to be cut."""
    ask, cut, was_cut = VllmClient.generate, VllmClient.abort, threading.Event()

    def late(self, request, sampling, name):
        assert request.limit or was_cut.wait(60)
        return ask(self, request, sampling, name)

    def told(self, names):
        cut(self, names)
        was_cut.set()

    monkeypatch.setattr(VllmClient, "generate", late)
    monkeypatch.setattr(VllmClient, "abort", told)
    short, long = (replace(one, limit=limit) for one, limit in zip(requests(1), (4, None), strict=False))
    for seed in range(8):
        was_cut.clear()
        sampling = Sampling(4000, frozenset(), 0.9, seed=seed)
        made = engine.generate([short, long], sampling, Enough(((0,), (1,)), needed=1))
        if made[1].ended == "cut":
            break
    assert [one.ended for one in made] == ["length", "cut"]


@pytest.mark.long
def test_a_killed_server_is_replaced_with_the_newest_weights(engine, policy):
    move(policy)
    engine.update(70)
    sampling = Sampling(200, frozenset(), temperature=0.9, seed=6)
    calm = engine.generate(requests(), sampling)
    cores = [process for process in guarded() if "EngineCore" in " ".join(process.cmdline())]
    assert cores
    made: list[Completion] = []
    work = threading.Thread(target=lambda: made.extend(engine.generate(requests(), sampling)))
    work.start()
    time.sleep(0.1)
    for core in cores:
        core.kill()
    work.join()
    assert [one.tokens for one in made] == [one.tokens for one in calm]
    assert [one.tokens for one in engine.generate(requests(), sampling)] == [one.tokens for one in calm]
    assert max(gaps(policy, one, 0.9).max() for one in made) < 1e-4
    assert [death.engine for death in engine.deaths()] == ["vllm"]
    everyone = guarded()
    engine.close()
    _, alive = psutil.wait_procs(everyone, timeout=300)
    assert not alive


def guarded() -> list[psutil.Process]:
    """The guardians below this process, and the processes that they guard."""
    guardians = [child for child in psutil.Process().children() if "guardian.py" in " ".join(child.cmdline())]
    return guardians + [process for guardian in guardians for process in guardian.children(recursive=True)]


@pytest.mark.long
@pytest.mark.capability("vLLM is given an adapter by itself")
def test_an_adapter_reaches_vllm_by_itself_in_the_midst_of_requests(vllm):
    config = {**SHAPE, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
    start = ModelFrom(new=NewModel(architecture="llama", config=config))
    asked = AdapterRequest(Adapter(rank=12, targets=["attention", "mlp"]), 1, lambda stored: torch.float32)
    policy = load_model(start, None, None, seed=1, adapter=asked)
    assert vllm.takes_adapter(12, dora=False)
    engine = Vllms(vllm, replace(SERVING, adapter_rank=12), policy)
    try:
        move_adapter(policy)
        engine.update(0)
        for version, seed in enumerate((5, 6, 7), 1):
            before = copy.deepcopy(policy)
            sampling = Sampling(300, frozenset(), temperature=0.9, seed=seed)
            made: list[Completion] = []
            work = threading.Thread(target=lambda: made.extend(engine.generate(requests(), sampling)))  # noqa: B023
            work.start()
            time.sleep(0.5)
            move_adapter(policy)
            engine.update(version)
            work.join()
            assert len(made) == len(requests())
            for one in made:
                old = torch.tensor([told == version - 1 for told in one.versions])
                assert not old.any() or gaps(before, one, 0.9)[old].max() < 1e-4
                assert old.all() or gaps(policy, one, 0.9)[~old].max() < 1e-4
        [folder] = [one for one in engine.transfer.room.iterdir() if one.name.startswith("version-")]
        assert {file.name for file in (folder / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    finally:
        engine.close()


def move_adapter(policy: LanguageModel) -> None:
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_no_vllm_is_told_with_what_to_do(tmp_path):
    with pytest.raises(ComputeError, match="make vllm"):
        Vllm(python=str(tmp_path / "nowhere")).check()


def test_a_server_that_is_down_is_told(tmp_path):
    with pytest.raises(ComputeError, match="no vLLM server"):
        Vllm(addresses=["http://127.0.0.1:9"]).check()


def test_an_unknown_version_is_refused(monkeypatch):
    monkeypatch.setattr(VllmClient, "call", lambda self, method, path, *more: {"version": "0.99.1"})
    with pytest.raises(ComputeError, match=r"0\.99\.1"):
        VllmClient("http://127.0.0.1:9").check()
