"""What the operator asked for: one model read from flags > environment OUTRIDER_* > YAML (--config) > defaults.

A name is the same everywhere: the flag `--max-model-len` is `OUTRIDER_MAX_MODEL_LEN` and `max_model_len:` (or
`max-model-len:`). Flag names follow `vllm serve`. A setting that does not exist is an error, never ignored.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from engine.config import EngineConfig

ENV_PREFIX = "OUTRIDER_"
_ENGINE = EngineConfig(model="")  # its defaults are ours


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that names it."""


def _split(value: object) -> object:
    """`a,b` -> [a, b]; a list stays, its own entries split too (a flag may be repeated)."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return [name for part in value for name in _split(part)]  # type: ignore[attr-defined]  # _split(str) is a list
    return value


def _keys(value: object) -> object:
    """One text is keys with spaces between them; a key is never cut at a comma, which would make two weaker ones of it."""
    keys = value.split() or [""] if isinstance(value, str) else value
    if isinstance(keys, list) and any(isinstance(key, str) and key.split() != [key] for key in keys):
        raise ValueError("a key is empty or holds a space; without the setting there is none")
    return keys


Names = Annotated[list[str], NoDecode, BeforeValidator(_split)]
Keys = Annotated[list[str], NoDecode, BeforeValidator(_keys)]


class ServerConfig(BaseSettings):
    """Every setting of `outrider serve`. A field's description is its --help text."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", env_ignore_empty=True, frozen=True)

    model: str | None = Field(None, description="Hugging Face directory, .gguf file or hub id (default: the packaged SmolLM2)")

    # HTTP
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens the server to the network")
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free port")
    api_key: Keys = Field(
        [], repr=False, description="key that clients must send; may be repeated (in the environment: spaces between keys)"
    )
    served_model_name: str | None = Field(None, min_length=1, description="the model's name in the API")
    max_body_bytes: int = Field(16 << 20, ge=1024, description="largest request body; larger ones get 413")
    max_queue: int = Field(256, ge=1, description="most requests in the server at once; further ones get 429")
    request_timeout: float | None = Field(None, gt=0, description="seconds a request may take before it ends with an error")
    shutdown_timeout: float = Field(30.0, ge=0, description="seconds that running requests get to finish after SIGTERM")
    cors_allow_origins: Names = Field([], description="origins that browsers may call from (comma list; default: none)")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe messages to log")
    vllm_metrics: bool = Field(False, description="export metrics under vLLM's names (vllm:...) too")
    config: Path | None = Field(None, description="YAML file of these settings")

    # model and memory
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(_ENGINE.dtype, description="type of weights and KV cache")
    device: str = Field(_ENGINE.device, pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    max_model_len: int | None = Field(_ENGINE.max_model_len, ge=1, description="longest context, prompt and answer (tokens)")
    max_num_seqs: int = Field(_ENGINE.max_num_seqs, ge=1, description="most sequences in one step")
    max_num_batched_tokens: int = Field(_ENGINE.max_num_batched_tokens, ge=1, description="most tokens in one step")
    block_size: int = Field(_ENGINE.block_size, ge=1, le=1024, description="tokens per KV block")
    gpu_memory_utilization: float = Field(_ENGINE.gpu_memory_utilization, gt=0, le=1, description="share of the GPU's memory")
    kv_cache_memory_bytes: int | None = Field(_ENGINE.kv_cache_memory_bytes, ge=1, description="size of each engine's KV cache")
    enable_prefix_caching: bool = Field(_ENGINE.enable_prefix_caching, description="reuse the KV of equal prompt beginnings")
    tensor_parallel_size: int = Field(
        _ENGINE.tensor_parallel_size, ge=1, le=64, description="split the model over so many GPUs, or processes on a CPU"
    )
    rank_timeout: float = Field(
        _ENGINE.rank_timeout,
        gt=0,
        description="seconds that one of them may keep the others waiting until the engine is restarted",
    )
    distributed_executor_backend: Literal["mp", "ray"] = Field(
        _ENGINE.distributed_executor_backend, description="where the ranks are: processes here, or actors of a Ray cluster"
    )
    data_parallel_size: int = Field(1, ge=1, description="engines behind this server, each with all of the model (a GPU each)")
    num_threads: int | None = Field(
        _ENGINE.num_threads, ge=1, description="CPU threads of each engine (default: all cores, shared out among the engines)"
    )
    cpu_kernels: Literal["auto", "native", "torch"] = Field(
        _ENGINE.cpu_kernels, description="of bfloat16 models on a CPU: native ones where they run, only those, or torch's"
    )
    cpu_weights: Literal["auto", "bfloat16"] = Field(
        _ENGINE.cpu_weights, description="four- and eight-bit weights on native kernels: as they are, or unpacked at start"
    )
    attention_backend: Literal["auto", "triton", "flashinfer", "reference"] = Field(
        _ENGINE.attention_backend, description="auto: on a GPU the faster of triton and flashinfer, on a CPU reference"
    )
    enforce_eager: bool = Field(_ENGINE.enforce_eager, description="no CUDA graphs: launch every kernel of every step anew")
    deterministic: bool = Field(
        _ENGINE.deterministic, description="not a bit depends on company or drafts; on a CPU the native kernels are so anyway"
    )
    load_format: Literal["auto", "native", "transformers"] = Field(
        _ENGINE.load_format, description="transformers: run the model through transformers' own code"
    )
    seed: int | None = Field(None, ge=0, lt=1 << 64, description="draws the seeds of requests that bring none (default: chance)")
    watchdog_timeout: float = Field(
        120.0,
        ge=2,  # it looks once a second
        description="seconds without a sign of life until the engine is restarted; its first start may take as long as it likes, "
        "a restart this long or three times the longest start so far, twice that after each one that failed",
    )

    # speculation
    drafters: Names = Field(_ENGINE.drafters, description="comma list, in order of preference; `none` for none")
    verifier: str = Field(_ENGINE.verifier, min_length=1, description="how drafts are judged")
    policy: Literal["goodput", "fixed", "off"] = Field(
        _ENGINE.policy, validate_default=True, description="how far ahead to guess: goodput, fixed or off"
    )
    budget: int = Field(_ENGINE.budget, ge=0, description="draft nodes per sequence and step under --policy fixed")
    max_budget: int = Field(_ENGINE.max_budget, ge=0, description="most draft nodes per sequence and step, --policy goodput")
    max_itl_ms: float | None = Field(_ENGINE.max_itl_ms, gt=0, description="never guess so far that a step takes longer (ms)")
    profile: bool = Field(_ENGINE.profile, description="measure what steps cost, where that is not kept on disk")
    cache_dir: str | None = Field(
        _ENGINE.cache_dir, description="where measured costs and bigrams are kept (default: ~/.cache/outrider)"
    )
    draft_model: str | None = Field(_ENGINE.draft_model, description="small model for drafter draft_model, named like MODEL")
    datastore: str | None = Field(_ENGINE.datastore, description="file for drafter rest (outrider datastore build)")
    lossy: bool = Field(_ENGINE.lossy, description="allow a verifier that may change answers; every response then says so")
    drafter_memory_bytes: int = Field(
        _ENGINE.drafter_memory_bytes, ge=1, description="most memory of each kind of state that drafters share"
    )

    @field_validator("data_parallel_size")
    @classmethod
    def _own_gpus(cls, value: int, info: ValidationInfo) -> int:
        device = info.data.get("device", "")
        if value > 1 and ":" in device:
            raise ValueError(f"each engine takes a GPU of its own, so --device must be cuda, not {device}")
        return value

    @field_validator("cache_dir", "draft_model", "datastore")
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        return value and os.path.expanduser(value)  # YAML and --flag=~/x come without a shell

    @field_validator("drafters")
    @classmethod
    def _at_least_one(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a drafter is named twice")
        return value or ["none"]

    def engine_config(self, model_path: str) -> EngineConfig:
        """What the engine process is told, for the model that `model` resolved to."""
        own = type(self).model_fields.keys()
        shared = [name for name in EngineConfig.__struct_fields__ if name in own and name != "model"]
        return EngineConfig(model=model_path, **{name: getattr(self, name) for name in shared})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        flags: dict[str, Any] = init_settings()
        path = flags.get("config") or env_settings().get("config")
        return init_settings, env_settings, InitSettingsSource(settings_cls, read_yaml(path) if path else {})


def flag(name: str) -> str:
    return "model" if name == "model" else "--" + name.replace("_", "-")


def _close(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in one YAML file. Raises ConfigError when it cannot be read or holds a setting that does not exist."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"--config {path}: expected a mapping of settings")
    known = [name for name in ServerConfig.model_fields if name != "config"]
    settings = {str(key).replace("-", "_"): value for key, value in data.items()}
    for name in settings:
        if name not in known:
            raise ConfigError(f"--config {path}: unknown setting {name}{_close(name, known)}")
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """One flag per field. Flags that were not given stay absent, so that the other sources can speak."""
    for name in names:
        field = ServerConfig.model_fields[name]
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(field)}
        if name == "model":
            parser.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=options["help"])
        elif field.annotation is bool:
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, **options)
        elif name == "api_key":
            parser.add_argument(flag(name), action="append", metavar="KEY", **options)
        else:
            parser.add_argument(flag(name), metavar=name.rsplit("_", 1)[-1].upper(), **options)


