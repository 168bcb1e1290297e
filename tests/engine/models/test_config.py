"""ModelConfig says of a model what transformers' own config classes say, defaults included, and refuses nonsense by name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from engine.models.config import ModelConfig
from tests.engine.models import tiny

MINIMAL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def minimal(family: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), **MINIMAL, **changes}


def full(family: str, **changes: Any) -> dict[str, Any]:
    """The same config after transformers filled in its defaults; transformers 5 writes it in another form."""
    values = tiny.config(family, **changes).to_dict()
    return {**values, "architectures": [f"{family}ForCausalLM"]}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 9},
        {"sliding_window": None},
    ],
)
def test_what_is_left_out_means_what_transformers_takes_it_to_mean(family: str, changes: dict[str, Any]) -> None:
    import transformers

    written = minimal(family, **changes)
    known = {**transformers.AutoConfig.for_model(**written).to_dict(), "architectures": written["architectures"]}
    assert ModelConfig.from_hf(written) == ModelConfig.from_hf(known)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flags_of_each_family(family: str) -> None:
    config = ModelConfig.from_hf(full(family))
    flags = (config.attention_bias, config.attention_out_bias, config.mlp_bias, config.qk_norm, config.sliding_window)
    assert (
        flags
        == {
            "Llama": (False, False, False, False, None),
            "Mistral": (False, False, False, False, 7),
            "Qwen2": (True, False, False, False, None),
            "Qwen3": (False, False, False, True, None),
        }[family]
    )
    assert config.architecture == family.lower()
    assert config.head_dim == (32 if family == "Qwen3" else 16)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.vocab_size) == (2, 4, 2, 96)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
    assert config.supported


def test_biases_are_read_where_the_family_has_them() -> None:
    llama = ModelConfig.from_hf(minimal("Llama", attention_bias=True, mlp_bias=True))
    assert (llama.attention_bias, llama.attention_out_bias, llama.mlp_bias) == (True, True, True)
    mistral = ModelConfig.from_hf(minimal("Mistral", attention_bias=True, mlp_bias=True))
    assert (mistral.attention_bias, mistral.attention_out_bias, mistral.mlp_bias) == (False, False, False)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_rotary_scaling_in_the_form_of_either_transformers(kind: str, form: str) -> None:
    numbers: dict[str, Any] = {"factor": 8.0}
    if kind == "llama3":
        numbers |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind != "linear":
        numbers |= {"original_max_position_embeddings": 32}
    if kind == "yarn":
        numbers |= {"beta_fast": 16.0, "truncate": False}
    given: dict[str, Any] = {form: {"rope_type": kind, **numbers}}
    if form == "rope_parameters":
        given[form]["rope_theta"] = 5e5
    else:
        given["rope_theta"] = 5e5
    config = ModelConfig.from_hf(minimal("Llama", **given))
    assert config.supported
    assert config.rope_theta == 5e5
    assert config.rope_scaling == {"rope_type": kind, **numbers}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "given",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": YARN},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {**YARN, "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": YARN, "rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, **YARN}, "rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, **YARN}, "rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 5e5, **YARN}, "rope_scaling": None, "rope_theta": 1e6},
    ],
)
def test_rope_scaling_beside_rope_parameters_is_what_transformers_takes(given: dict[str, Any]) -> None:
    import transformers

    written = minimal("Llama", **given)
    known = transformers.AutoConfig.for_model(**json.loads(json.dumps(written))).rope_parameters
    config = ModelConfig.from_hf(written)
    assert config.supported
    assert (config.rope_theta, config.rope_scaling) == (known["rope_theta"], YARN)


@pytest.mark.parametrize(
    "given",
    [
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": YARN},  # transformers would go on with a base of 10,000
        {"rope_parameters": {"rope_theta": 1e4, **YARN}, "rope_scaling": {**YARN, "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1e4, **YARN}, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "rope_scaling": YARN},
    ],
)
def test_rope_scaling_that_contradicts_rope_parameters_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters disagree"):
        ModelConfig.from_hf(minimal("Llama", **given))


def test_original_length_may_stand_beside_the_scaling() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    top = ModelConfig.from_hf(minimal("Llama", rope_scaling=scaling, original_max_position_embeddings=64))
    none = ModelConfig.from_hf(minimal("Llama", rope_scaling=scaling, max_position_embeddings=512))
    assert (top.rope_scaling or {})["original_max_position_embeddings"] == 64
    assert (none.rope_scaling or {})["original_max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"head_dim": 15}, "odd"),
        ({"num_attention_heads": 3, "hidden_size": 48}, "divide"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.bits"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ],
)
def test_what_the_decoder_lacks_is_said_in_words(changes: dict[str, Any], word: str) -> None:
    config = ModelConfig.from_hf(minimal("Llama", **changes))
    assert not config.supported
    assert config.unsupported is not None
    assert word in config.unsupported


def test_a_pattern_of_windows_is_not_ours() -> None:
    changes = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    config = ModelConfig.from_hf(minimal("Qwen2", **changes))
    assert config.unsupported == "layers of different kinds: full_attention, sliding_attention"
    assert ModelConfig.from_hf(full("Qwen2", **changes)).unsupported == config.unsupported


def test_the_text_part_of_a_larger_model_is_not_a_llama() -> None:
    config = {"architectures": ["SomeVisionModel"], "model_type": "vision", "text_config": {**minimal("Llama")}}
    read = ModelConfig.from_hf(config)
    assert read.vocab_size == 96
    assert not read.supported


def test_end_tokens() -> None:
    config = minimal("Llama", eos_token_id=3)
    assert ModelConfig.from_hf(config).eos_token_ids == (3,)
    assert ModelConfig.from_hf(config, {"eos_token_id": [5, 3, 5]}).eos_token_ids == (5, 3)
    assert ModelConfig.from_hf(config, {"eos_token_id": None}).eos_token_ids == (3,)
    # an id beyond the vocabulary can never be emitted, and must not reach a mask
    assert ModelConfig.from_hf(config, {"eos_token_id": [96, 4]}).eos_token_ids == (4,)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 1.5, "8", True, [8]])
def test_numbers_out_of_range_are_errors_that_name_the_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        ModelConfig.from_hf(minimal("Llama", **{key: value}))


@pytest.mark.parametrize("key", [k for k in MINIMAL if k != "num_key_value_heads"])
def test_missing_numbers_are_errors_that_name_the_key(key: str) -> None:
    config = minimal("Llama")
    del config[key]
    with pytest.raises(ValueError, match=key):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": [1]}, "rotary"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_values_of_the_wrong_kind_are_errors(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        ModelConfig.from_hf(minimal("Llama", **changes))


def test_something_else_is_not_a_model_config() -> None:
    with pytest.raises(ValueError, match="not a Hugging Face model config"):
        ModelConfig.from_hf({"name": "package.json"})


def test_it_survives_the_wire() -> None:
    config = ModelConfig.from_hf(minimal("Llama", rope_scaling={"rope_type": "linear", "factor": 2.0}))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=ModelConfig) == config
