"""What a model is, in numbers: read from a Hugging Face config.json. A leaf: no torch, no file access, no weights.

The Llama family is one decoder with flags; this says which flags. `unsupported` says why the native decoder cannot run a
model, in words for the person who started the server; such a model goes through engine/models/fallback.py instead.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from engine.models.quantization import Quantization, read_quantization

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What transformers' config classes assume where config.json is silent.
_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {  # required keys
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
MAX_LAYERS = 4096  # a damaged file must not make us count to two billion
_ROPE_OPTIONS = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A causal language model's shape and flags. Sizes in elements, lengths in tokens."""

    architecture: str  # llama | mistral | qwen2 | qwen3, or the model type of anything else
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # 0 where the config of another architecture does not say
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": linear | llama3 | yarn, its numbers}; None = plain rotary
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on the query, key and value projections
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's query and key, before the rotation
    sliding_window: int | None = None  # every layer sees the last `sliding_window` tokens, its own included
    hidden_act: str = "silu"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = "float32"  # of the stored weights: bfloat16 | float16 | float32
    quantization: Quantization | None = None  # of the linear layers
    unsupported: str | None = None

    @property
    def supported(self) -> bool:
        """Whether the native decoder runs this model."""
        return self.unsupported is None

    @classmethod
    def from_hf(cls, config: dict[str, Any], generation_config: dict[str, Any] | None = None) -> ModelConfig:
        """Read the contents of config.json (written by transformers 4 or 5) and generation_config.json.

        Of an architecture outside the Llama family the numbers must bear their standard names (engine/models/foreign.py).
        Raises ValueError naming the key when a number is missing, of the wrong type or out of range.
        """
        architecture = _architecture(config)
        text = config.get("text_config")
        config = {**_DEFAULTS.get(architecture, {}), **config, **(text if isinstance(text, dict) else {})}
        get = _Reader(config)
        heads, hidden = get.integer("num_attention_heads"), get.integer("hidden_size")
        native = architecture in _DEFAULTS
        bias = get.flag("attention_bias")
        length = get.integer("max_position_embeddings", None if native else 2048)
        theta, scaling, rope_problem = _rope(get, length) if native else (10000.0, None, None)
        window, window_problem = _window(get, architecture)
        act = get.text("hidden_act", "silu")
        vocab = get.integer("vocab_size")
        generation = generation_config or {}
        made = cls(
            architecture=architecture,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=get.integer("intermediate_size", None if native else 0, low=0),
            num_layers=get.integer("num_hidden_layers", high=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=get.integer("num_key_value_heads", heads),
            head_dim=get.integer("head_dim", max(hidden // heads, 1)),
            rms_norm_eps=get.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=length,
            tie_word_embeddings=get.flag("tie_word_embeddings", not native),
            attention_bias=bias if architecture in ("llama", "qwen3") else architecture == "qwen2",
            attention_out_bias=bias and architecture in ("llama", "qwen3"),
            mlp_bias=get.flag("mlp_bias") and architecture == "llama",
            qk_norm=architecture == "qwen3",
            sliding_window=window,
            hidden_act="silu" if act == "swish" else act,
            eos_token_ids=_token_ids(generation, "eos_token_id", vocab) or _token_ids(config, "eos_token_id", vocab),
            bos_token_id=next(iter(_token_ids(config, "bos_token_id", vocab)), None),
            dtype=_dtype(config),
        )
        quantization, quantization_problem = read_quantization(config)
        unequal = "sizes per layer" if config.get("per_layer_config") else None
        problem = quantization_problem or _foreign(made) or unequal or rope_problem or window_problem
        return msgspec.structs.replace(made, quantization=quantization, unsupported=problem)


def is_native(config: dict[str, Any]) -> bool:
    """Whether config.json describes a model of the Llama family (it may still use something our decoder lacks)."""
    return _architecture(config) in _DEFAULTS


def check_shape(config: ModelConfig) -> str | None:
    """Why these numbers cannot be a decoder of the Llama family, or None."""
    if config.num_heads % config.num_kv_heads:
        return f"{config.num_heads} attention heads do not divide by {config.num_kv_heads} key-value heads"
    if config.head_dim % 2:
        return f"head_dim {config.head_dim} is odd; rotary embeddings need pairs"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act!r} is not silu"
    return None


def _foreign(config: ModelConfig) -> str | None:
    if config.architecture not in _DEFAULTS:
        return f"the architecture {config.architecture!r} is not of the Llama family"
    return check_shape(config)


def _architecture(config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    names = config.get("architectures") or []
    if isinstance(names, list) and names and isinstance(names[0], str):
        return _FAMILIES.get(names[0], kind if isinstance(kind, str) and kind not in _DEFAULTS else names[0])
    if not isinstance(kind, str) or not kind:
        raise ValueError("config.json names neither `architectures` nor `model_type`: it is not a Hugging Face model config")
    return kind


def _rope(get: _Reader, length: int) -> tuple[float, dict[str, Any] | None, str | None]:
    """Base, scaling and what is wrong with them. transformers 5 writes `rope_parameters`, transformers 4 two keys.

    Of both transformers takes `rope_scaling` alone, which people add to a file to serve longer texts. Raises ValueError
    where something that the other says would be lost.
    """
    new, old = (get.values.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    for given in (new, old):
        if not isinstance(given, dict):
            raise ValueError(f"config.json: the rotary parameters must be an object, got {given!r}")
    found, other = (_rope_of(get, given, length) for given in (old or new, new or old))
    plain = (found[0], None, None)
    if other not in (found, plain):
        raise ValueError(
            f"config.json: rope_scaling and rope_parameters disagree ({_in_words(found)}; {_in_words(other)});"
            " put what is wanted into rope_parameters and remove rope_scaling"
        )
    return found


def _in_words(rope: tuple[float, dict[str, Any] | None, str | None]) -> str:
    theta, scaling, problem = rope
    return f"rope_theta {theta:g}, {problem or scaling or 'no scaling'}"


def _rope_of(get: _Reader, given: dict[str, Any], length: int) -> tuple[float, dict[str, Any] | None, str | None]:
    theta = _Reader({"rope_theta": given.get("rope_theta", get.values.get("rope_theta"))}).number("rope_theta", 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    partial = given.get("partial_rotary_factor", get.values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        return theta, None, f"rotary embeddings over a part of each head ({partial})"
    if kind == "default":
        return theta, None, "rotary parameters per layer type" if any(isinstance(v, dict) for v in given.values()) else None
    if kind not in _ROPE_NUMBERS:
        return theta, None, f"rotary scaling of type {kind!r}"
    scaling = {"rope_type": kind, **{key: given[key] for key in _ROPE_OPTIONS.get(kind, ()) if given.get(key) is not None}}
    if "original_max_position_embeddings" in _ROPE_NUMBERS[kind]:
        original = get.integer("original_max_position_embeddings", length)
        given = {**given, "original_max_position_embeddings": given.get("original_max_position_embeddings") or original}
    for key in _ROPE_NUMBERS[kind]:
        scaling[key] = _Reader(given).number(key)
    return theta, scaling, None


def _window(get: _Reader, architecture: str) -> tuple[int | None, str | None]:
    """The sliding window that all layers share, or what is wrong: a pattern of layers with and without one."""
    if architecture == "llama" or not get.flag("use_sliding_window", architecture not in ("qwen2", "qwen3")):
        return None, None
    if get.values.get("sliding_window") is None:
        return None, None
    window = get.integer("sliding_window")
    layers = get.values.get("layer_types")
    if layers is None and architecture not in ("qwen2", "qwen3"):
        return window, None
    if layers is None:
        count, first = get.integer("num_hidden_layers", high=MAX_LAYERS), get.integer("max_window_layers", 28, low=0)
        layers = ["sliding_attention" if layer >= first else "full_attention" for layer in range(count)]
    kinds = set(layers)
    if kinds == {"full_attention"}:
        return None, None
    if kinds == {"sliding_attention"}:
        return window, None
    return None, "layers of different kinds: " + ", ".join(sorted(map(str, kinds)))


def _token_ids(config: dict[str, Any], key: str, vocab_size: int) -> tuple[int, ...]:
    """Ids of a special token. Those outside the vocabulary are dropped: the model can never emit them."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise ValueError(f"config.json: {key} must be a token id or a list of them, got {value!r}")
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))


def _dtype(config: dict[str, Any]) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"config.json: dtype {name!r} is not one of bfloat16, float16, float32")
    return str(name)


class _Reader:
    """Typed, range-checked access to a JSON object; null counts as absent."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"config.json lacks {key}")
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"config.json: {key} must be an integer between {low} and {high}, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"config.json lacks {key}")
        if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"config.json: {key} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {key} must be true or false, got {value!r}")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        return value if isinstance(value, str) else default
