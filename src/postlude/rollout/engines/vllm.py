"""The engine ``vllm``: a vLLM server, over HTTP. This file alone knows vLLM, but for what runs within it.

It lives in an environment of its own (``make vllm`` makes one), since it wants its own torch. Notable:

- Tokens go in and come out; nothing is tokenised on the way.
- While weights are taken over the requests in flight stand still, then go on; their keys and values are made anew.
  vLLM says itself which of their tokens came from which weights.
- Weights are handed over as safetensors in shared memory, which ``reload_weights`` reads, or sent over the network.
  ``load_weights`` called from a worker extension would leave a half-written model that goes on serving.
- A small class within vLLM's workers (``within_vllm``) takes what HTTP cannot bring: an adapter in the place of the one
  before, and weights over the network.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import field_validator, model_validator

from postlude.errors import ComputeError
from postlude.rollout.engine import Completion, Enough, Request, Sampling
from postlude.rollout.serving.server import ADAPTER, EngineChoice, EngineDied, Process, Server, Serving

if TYPE_CHECKING:
    from postlude.rollout.serving.sender import Sender

KNOWN = ("0.32",)
"""Versions whose interface this file was tested with."""
HERE = ("http://127.", "http://localhost:")
PYTHON = "POSTLUDE_VLLM_PYTHON"
MADE_HERE = Path("~/.cache/postlude/vllm/bin/python")
"""Where ``make vllm`` makes the environment."""
START_SECONDS = 600.0
BATCHED_TOKENS = 2048
"""That a step computes at least, where prompts are read whole."""
CALL_SECONDS = 120.0
ABORT_SECONDS = 0.5
"""After so long requests are cut again: one that was still on its way when the others were is not known to the server
then, and it forgets that it was to be cut."""
MODEL, ADAPTED = "policy", "adapted"
"""What the server calls the weights, and these with an adapter."""
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What can be said for the largest rank of an adapter."""
WITHIN = Path(__file__).with_name("within_vllm")
"""The folder of what runs in vLLM's own processes."""


class Vllm(EngineChoice):
    """A vLLM server beside each worker, in an environment of its own, or servers that run already."""

    updates_in_flight: ClassVar[bool] = True

    python: str | None = None
    """The interpreter of the environment that vLLM is installed in. By default what the variable
    ``POSTLUDE_VLLM_PYTHON`` says, else the environment that ``make vllm`` makes."""
    options: dict[str, str | int | float | bool] = {}
    """Further options of the server, as its command line has them, without the dashes."""
    merge_adapters: bool = False
    """Whether it is always given an adapter merged into its base. By default a server that is started here gets the
    base once, and after that the adapter alone."""
    sleeps: bool = False
    """Whether it gives its memory of the GPU back while the policy is trained there."""
    addresses: list[str] | None = None
    """Servers that run already, each as ``http://host:port``; the workers take them in turn. They must see the folder
    ``exchange`` under the same name, and have been started as docs/online.md says."""
    exchange: str | None = None
    """The folder in which weights are handed to servers at ``addresses``; by default the shared memory of this host."""
    network: bool = False
    """Whether servers at ``addresses`` are sent the weights over the network (by gloo, or by NCCL where both sides
    compute on CUDA) instead, and need see no folder."""

    @field_validator("addresses")
    @classmethod
    def _are_addresses(cls, addresses: list[str] | None) -> list[str] | None:
        if addresses is not None and not addresses:
            raise ValueError("an empty list names no server: leave 'addresses' out, or name one")
        for address in addresses or []:
            if not address.startswith("http://"):
                raise ValueError(f"'{address}' is no address of the form http://host:port")
        return addresses

    @property
    def runs_already(self) -> bool:
        return self.addresses is not None

    @model_validator(mode="after")
    def _says_how_weights_go(self) -> Self:
        if self.addresses is None and (self.exchange is not None or self.network):
            raise ValueError("'exchange' and 'network' are for servers at 'addresses': name them, or leave these out")
        if self.exchange is not None and self.network:
            raise ValueError("weights go through 'exchange' or over the 'network': leave one of them out")
        if self.addresses is not None and self.sleeps:
            raise ValueError("'sleeps' is for servers that are started here: leave it out, or 'addresses'")
        return self

    def meets(self, size: int) -> Path:
        return super().meets(size) if self.exchange is None else Path(self.exchange)

    @property
    def is_asked_in_clear_text(self) -> bool:
        return any(not address.startswith(HERE) for address in self.addresses or [])

    def takes_adapter(self, rank: int, dora: bool) -> bool:
        return not (self.merge_adapters or self.runs_already or dora) and rank <= ADAPTER_RANKS[-1]

    def objection(self, top_p: float, ahead: int) -> str | None:
        if top_p != 1:
            return (
                "vLLM tells log-probabilities after 'top_p' has cut tokens away, and training needs those before: "
                "leave rollout.top_p at 1, or take the engine 'native'"
            )
        if self.sleeps and ahead:
            return "what sleeps while the policy is trained answers nothing ahead: leave 'sleeps' or 'ahead' out"
        return None

    def check(self) -> None:
        if self.addresses is None:
            self.interpreter()
        for address in self.addresses or []:
            Client(address, network=self.network).check()

    def interpreter(self) -> str:
        """ComputeError if there is none."""
        found = self.python or os.environ.get(PYTHON) or str(MADE_HERE.expanduser())
        if not Path(found).expanduser().is_file():
            raise ComputeError(
                f"rollout.engine: there is no vLLM at {found}. `make vllm` makes an environment with it; or give the "
                f"interpreter of one as rollout.engine.python or in the variable {PYTHON}."
            )
        return str(Path(found).expanduser())

    def server(self, serving: Serving) -> Server:
        if self.addresses is not None:
            rank = int(os.environ.get("RANK", 0))
            client = Client(self.addresses[rank % len(self.addresses)], serving.seconds, network=self.network)
            return VllmServer(serving, client, None)
        return VllmServer(serving, None, self)


