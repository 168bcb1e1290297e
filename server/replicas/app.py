"""`server.replicas.app:build`, for Ray Serve: gates in front of replicas of `outrider serve`. See deploy/ray/serve.yaml."""

from __future__ import annotations

import importlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from server.config import ConfigError, ServerConfig, first_complaint, read_yaml
from server.replicas.gate import Gate
from server.replicas.replica import Replica

# Ray's router by prompt; the first place wants a vLLM beside it, which nobody has here.
PREFIX_ROUTERS = (
    "ray.serve.llm.request_router",
    "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router",
)
EVICT_ABOVE, EVICT_TO = 4_000_000, 3_000_000  # characters of prompts that the router remembers


class ReplicaSettings(BaseModel):
    """The `args` of the application. Counts are of requests."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = Field(None, description="YAML file of `outrider serve`, read where the application is built")
    settings: dict[str, Any] = Field({}, description="settings of `outrider serve`; they win over the file")
    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = Field(
        32.0, description="of one replica, waiting ones included: what scaling aims at"
    )
    max_ongoing_requests: PositiveInt = Field(128, description="of one replica; what is beyond waits at the gate")
    max_queued_requests: int = Field(1024, ge=-1, description="at a gate; what is beyond gets 429; -1: no limit")
    routing: Literal["prefix", "balanced"] = Field("prefix", description="prefix: to where the prompt's beginning went before")
    gates: PositiveInt = 1
    num_gpus: float | None = Field(None, ge=0, description="of one replica (default: as many as its ranks; none on a CPU)")
    autoscaling: dict[str, Any] = Field({}, description="more of Ray Serve's autoscaling_config: upscale_delay_s, ...")
    replica_options: dict[str, Any] = Field({}, description="more options of the replicas' deployment")
    gate_options: dict[str, Any] = Field({}, description="more options of the gates' deployment")


def build(args: dict[str, Any]) -> serve.Application:
    """Raises ConfigError, one line, for a setting that does not exist or cannot be used."""
    try:
        wanted = ReplicaSettings(**args)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise ConfigError(f"args: {detail['loc'][0]}: {detail['msg']} (got {detail['input']!r})") from None
    settings = (read_yaml(wanted.config) if wanted.config else {}) | {
        name.replace("-", "_"): value for name, value in wanted.settings.items()
    }
    server = _checked(settings)
    if wanted.max_ongoing_requests > server.max_queue:
        raise ConfigError(
            f"args: max_ongoing_requests: {wanted.max_ongoing_requests} are more than the server takes at once "
            f"(max_queue {server.max_queue})"
        )
    if wanted.min_replicas > wanted.max_replicas:
        raise ConfigError(f"args: min_replicas: {wanted.min_replicas} are more than max_replicas ({wanted.max_replicas})")
    replicas = serve.deployment(Replica).options(**_replica_options(wanted, server))
    gates = serve.deployment(Gate).options(**{"name": "gate", "num_replicas": wanted.gates, **GATE, **wanted.gate_options})
    return gates.bind(replicas.bind(settings, server.shutdown_timeout), server.max_body_bytes)


# A gate waits; it computes nothing to speak of.
GATE: dict[str, Any] = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0.1}}


def _checked(settings: dict[str, Any]) -> ServerConfig:
    unknown = sorted(settings.keys() - ServerConfig.model_fields.keys())
    if unknown:
        raise ConfigError(f"args: settings: unknown setting {unknown[0]}")
    try:
        return ServerConfig(**settings)
    except ValidationError as error:
        raise ConfigError(f"args: settings: {first_complaint(error)}") from None


def _replica_options(wanted: ReplicaSettings, server: ServerConfig) -> dict[str, Any]:
    scaling = AutoscalingConfig(
        min_replicas=wanted.min_replicas,
        max_replicas=wanted.max_replicas,
        target_ongoing_requests=wanted.target_ongoing_requests,
        **wanted.autoscaling,
    )
    fixed = wanted.min_replicas == wanted.max_replicas
    gpus = wanted.num_gpus if wanted.num_gpus is not None else _gpus(server)
    return {
        "name": "replica",
        "max_ongoing_requests": wanted.max_ongoing_requests,
        "max_queued_requests": wanted.max_queued_requests,
        "graceful_shutdown_timeout_s": server.shutdown_timeout + 10,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": gpus},
        **({"num_replicas": wanted.max_replicas} if fixed else {"autoscaling_config": scaling}),
        **({"request_router_config": _prefix_router(wanted)} if wanted.routing == "prefix" else {}),
        **wanted.replica_options,
    }


def _gpus(server: ServerConfig) -> int:
    """Of one replica. Ranks that Ray places itself (--distributed-executor-backend ray) ask for their own."""
    if server.device == "cpu" or getattr(server, "distributed_executor_backend", None) == "ray":
        return 0
    return server.tensor_parallel_size * getattr(server, "data_parallel_size", 1)


def _prefix_router(wanted: ReplicaSettings) -> RequestRouterConfig:
    kwargs = {
        "imbalanced_threshold": wanted.target_ongoing_requests / 2,  # without one, a common system prompt fills one replica
        "do_eviction": True,
        "eviction_threshold_chars": EVICT_ABOVE,
        "eviction_target_chars": EVICT_TO,
    }
    return RequestRouterConfig(request_router_class=_prefix_router_class(), request_router_kwargs=kwargs)


def _prefix_router_class() -> type:
    """Raises ConfigError when this Ray has none."""
    for module in PREFIX_ROUTERS:
        try:
            found: type = importlib.import_module(module).PrefixCacheAffinityRouter
        except (ImportError, AttributeError):
            continue
        return found
    raise ConfigError("args: routing: this Ray has no router by prefix (ray 2.60 has one); say routing: balanced")
