"""Models of other families give transformers' own tokens through paged attention, or are refused with a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models.fallback import FallbackModel
from engine.models.loader import load_config
from tests import models
from tests.engine.models import tiny
from tests.engine.models.dense import Context, Rows, greedy, own_greedy, step

CPU = torch.device("cpu")
GPT = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"word_embed_proj_dim": 64, "ffn_dim": 96}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
FULL = ["full_attention"] * 2

SERVED: dict[str, dict[str, Any]] = {
    "GPTNeoX": {},  # parallel residual, partial rotary
    "GPT2": GPT,  # learned positions, other names for every size
    "GPTBigCode": {**GPT, "num_key_value_heads": 1},
    "OPT": OPT,  # learned positions with an offset, a decoder inside the body
    "Phi": {},
    "Phi3": {"sliding_window": 6},  # the same window on all layers
    "Starcoder2": {"sliding_window": 6},
    "Gemma": {"head_dim": 32},  # scaled embeddings, heads wider than the hidden size
    "Olmo2": {},  # norms after the blocks
    "Granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
    "Cohere": {"logit_scale": 0.5},
    "SmolLM3": {},  # layers without rotary embeddings
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": MOE,
    "Llama": {"partial_rotary_factor": 0.5, "rope_theta": 1e4},  # of our family, but not what the decoder can do
}


def build(family: str, changes: dict[str, Any], folder: Path) -> tuple[Any, Path]:
    made = tiny.model(tiny.config(family, **changes))
    return made, tiny.save(made, folder)


def load(path: Path, dtype: torch.dtype = torch.float32) -> FallbackModel:
    return FallbackModel(str(path), load_config(str(path)), dtype, CPU)


@pytest.fixture(params=SERVED)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, FallbackModel]:
    made, path = build(request.param, SERVED[request.param], tmp_path)
    return made, load(path)


PROMPTS = [[5, 17, 3, 80, 9, 41, 2, 60, 33, 7, 7], [90, 4], [11, 12, 13, 14, 15, 16]]


def test_greedy_tokens_equal_generate(pair: tuple[Any, FallbackModel]) -> None:
    """Three sequences in the same steps, prompts in chunks, against transformers with one sequence alone."""
    made, fallback = pair
    wanted = [own_greedy(made, prompt, 12) for prompt in PROMPTS]
    assert greedy(fallback, PROMPTS, 12, window=fallback.config.sliding_window) == wanted


def test_logits_of_every_row_are_the_models_own(pair: tuple[Any, FallbackModel]) -> None:
    """Random text in chunks, three sequences packed: greedy tokens of a random model repeat, so they alone prove little."""
    made, fallback = pair
    texts = torch.randint(0, 96, (3, 30), generator=torch.Generator().manual_seed(0))
    own = made(input_ids=texts, use_cache=False).logits
    contexts = [Context() for _ in texts]
    for start in range(0, 30, 5):
        rows = [Rows.chain(text[start : start + 5].tolist()) for text in texts]
        hidden, _ = step(fallback, contexts, rows, window=fallback.config.sliding_window)
        ours = fallback.logits(hidden).view(3, 5, -1)
        assert torch.allclose(ours, own[:, start : start + 5], atol=1e-3 * float(own.abs().max()))


def test_the_branches_of_a_tree_do_not_see_each_other(pair: tuple[Any, FallbackModel]) -> None:
    made, fallback = pair
    context, window = Context(), fallback.config.sliding_window
    step(fallback, [context], [Rows.chain(PROMPTS[0])], window=window)
    tree = Rows.tree([21, 22, 23, 24, 25], [-1, 0, 0, 1, 2])
    hidden, _ = step(fallback, [context], [tree], keep=False, window=window)
    logits = fallback.logits(hidden)
    for row, path in ((3, [21, 22, 24]), (4, [21, 23, 25])):
        alone = made(input_ids=torch.tensor([PROMPTS[0] + path]), use_cache=False).logits[0, -1]
        assert torch.allclose(logits[row], alone, atol=1e-3)


def test_hidden_states_of_named_layers(tmp_path: Path) -> None:
    made, path = build("Olmo2", {}, tmp_path)
    fallback = load(path)
    last, hidden = step(fallback, [Context()], [Rows.chain(PROMPTS[0])], hidden_layers=(0,))
    own = made(input_ids=torch.tensor(PROMPTS[:1]), output_hidden_states=True).hidden_states
    assert hidden.keys() == {0}
    assert torch.allclose(hidden[0], own[1][0], atol=1e-4)
    assert torch.allclose(last, own[2][0], atol=1e-4)


def test_two_models_side_by_side(tmp_path: Path) -> None:
    """One runs inside the other's attention: nothing about a forward is global."""
    _, path = build("Olmo2", {}, tmp_path)
    outer, inner = load(path), load(path)
    alone, _ = step(outer, [Context()], [Rows.chain(PROMPTS[0])])

    class Nested:
        def forward(self, token_ids: Any, positions: Any, attend: Any) -> Any:
            def nested(layer: int, q: Any, new: Any, scale: float) -> Any:
                step(inner, [Context()], [Rows.chain(PROMPTS[1])])
                return attend(layer, q, new, scale)

            return outer.forward(token_ids, positions, nested)

    hidden, _ = step(Nested(), [Context()], [Rows.chain(PROMPTS[0])])
    assert torch.equal(hidden, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    made, path = build("Mixtral", SERVED["Mixtral"], tmp_path)
    fallback = load(path, dtype)
    hidden, _ = step(fallback, [Context()], [Rows.chain(PROMPTS[0])])
    logits = fallback.logits(hidden)
    own = made(input_ids=torch.tensor(PROMPTS[:1])).logits[0]
    assert logits.dtype == hidden.dtype == dtype
    assert torch.nn.functional.cosine_similarity(logits.float(), own, dim=-1).median() > 0.99
    assert fallback.weight_bytes == 2 * sum(p.numel() for p in made.parameters())


def test_no_mask_of_tokens_by_tokens_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    _, path = build("GPTNeoX", {}, tmp_path)
    fallback = load(path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was built")

    for name in ("sdpa_mask", "eager_mask", "causal_mask_function"):
        monkeypatch.setattr(masking_utils, name, refuse)
    step(fallback, [Context()], [Rows.chain(PROMPTS[0])])


MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Gemma2", {"head_dim": 16, "layer_types": FULL}, "soft-capped attention scores"),
    ("Gemma2", {"head_dim": 16}, "layers of different kinds: full_attention, sliding_attention"),
    ("GptOss", {"head_dim": 16, "num_local_experts": 4, "layer_types": FULL}, "attention sinks"),
    ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of different kinds: conv, full_attention"),
    (
        "SmolLM3",  # whose masks have the window nevertheless
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9, "use_sliding_window": False},
        "a sliding window that its config switches off",
    ),
    ("Jamba", {"num_experts": 2}, "layers of different kinds"),
    ("Mamba", {"state_size": 4}, "do not work by attention"),
    (
        "DeepseekV3",
        {**MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        "do not fit its config",
    ),
    ("Bloom", {"n_head": 4}, "only 0 of 2 layers attend"),
    ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "cannot be served"),
    ("StableLm", {}, "does not hand keyword arguments down"),
    ("GPTJ", {**GPT, "rotary_dim": 8}, "cannot load this model: its code has no interface for another attention"),
    ("Falcon", {}, "cannot load this model: its code has no interface for another attention"),
    ("Olmo2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic', which depends on"),
    ("Llama", {"hidden_act": "gelu", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
    ("Bert", {"is_decoder": False}, "not causal"),
]


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED)
def test_what_would_give_other_answers_is_refused(family: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    _, path = build(family, changes, tmp_path)
    with pytest.raises(ValueError, match="cannot") as refusal:
        load(path)
    assert words in str(refusal.value)


@pytest.mark.parametrize("family", ["Gemma4Text", "Llama"])
def test_sizes_per_layer_are_refused_before_any_weight_is_read(family: str, tmp_path: Path) -> None:
    """transformers raises for every such size that is asked for; Gemma 4's heads are wider on the layers without a window."""
    config = tiny.config(family)
    if family == "Llama":  # any config.json may have them
        config = tiny.config(family, per_layer_config={0: {"rms_norm_eps": 0.5}})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"models of type {config.model_type} cannot be served: its layers are not of one size"):
        load(tmp_path)


class Tampered(FallbackModel):
    """What a model looks like that mixes tokens in a way without a name."""

    def forward(self, token_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, named = super().forward(token_ids, self.positions(positions), *args, **kwargs)
        return self.mix(hidden), named

    def positions(self, positions: torch.Tensor) -> torch.Tensor:
        return positions

    def mix(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class OwnPositions(Tampered):
    """Counts positions along the row instead of taking ours."""

    def positions(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(positions))


class Convolution(Tampered):
    """Looks at the rows before it, whosever they are."""

    def mix(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.5 * torch.cat((hidden[:2] * 0, hidden[:-2]))


@pytest.mark.parametrize("kind", [OwnPositions, Convolution])
def test_the_trial_catches_what_has_no_name(kind: type[FallbackModel], tmp_path: Path) -> None:
    _, path = build("GPT2", GPT, tmp_path)
    load(path)
    with pytest.raises(ValueError, match="with paged attention its logits differ"):
        kind(str(path), load_config(str(path)), torch.float32, CPU)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    _, path = build("Phi", {}, tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.fc1.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor model\.layers\.1\.mlp\.fc1\.weight is missing"):
        load(path)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    _, path = build("Phi", {}, tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot load this model"):
        load(path)


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    _, path = build("Phi", {}, tmp_path)
    trap = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass C: pass\n")
    config = (path / "config.json").read_text().replace('"model_type": "phi"', '"model_type": "evil"')
    config = config.replace("{", '{"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"},', 1)
    (path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="does not know this model: it needs the code that comes with it") as refusal:
        load(path)
    assert "trust_remote_code" not in str(refusal.value)  # which there is no way to pass
    assert not trap.exists()
    # of a family that transformers knows, its own class is taken
    (path / "config.json").write_text(config.replace('"model_type": "evil"', '"model_type": "phi"'))
    assert type(load(path).model).__name__ == "PhiForCausalLM"
    assert not trap.exists()


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    made, path = build("Phi", {}, tmp_path)
    (path / "model.safetensors").unlink()
    torch.save(made.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load this model"):
        load(path)


def test_only_directories(smollm2_gguf: Path) -> None:
    with pytest.raises(ValueError, match="only Hugging Face directories"):
        load(smollm2_gguf)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_kv_heads": 4}, "do not fit its config"),
        ({"num_layers": 3}, "only 2 of 3 layers attend"),
        ({"sliding_window": 9}, "layer 0 has a sliding window of 6, the config says 9"),
        ({"sliding_window": None}, "layer 0 has a sliding window of 6, the config says None"),
        ({"vocab_size": 95}, "not one per vocabulary entry"),
    ],
)
def test_a_config_that_the_model_contradicts(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    _, path = build("Phi3", SERVED["Phi3"], tmp_path)
    config = msgspec.structs.replace(load_config(str(path)), **changes)
    with pytest.raises(ValueError, match=words):
        FallbackModel(str(path), config, torch.float32, CPU)


def test_our_kernels_package_is_not_taken_for_another(tmp_path: Path) -> None:
    """transformers looks for a distribution called `kernels`; finding ours, it must neither use nor break on it."""
    _, path = build("GPTNeoX", {}, tmp_path)
    code = (
        "import kernels, torch\n"
        "from transformers.utils import is_kernels_available\n"
        "from engine.models.fallback import FallbackModel\n"
        "from engine.models.loader import load_config\n"
        f"FallbackModel({str(path)!r}, load_config({str(path)!r}), torch.float32, torch.device('cpu'))\n"
        "print(is_kernels_available(), kernels.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=models.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", str(models.ROOT / "kernels" / "__init__.py")]
