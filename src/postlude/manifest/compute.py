"""The keys of ``compute``, and ``parallel`` of a stage: where processes run, and how they share a model. It imports
without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_serializer, model_validator

from postlude.errors import ComputeError
from postlude.manifest.component import Component, Config, Name, Named, Positive, default_name
from postlude.manifest.problem import ManifestError
from postlude.secrecy import learn_variable, stand_in


class Elastic(Config):
    """A number of workers that may change while a stage runs."""

    min: Positive
    """With so many the stage goes on when workers were lost."""
    max: Positive
    """So many it takes where there is room, and grows back to at a checkpoint."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, above max, which is {self.max}")
        return self


class Pool(Config):
    """Workers of one role."""

    workers: Positive | Elastic = 1
    """How many processes; ``{min: 2, max: 8}`` goes on with fewer when some are lost."""
    gpus_per_worker: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] = 0
    """0 runs on the CPU; a part of one shares a GPU among workers."""
    cpus_per_worker: Positive | None = None
    """By default the machine's cores, shared out; with other providers than ``local`` one."""
    memory_per_worker: Positive | None = None
    """Bytes of its node's memory that each worker reserves."""
    device_memory: Positive | None = None
    """Bytes of each worker's GPU: a stage that would need more by its memory plan is refused before it begins. On the
    CPU ``memory_per_worker`` is that bound, unless this is given."""
    labels: dict[str, str] = {}
    """Labels that a node must have."""
    placement: Literal["pack", "spread", "one_node", "node_each"] = "pack"
    """On few nodes if possible, on many if possible, all on one, or each on a node of its own."""

    bandwidth_gbit: Annotated[float, Field(gt=0)] | Positive | None = None
    """Gigabits a second that its nodes are to reach each other with: measured before a run, if it is given."""

    @property
    def least(self) -> int:
        """Workers that are enough."""
        return self.workers.min if isinstance(self.workers, Elastic) else self.workers

    @property
    def most(self) -> int:
        """Workers where there is room."""
        return self.workers.max if isinstance(self.workers, Elastic) else self.workers


class Supervision(Config):
    """When a group of workers counts as failed, and how often it is formed again."""

    failures: Annotated[int, Field(ge=0)] = 5
    """So many losses of a process, a node or a connection are recovered from without a checkpoint between them."""
    preemptions: Annotated[int, Field(ge=0)] = 100
    """The same for machines that said beforehand that they go away."""
    silence_seconds: Annotated[float, Field(gt=0)] | Positive = 15
    """A worker that does not answer for so long has failed."""
    stall_seconds: Annotated[float, Field(gt=0)] | Positive = 1800
    """Workers of which none begins anything new for so long have failed."""
    readings_seconds: Annotated[float, Field(gt=0)] | Positive = 10
    """Between two readings of each worker that are kept."""
    room_seconds: Annotated[float, Field(ge=0)] | Annotated[int, Field(ge=0)] = 600
    """How long to wait for nodes with room for the workers."""


class Certificates(Config):
    """Files in PEM format with which this machine and the cluster's nodes know each other."""

    certificate: str
    """This machine's."""
    key: str
    """Its private key."""
    authority: str
    """The certificate of the authority that signed everybody's."""