def _help(field: FieldInfo) -> str:
    default = ",".join(field.default) if isinstance(field.default, list) else field.default
    shown = "" if default in (None, "") else f" (default: {default})"
    return f"{field.description}{shown}".replace("%", "%%")


def parse(argv: Sequence[str], prog: str = "outrider serve") -> ServerConfig:
    """The settings from command line, environment and YAML. Raises ConfigError; --help prints and exits."""
    return settings(serve_parser(prog), argv)[0]


def serve_parser(prog: str = "outrider serve") -> argparse.ArgumentParser:
    """The flags of `outrider serve` that are settings. More may be added."""
    parser = _Parser(prog=prog, description="Serve a model over the OpenAI API.", allow_abbrev=False)
    add_flags(parser, ServerConfig.model_fields)
    return parser


def engine_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """For commands that start an engine and serve nobody: the flags that matter to it. More may be added."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    wanted = {*EngineConfig.__struct_fields__, "config", "log_level", "watchdog_timeout"}
    add_flags(parser, [name for name in ServerConfig.model_fields if name in wanted])
    return parser


def settings(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[ServerConfig, dict[str, Any]]:
    """The settings from command line, environment and YAML, and the values of flags that are none of ours."""
    flags, unknown = parser.parse_known_args(list(argv))
    if unknown:
        name = unknown[0].split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        raise ConfigError(f"unknown argument {name}{_close(name, known)}")
    _check_environment()
    ours = {name: value for name, value in vars(flags).items() if name in ServerConfig.model_fields}
    try:
        return ServerConfig(**ours), {name: value for name, value in vars(flags).items() if name not in ours}
    except ValidationError as error:
        raise ConfigError(first_complaint(error)) from None


def first_complaint(error: ValidationError) -> str:
    """The first complaint in one line that names the flag."""
    detail = error.errors(include_url=False)[0]
    name = str(detail["loc"][0]) if detail["loc"] else "configuration"
    given = "" if name == "api_key" else f" (got {detail['input']!r})"  # a key is never printed
    return f"{flag(name)}: {detail['msg'].removeprefix('Value error, ')}{given}"


def _check_environment() -> None:
    """Warn about near misses: OUTRIDER_* variables may be meant for others, so an unknown one is no error.

    Kubernetes gives every pod `OUTRIDER_PORT=tcp://...` when a Service is called "outrider"; that is not our port.
    """
    if os.environ.get(ENV_PREFIX + "PORT", "").startswith(("tcp://", "udp://")):
        del os.environ[ENV_PREFIX + "PORT"]
    known = [name.upper() for name in ServerConfig.model_fields]
    for name in os.environ:
        own = name.removeprefix(ENV_PREFIX)
        if own == name or own in known:
            continue
        if close := difflib.get_close_matches(own, known, n=1, cutoff=0.8):
            sys.stderr.write(f"outrider: the environment variable {name} is no setting; did you mean {ENV_PREFIX}{close[0]}?\n")
