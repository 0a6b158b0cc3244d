"""A vLLM server as an engine: started here, in an environment of its own, since it wants its own torch; or running
already."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from postlude.rollout.engine import Completion, Enough, Request, Sampling
from postlude.rollout.serving.guardian import Process
from postlude.rollout.serving.server import ADAPTER, EngineDied, Serving
from postlude.rollout.serving.vllm_client import ADAPTED, START_SECONDS, VllmClient
from postlude.telemetry import openmp

Option = str | int | float | bool

BATCHED_TOKENS = 2048
"""That a step computes at least, where prompts are read whole."""
ABORT_SECONDS = 0.5
"""After so long requests are cut again: one that was still on its way when the others were is not known to the server
then, and it forgets that it was to be cut."""
MODEL = "policy"
"""What the server calls the weights without an adapter."""
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What can be said for the largest rank of an adapter."""
WITHIN = Path(__file__).with_name("within_vllm")
"""The folder of what runs in vLLM's own processes: a small class that takes what HTTP cannot bring, an adapter in the
place of the one before, and weights over the network."""


@dataclass(frozen=True)
class Launch:
    """How a server is started."""

    interpreter: str
    """Of the environment that vLLM is installed in."""
    options: Mapping[str, Option]
    """Further ones of its command line, without the dashes."""
    sleeps: bool
    """Whether it may give its memory of the GPU back."""


class VllmServer:
    """A server that runs already, or one that is started here. ``sleeps`` says whether it gives its memory of the GPU
    back after each answer."""

    def __init__(self, serving: Serving, how: VllmClient | Launch) -> None:
        self._serving = serving
        self._client = how if isinstance(how, VllmClient) else None
        self._launch = how if isinstance(how, Launch) else None
        self.sleeps = self._launch is not None and self._launch.sleeps
        self._is_asleep = False
        self._process: Process | None = None
        self._threads = ThreadPoolExecutor(serving.concurrency, thread_name_prefix="vllm")

    @property
    def address(self) -> str:
        """Where it answers."""
        return self._living().address

    def start(self, room: Path, folder: Path, version: int) -> None:
        if self._launch is None:
            self.update(folder, version)
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self._process = Process(room, self._command(self._launch, folder, port), self._environment())
        self._client = VllmClient(f"http://127.0.0.1:{port}", self._serving.seconds, self._serving.adapter_rank > 0)
        self._await()
        self._client.check()
        self._client.label(version)

    def update(self, folder: Path, version: int) -> None:
        self._awake().update(folder, version)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        completions = self._generate(self._awake(), requests, sampling, enough)
        if self.sleeps:
            self._living().sleep()
            self._is_asleep = True
        return completions

    def _generate(
        self, client: VllmClient, requests: Sequence[Request], sampling: Sampling, enough: Enough | None
    ) -> list[Completion]:
        over = threading.Event()
        call = uuid.uuid4().hex
        names = [f"{call}-{place}" for place in range(len(requests))]

        def complete(request: Request, name: str) -> Completion:
            return Completion(request, (), (), "cut") if over.is_set() else client.generate(request, sampling, name)

        futures = [self._threads.submit(complete, *both) for both in zip(requests, names, strict=True)]
        left = set(futures)
        while left:
            if over.is_set():
                client.abort([name for name, future in zip(names, futures, strict=True) if future in left])
                done, left = wait(left, ABORT_SECONDS)
            else:
                done, left = wait(left, return_when=FIRST_COMPLETED)
            errors = [error for future in done if (error := future.exception()) is not None]
            if errors:
                for future in left:
                    future.cancel()
                raise next((error for error in errors if not isinstance(error, EngineDied)), self._died(errors[0]))
            if enough is not None and not over.is_set():
                ended = {
                    place
                    for place, future in enumerate(futures)
                    if future not in left and future.result().ended != "cut"
                }
                if enough.reached(ended):
                    over.set()
        return [future.result() for future in futures]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _awake(self) -> VllmClient:
        client = self._living()
        if self._is_asleep:
            client.wake()
            self._is_asleep = False
        return client

    def _living(self) -> VllmClient:
        if self._process is not None and not self._process.alive:
            raise self._died(EngineDied("Its process is gone."))
        assert self._client is not None
        return self._client

    def _died(self, error: BaseException) -> EngineDied:
        words = "" if self._process is None else f" It said last:\n{self._process.last_words()}"
        return EngineDied(f"{error}{words}")

    def _await(self) -> None:
        """Return when the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                self._living().call("GET", "/health", seconds=5.0)
            except EngineDied:
                if self._process is not None and not self._process.alive:
                    raise
                time.sleep(0.5)
            else:
                return
        raise self._died(EngineDied(f"It has not come up within {START_SECONDS:g} seconds."))

    def _command(self, launch: Launch, folder: Path, port: int) -> list[str]:
        options: dict[str, Option] = {
            "model": str(folder),
            "served-model-name": MODEL,
            "host": "127.0.0.1",
            "port": port,
            "dtype": self._serving.dtype,
            "max-model-len": self._serving.context,
            "max-num-seqs": self._serving.concurrency,
            "worker-extension-cls": "postlude_within_vllm.TakesWeights",
            "logprobs-mode": "processed_logprobs",  # without it the temperature is not in them
            "skip-tokenizer-init": True,
            "enable-scale-out": True,
            "disable-uvicorn-access-log": True,
        }
        rank = self._serving.adapter_rank
        if rank:
            options |= {
                "enable-lora": True,
                "max-loras": 1,
                "max-lora-rank": next(known for known in ADAPTER_RANKS if known >= rank),
                "lora-modules": f"{ADAPTED}={folder / ADAPTER}",
            }
        if self._serving.gpus:
            options["enable-sleep-mode"] = launch.sleeps
        else:
            # vLLM on a CPU needs both; servers that others start are told in docs/online.md.
            most = max(self._serving.context, BATCHED_TOKENS)
            options |= {"no-enable-chunked-prefill": True, "max-num-batched-tokens": most}
        command = [launch.interpreter, "-m", "vllm.entrypoints.openai.api_server"]
        for name, value in {**options, **launch.options}.items():
            if value is True:
                command.append(f"--{name}")
            elif value is not False:
                command += [f"--{name}", str(value)]
        return command

    def _environment(self) -> dict[str, str]:
        of_our_interpreter = ("PYTHONPATH", "PYTHONHOME")
        given = {name: value for name, value in os.environ.items() if name not in of_our_interpreter}
        return {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **openmp.briefly(given),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "OMP_NUM_THREADS": str(self._serving.threads),
            "PYTHONPATH": str(WITHIN),
        }