class Transport(Config):
    """What protects the traffic between hosts; ``require-encryption`` is short for ``{require_encryption: true}``."""

    require_encryption: bool = False
    """Refuse a run that would send clear text between hosts."""
    tls: Certificates | None = None
    """Mutual TLS of Ray; by default what RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT say where
    RAY_USE_TLS is 1."""
    token: str | None = None
    """The file with the cluster's token; by default what RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH say."""
    network_is_encrypted: bool = False
    """Your word that what lies below is encrypted, as by WireGuard or IPsec: torch's collectives encrypt nothing."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"require_encryption": True} if value == "require-encryption" else value


class ProviderConfig(Component):
    """What the manifest knows of a provider of machines. What one does is said by
    :class:`postlude.cluster.providers.base.Provider`."""

    is_remote: ClassVar[bool] = True
    """Whether workers may be on other machines than this one."""
    unused: ClassVar[Mapping[str, str]] = {}
    """The keys of ``compute`` that it has no use for, each with what is said to who gives it."""


class FromEnvironment(Config):
    """A value that is named and not written down: that of the variable of the same name here, when processes start."""

    from_: Annotated[Literal["environment"], Field(alias="from")]


class Compute(Config):
    """Where the processes run."""

    provider: Annotated[ProviderConfig, Named("providers", default="local", bare=True)] = default_name("local")
    """Where the machines come from: ``local`` is this one, ``ray`` a cluster that is there."""
    address: str | None = None
    """Of the cluster with ``provider: ray``, host:port of its head; by default what RAY_ADDRESS says."""
    pools: dict[Name, Pool] = {}
    """Groups of workers by the role they play for a stage; one of a single worker where none is given."""
    environment: dict[str, SecretStr | FromEnvironment] = {}
    """Variables that each worker gets. What is secret is named: ``HF_TOKEN: {from: environment}`` takes the value that
    the variable has where the run is started. Of a value that is given only a digest is ever written."""
    code: list[str] = []
    """Folders of packages that are sent to the nodes, such as those of ``plugins``, where they do not share a disk."""
    transport: Transport = Transport()
    """What protects the traffic between hosts."""
    supervision: Supervision = Supervision()
    """When workers count as failed, and how often they are started again."""

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> Self:
        for key, why in self.provider.unused.items():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(why)
        return self

    @field_serializer("environment")
    def _without_values(self, environment: dict[str, SecretStr | FromEnvironment]) -> dict[str, Any]:
        return {
            name: stand_in(name, value.get_secret_value()) if isinstance(value, SecretStr) else {"from": value.from_}
            for name, value in environment.items()
        }

    def variables(self) -> dict[str, str]:
        """Variables for processes that start now, with their values. ComputeError for one that is not set here."""
        variables = {}
        for name, value in self.environment.items():
            if isinstance(value, SecretStr):
                variables[name] = value.get_secret_value()
            elif name in os.environ:
                variables[name] = os.environ[name]
            else:
                raise ComputeError(
                    f"compute.environment.{name} is taken from the environment, where {name} is not set. Set it where "
                    "the run is started, or take it out of the manifest."
                )
            learn_variable(name, variables[name])
        return variables


class Parallel(Config):
    """How the workers of a pool hold a model together. Data parallelism is what is left of them."""

    tensor: Positive = 1
    """So many workers divide every layer among them, and have the same data. It has to divide heads, widths, experts
    and the padded vocabulary. With more than one, the rest of the workers shards the weights, too."""
    shard: bool = False
    """Whether the weights, their gradients and the optimiser's state are divided among the workers (FSDP), each of
    which otherwise holds all of them."""
    replicas: Positive = 1
    """Groups of workers that hold all of the weights each, and shard them within: where a group is a node, weights are
    gathered within it, and only gradients go between nodes."""

    @property
    def divides(self) -> bool:
        """Whether a worker holds a part of a model."""
        return self.shard or self.tensor > 1

    @model_validator(mode="after")
    def _replicates_shards(self) -> Self:
        if self.replicas > 1 and not self.divides:
            raise ValueError("replicas are of sharded weights: set shard to true, or leave replicas out")
        return self


# --- ranks along dimensions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How many ranks lie along each dimension."""

    replicas: int = 1
    """Groups of ranks that hold all of the weights each."""
    shards: int = 1
    """Ranks that the weights are divided among, each with data of its own."""
    tensor: int = 1
    """Ranks that divide every layer, with the same data."""

    @staticmethod
    def of(world: int, tensor: int, replicas: int) -> Shape:
        """What is left of the ranks shards the weights. ManifestError if they do not divide."""
        if world % (tensor * replicas):
            product = f"parallel.tensor ({tensor})" + (f" times parallel.replicas ({replicas})" if replicas > 1 else "")
            raise ManifestError(
                f"{product} does not divide the {world} worker{'s' if world > 1 else ''} of the pool. Give the pool a "
                f"multiple of {tensor * replicas} workers, or lower it."
            )
        return Shape(replicas, world // (tensor * replicas), tensor)

    @property
    def data(self) -> int:
        """Ranks that have data of their own."""
        return self.replicas * self.shards

    def __str__(self) -> str:
        return f"{self.data}x{self.tensor}"


def shape_of(parallel: Parallel, world: int) -> Shape | None:
    """The shape of so many ranks; None where each has all of every model. ManifestError if they do not divide."""
    if not parallel.divides:
        return None
    return Shape.of(world, parallel.tensor, parallel.replicas)


def check_workers(parallel: Parallel, workers: int | Elastic) -> None:
    """ManifestError if a pool of so many workers cannot hold models like this."""
    if isinstance(workers, int):
        shape_of(parallel, workers)
    elif parallel.divides and parallel.tensor * parallel.replicas > 1:
        raise ManifestError(
            "parallel.tensor and parallel.replicas need a number of workers that does not change, and the pool has "
            f"between {workers.min} and {workers.max}. Give compute.pools a fixed number, or leave them at 1: sharded "
            "weights fit any number."
        )
