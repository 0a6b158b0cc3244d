"""What a vLLM server is asked over HTTP. This file alone knows vLLM's interface; how a server is started stands in
:mod:`postlude.rollout.serving.vllm`, and what runs within it in ``within_vllm``.

Notable:

- Tokens go in and come out; nothing is tokenised on the way.
- While weights are taken over the requests in flight stand still, then go on; their keys and values are made anew.
  vLLM says itself which of their tokens came from which weights.
- Weights come as safetensors in shared memory, which ``reload_weights`` reads, or are sent over the network.
  ``load_weights`` called from a worker extension would leave a half-written model that goes on serving.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postlude.errors import ComputeError
from postlude.rollout.engine import Completion, Ended, Request, Sampling
from postlude.rollout.serving.server import ADAPTER, EngineDied

if TYPE_CHECKING:
    from postlude.rollout.serving.sender import Sender

KNOWN_VERSIONS = ("0.32",)
"""Versions whose interface this file was tested with."""
START_SECONDS = 600.0
CALL_SECONDS = 120.0
ADAPTED = "adapted"
"""What the server calls the weights with an adapter."""


class VllmClient:
    """One server. Each call raises :class:`EngineDied` where the server is gone or refuses.

    ``seconds`` is how long a completion may take. The server has an adapter beside its base where it is ``adapted``;
    weights are sent over the ``network``, or read from a folder that it sees.
    """

    def __init__(
        self, address: str, seconds: float = CALL_SECONDS, adapted: bool = False, network: bool = False
    ) -> None:
        self.address = address.rstrip("/")
        self._host = self.address.removeprefix("http://")
        self._seconds, self._adapted, self._network = seconds, adapted, network
        self._sender: Sender | None = None

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, seconds: float = CALL_SECONDS) -> Any:
        """The JSON of an answer. ValueError for a request that the server finds wrong."""
        connection = http.client.HTTPConnection(self._host, timeout=seconds)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except TimeoutError as error:
            raise EngineDied(f"{self.address}{path} has not answered for {seconds:g} seconds.") from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineDied(f"{self.address} does not answer: {error!r}.") from error
        finally:
            connection.close()
        if response.status == http.HTTPStatus.BAD_REQUEST:
            raise ValueError(f"vLLM refuses a request: {_message(content)}")
        if response.status != http.HTTPStatus.OK:
            raise EngineDied(f"{self.address}{path} answered with {response.status}: {_message(content)}")
        return json.loads(content) if content else None

    def check(self) -> None:
        """ComputeError if the server is not there, not one that is known, or not started as it must be."""
        try:
            version = self.call("GET", "/version")["version"]
            if not version.startswith(tuple(f"{known}." for known in KNOWN_VERSIONS)):
                raise ComputeError(
                    f"rollout.engine: the server at {self.address} is vLLM {version}; known is "
                    f"{', '.join(KNOWN_VERSIONS)}. Its interface for reinforcement learning changes from version to "
                    "version."
                )
            self.call("GET", "/weight_info")
            if self._network:
                self._call_workers("place")
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
        body = {
            "request_id": name,
            **({"model": ADAPTED} if self._adapted else {}),
            "token_ids": list(request.tokens),
            "sampling_params": {
                "max_tokens": request.limit or sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": key >> 1,  # signed there
                "logprobs": 0,
                "stop_token_ids": sorted(sampling.stop_ids),
                "ignore_eos": True,
                "detokenize": False,
            },
        }
        [choice] = self.call("POST", "/inference/v1/generate", body, self._seconds)["choices"]
        if choice["finish_reason"] not in ("stop", "length", "abort"):
            raise EngineDied(f"A completion ended with '{choice['finish_reason']}'.")
        tokens = tuple(choice["token_ids"] or ())
        log_probabilities = tuple(token["logprob"] for token in choice["logprobs"]["content"]) if tokens else ()
        versions = [0] * len(tokens)
        for span in choice["weight_versions"] or []:
            versions[span["start"] : span["end"]] = [int(span["version"])] * (span["end"] - span["start"])
        ended: Ended = "cut" if choice["finish_reason"] == "abort" else "length"
        if tokens and tokens[-1] in sampling.stop_ids:
            ended = "stop"
        return Completion(request, tokens, log_probabilities, ended, tuple(versions))

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
            self._call_workers("take_adapter", folder=str(folder / ADAPTER), name=ADAPTED)
        else:
            self._call_workers("reload_weights", weights_path=str(folder))
        self.label(version)
        self.call("POST", "/reset_prefix_cache?reset_running_requests=true", {})
        self.call("POST", "/resume", {})

    def _send(self, folder: Path) -> None:
        """Send the weights in a folder over the network."""
        from postlude.rollout.serving.sender import Sender  # loads torch

        try:
            if self._sender is None:
                self._sender = Sender(self._call_workers, self._host.rsplit(":", 1)[0], CALL_SECONDS)
            self._sender.send(folder)
        except (RuntimeError, OSError) as error:
            raise EngineDied(f"{self.address} cannot be sent the weights: {error}") from error

    def _call_workers(self, method: str, **arguments: Any) -> list[Any]:
        """What each of the server's workers answers to a call."""
        body = {"method": method, "kwargs": arguments}
        answer = self.call("POST", "/collective_rpc", body, START_SECONDS)
        return list(answer["results"]) if answer else []


def _message(content: bytes) -> str:
    """What an answer says is wrong."""
    try:
        answer = json.loads(content)
        return str(answer.get("error", {}).get("message") or answer)[:500]
    except (ValueError, AttributeError):
        return content[:500].decode(errors="replace")
