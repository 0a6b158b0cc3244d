"""The engine ``vllm``: a vLLM server, over HTTP, in an environment of its own (``make vllm`` makes one)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar, Self

from pydantic import field_validator, model_validator

from postlude.errors import ComputeError
from postlude.rollout.serving.server import EngineChoice, Server, Serving
from postlude.rollout.serving.vllm import ADAPTER_RANKS, Launch, Option, VllmServer
from postlude.rollout.serving.vllm_client import VllmClient
from postlude.secrecy import is_secret_key, without_credentials

LOCAL = ("http://127.", "http://localhost:")
PYTHON = "POSTLUDE_VLLM_PYTHON"
MADE_HERE = Path("~/.cache/postlude/vllm/bin/python")
"""Where ``make vllm`` makes the environment."""


class Vllm(EngineChoice):
    """A vLLM server beside each worker, in an environment of its own, or servers that run already."""

    updates_in_flight: ClassVar[bool] = True

    python: str | None = None
    """The interpreter of the environment that vLLM is installed in. By default what the variable
    ``POSTLUDE_VLLM_PYTHON`` says, else the environment that ``make vllm`` makes."""
    options: dict[str, Option] = {}
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
    """The folder in which servers at ``addresses`` find the weights; by default the shared memory of this host."""
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
            without_credentials(address, "These servers are asked without one: keep others from them by the network")
        return addresses

    @field_validator("options")
    @classmethod
    def _hold_no_key(cls, options: dict[str, Option]) -> dict[str, Option]:
        for name in options:
            if is_secret_key(name.replace("-", "_")):
                raise ValueError(
                    f"'{name}' would stand on the server's command line, which everybody on its machine can read. "
                    "Leave it out, or give vLLM its variable for it with compute.environment"
                )
        return options

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

    def weights_folder(self, size_bytes: int) -> Path:
        return super().weights_folder(size_bytes) if self.exchange is None else Path(self.exchange)

    @property
    def is_asked_in_clear_text(self) -> bool:
        return any(not address.startswith(LOCAL) for address in self.addresses or [])

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
            VllmClient(address, network=self.network).check()

    def interpreter(self) -> str:
        """ComputeError if there is none."""
        place = Path(self.python or os.environ.get(PYTHON) or MADE_HERE).expanduser()
        if not place.is_file():
            raise ComputeError(
                f"rollout.engine: there is no vLLM at {place}. `make vllm` makes an environment with it; or give the "
                f"interpreter of one as rollout.engine.python or in the variable {PYTHON}."
            )
        return str(place)

    def server(self, serving: Serving) -> Server:
        if self.addresses is None:
            return VllmServer(serving, Launch(self.interpreter(), self.options, self.sleeps))
        address = self.addresses[int(os.environ.get("RANK", 0)) % len(self.addresses)]
        return VllmServer(serving, VllmClient(address, serving.seconds, network=self.network))