class Client:
    """One server, as HTTP. Each call raises :class:`EngineDied` where the server is gone or refuses."""

    def __init__(
        self, address: str, seconds: float = CALL_SECONDS, adapted: bool = False, network: bool = False
    ) -> None:
        self.address = address.rstrip("/")
        self._host = self.address.removeprefix("http://")
        self._seconds, self._adapted, self._network = seconds, adapted, network
        self._sender: Sender | None = None

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, seconds: float = 0.0) -> Any:
        """The JSON of an answer. ValueError for a request that the server finds wrong."""
        seconds = seconds or CALL_SECONDS
        connection = http.client.HTTPConnection(self._host, timeout=seconds)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
        except TimeoutError as error:
            raise EngineDied(f"{self.address}{path} has not answered for {seconds:g} seconds.") from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineDied(f"{self.address} does not answer: {error!r}.") from error
        finally:
            connection.close()
        if answer.status == http.HTTPStatus.BAD_REQUEST:
            raise ValueError(f"vLLM refuses a request: {_message(said)}")
        if answer.status != http.HTTPStatus.OK:
            raise EngineDied(f"{self.address}{path} answered with {answer.status}: {_message(said)}")
        return json.loads(said) if said else None

    def check(self) -> None:
        """ComputeError if the server is not there, not one that is known, or not started as it must be."""
        try:
            version = self.call("GET", "/version")["version"]
            if not version.startswith(tuple(f"{known}." for known in KNOWN)):
                raise ComputeError(
                    f"rollout.engine: the server at {self.address} is vLLM {version}; known is {', '.join(KNOWN)}. Its "
                    "interface for reinforcement learning changes from version to version."
                )
            self.call("GET", "/weight_info")
            if self._network:
                self._every_worker("place")
        except (EngineDied, ValueError, KeyError, TypeError) as error:
            raise ComputeError(
                f"rollout.engine: no vLLM server for reinforcement learning at {self.address}: {error} Start it as "
                "docs/online.md says."
            ) from error

    def abort(self, names: Sequence[str]) -> None:
        """Cut requests, by their names, where they are."""
        self.call("POST", "/abort_requests", {"request_ids": [f"generate-tokens-{name}" for name in names]})

    def generate(self, request: Request, sampling: Sampling, name: str) -> Completion:
        """The completion of one request, which can be cut by its name."""
        from postlude.rollout.sampling import stream_key

        key = stream_key(sampling.seed, f"{request.prompt_id}+{request.position}", request.sample)
        asked = {
            "request_id": name,
            **({"model": ADAPTED} if self._adapted else {}),
            "token_ids": list(request.tokens),
            "sampling_params": {
                "max_tokens": request.limit or sampling.max_tokens,
                "temperature": sampling.temperature,
                "seed": key >> 1,  # signed there
                "logprobs": 0,
                "stop_token_ids": sorted(sampling.stop_ids),
                "ignore_eos": True,
                "detokenize": False,
            },
        }
        [choice] = self.call("POST", "/inference/v1/generate", asked, self._seconds)["choices"]
        if choice["finish_reason"] not in ("stop", "length", "abort"):
            raise EngineDied(f"A completion ended with '{choice['finish_reason']}'.")
        tokens = tuple(choice["token_ids"] or ())
        versions = [0] * len(tokens)
        for span in choice["weight_versions"] or []:
            for place in range(span["start"], span["end"]):
                versions[place] = int(span["version"])
        ended = "cut" if choice["finish_reason"] == "abort" else "length"
        if tokens and tokens[-1] in sampling.stop_ids:
            ended = "stop"
        values = tuple(one["logprob"] for one in choice["logprobs"]["content"]) if tokens else ()
        return Completion(request, tokens, values, ended, tuple(versions))  # type: ignore[arg-type]

    @property
    def is_asleep(self) -> bool:
        return bool(self.call("GET", "/is_sleeping")["is_sleeping"])

    def sleep(self) -> None:
        """Give the memory of the GPU back: the weights wait in that of the host, keys and values are gone."""
        self.call("POST", "/sleep?level=1", {})

    def wake(self) -> None:
        """Take the memory again."""
        self.call("POST", "/wake_up", {}, START_SECONDS)

    def label(self, version: int) -> None:
        """Say what the weights that it has are called."""
        self.call("POST", "/update_weight_version", {"new_version": str(version)})

    def update(self, folder: Path, version: int) -> None:
        """Take over the weights in a folder, or the adapter in it alone."""
        self.call("POST", "/pause?mode=keep", {})
        if self._network:
            self._send(folder)
        elif self._adapted:
            self._every_worker("take_adapter", folder=str(folder / ADAPTER), name=ADAPTED)
        else:
            self._every_worker("reload_weights", weights_path=str(folder))
        self.label(version)
        self.call("POST", "/reset_prefix_cache?reset_running_requests=true", {})
        self.call("POST", "/resume", {})

    def _send(self, folder: Path) -> None:
        """Send the weights in a folder over the network."""
        from postlude.rollout.serving.sender import Sender

        host = self._host.rsplit(":", 1)[0]
        try:
            if self._sender is None:
                self._sender = Sender(self._every_worker, host, CALL_SECONDS)
            self._sender.send(folder)
        except (RuntimeError, OSError) as error:
            raise EngineDied(f"{self.address} cannot be sent the weights: {error}") from error

    def _every_worker(self, method: str, **arguments: Any) -> list[Any]:
        """What each of the server's workers answers to a call."""
        asked = {"method": method, "kwargs": arguments}
        answered = self.call("POST", "/collective_rpc", asked, START_SECONDS)
        return list(answered["results"]) if answered else []


class VllmServer:
    """A server that is started here (``keys``), or one that runs already (``client``)."""

    def __init__(self, serving: Serving, client: Client | None, keys: Vllm | None) -> None:
        self._serving, self._client, self._keys = serving, client, keys
        self._process: Process | None = None
        self._threads = ThreadPoolExecutor(serving.concurrency, thread_name_prefix="vllm")
        self._sleeps, self._is_asleep = keys is not None and keys.sleeps, False

    @property
    def address(self) -> str:
        """Where it answers."""
        return self._living().address

    def start(self, room: Path, folder: Path, version: int) -> None:
        if self._keys is None:
            self.update(folder, version)
            return
        port = _free_port()
        self._process = Process(room, self._command(self._keys, folder, port), self._environment())
        self._client = Client(f"http://127.0.0.1:{port}", self._serving.seconds, self._serving.adapter_rank > 0)
        self._await()
        self._client.check()
        self._client.label(version)

    def update(self, folder: Path, version: int) -> None:
        self._awake().update(folder, version)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        made = self._generate(self._awake(), requests, sampling, enough)
        if self._sleeps:
            self._living().sleep()
            self._is_asleep = True
        return made

    def _generate(
        self, client: Client, requests: Sequence[Request], sampling: Sampling, enough: Enough | None
    ) -> list[Completion]:
        over = threading.Event()
        call = uuid.uuid4().hex
        names = [f"{call}-{place}" for place in range(len(requests))]

        def ask(request: Request, name: str) -> Completion:
            return Completion(request, (), (), "cut") if over.is_set() else client.generate(request, sampling, name)

        asked = [self._threads.submit(ask, *both) for both in zip(requests, names, strict=True)]
        left = set(asked)
        while left:
            if over.is_set():
                client.abort([name for name, one in zip(names, asked, strict=True) if one in left])
                done, left = wait(left, ABORT_SECONDS)
            else:
                done, left = wait(left, return_when=FIRST_COMPLETED)
            failed = [error for one in done if (error := one.exception()) is not None]
            if failed:
                for one in left:
                    one.cancel()
                raise next((error for error in failed if not isinstance(error, EngineDied)), self._died(failed[0]))
            if enough is not None and not over.is_set():
                ended = {place for place, one in enumerate(asked) if one not in left and one.result().ended != "cut"}
                if enough.reached(ended):
                    over.set()
        return [one.result() for one in asked]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _awake(self) -> Client:
        client = self._living()
        if self._is_asleep:
            client.wake()
            self._is_asleep = False
        return client

    def _living(self) -> Client:
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

    def _command(self, keys: Vllm, folder: Path, port: int) -> list[str]:
        options: dict[str, str | int | float | bool] = {
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
            **self._adapter_options(folder),
            **({"enable-sleep-mode": keys.sleeps} if self._serving.gpus else self._whole_prompts()),
            **keys.options,
        }
        command = [keys.interpreter(), "-m", "vllm.entrypoints.openai.api_server"]
        for name, value in options.items():
            if value is True:
                command.append(f"--{name}")
            elif value is not False:
                command += [f"--{name}", str(value)]
        return command

    def _whole_prompts(self) -> dict[str, str | int | float | bool]:
        """A prompt that is read in two steps ends vLLM on a CPU: it would set the offset of the request's generator,
        and those of a CPU have none."""
        most = max(self._serving.context, BATCHED_TOKENS)
        return {"no-enable-chunked-prefill": True, "max-num-batched-tokens": most}

    def _adapter_options(self, folder: Path) -> dict[str, str | int | float | bool]:
        rank = self._serving.adapter_rank
        if not rank:
            return {}
        return {
            "enable-lora": True,
            "max-loras": 1,
            "max-lora-rank": next(known for known in ADAPTER_RANKS if known >= rank),
            "lora-modules": f"{ADAPTED}={folder / ADAPTER}",
        }

    def _environment(self) -> dict[str, str]:
        ours = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "OMP_NUM_THREADS": str(self._serving.threads),
        }
        left_out = ("PYTHONPATH", "PYTHONHOME")  # they are of our interpreter
        theirs = {name: value for name, value in os.environ.items() if name not in left_out}
        return {"VLLM_CPU_KVCACHE_SPACE": "1", **theirs, **ours, "PYTHONPATH": str(WITHIN)}


def _message(said: bytes) -> str:
    try:
        found = json.loads(said)
        return str(found.get("error", {}).get("message") or found)[:500]
    except (ValueError, AttributeError):
        return said[:500].decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
