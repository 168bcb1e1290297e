"""The native decoder against transformers, in float32: every flag, every rotary scaling, prompts longer than the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer

from engine.config import EngineConfig
from engine.models.decoder import Decoder
from engine.models.factory import load_model
from engine.models.loader import iter_weights, load_config
from tests.engine.models import tiny
from tests.engine.models.dense import Context, Rows, own_greedy, step
from tests.engine.real import answers, load_worker, make_engine, request

CPU = torch.device("cpu")
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied, wide heads": ("Llama", {"tie_word_embeddings": True, "head_dim": 24, "num_key_value_heads": 4}),
    "llama, one key-value head": ("Llama", {"num_key_value_heads": 1, "rms_norm_eps": 0.1}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}}),
    "llama yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}}),
    "mistral, window 7": ("Mistral", {"sliding_window": 7}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window 7": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {}),
    "qwen3 biases, yarn": (
        "Qwen3",
        {"attention_bias": True, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    ),
    # three heads of 32 beside a hidden size of 64: sizes that a config class would refuse for a Llama
    "qwen3, odd heads, llama3": (
        "Qwen3",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3},
        },
    ),
}


def served(path: Path, dtype: torch.dtype) -> Decoder:
    """As `load`, but by the way that a server goes."""
    made = load_model(EngineConfig(model=str(path), cpu_kernels="torch"), load_config(str(path)), dtype, CPU)
    assert isinstance(made, Decoder)
    return made


def load(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    config = load_config(str(path))
    return Decoder(config, iter_weights(str(path), config, dtype), dtype, CPU)


@pytest.fixture(params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    family, changes = VARIANTS[request.param]
    made = tiny.model(tiny.config(family, **changes))
    return made, tiny.save(made, tmp_path)


def texts(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(0))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_logits_of_every_row(pair: tuple[Any, Path]) -> None:
    """Three packed sequences in chunks, six times longer than the window."""
    made, path = pair
    decoder, prompts = load(path), texts(3, 42)
    own = made(input_ids=prompts, use_cache=False).logits
    contexts = [Context() for _ in prompts]
    for start in range(0, 42, 6):
        rows = [Rows.chain(prompt[start : start + 6].tolist()) for prompt in prompts]
        hidden, _ = step(decoder, contexts, rows, window=decoder.config.sliding_window)
        assert close(decoder.logits(hidden).view(3, 6, -1), own[:, start : start + 6])


def test_trees(pair: tuple[Any, Path]) -> None:
    made, path = pair
    decoder, prompt, context = load(path), texts(1, 20)[0].tolist(), Context()
    window = decoder.config.sliding_window
    step(decoder, [context], [Rows.chain(prompt)], window=window)
    tree = Rows.tree([21, 22, 23, 24, 25], [-1, 0, 0, 1, 2])
    hidden, _ = step(decoder, [context], [tree], keep=False, window=window)
    logits = decoder.logits(hidden)
    for row, branch in ((3, [21, 22, 24]), (4, [21, 23, 25])):
        assert close(logits[row], made(input_ids=torch.tensor([prompt + branch]), use_cache=False).logits[0, -1])


def test_hidden_states_of_named_layers(pair: tuple[Any, Path]) -> None:
    made, path = pair
    decoder, prompt = load(path), texts(1, 6)
    own = made(input_ids=prompt, output_hidden_states=True).hidden_states
    _, hidden = step(decoder, [Context()], [Rows.chain(prompt[0].tolist())], hidden_layers=(0,), window=7)
    assert hidden.keys() == {0}
    assert close(hidden[0], own[1][0])


def test_the_whole_engine(pair: tuple[Any, Path]) -> None:
    """Paged attention, chunked prompts and drafts in between: greedy tokens are those of `generate`."""
    made, path = pair
    worker = load_worker(path)
    prompts = [[int(t) for t in row] for row in texts(4, 33)]
    prompts = [prompt[: 33 - 9 * i] for i, prompt in enumerate(prompts)]
    wanted = [own_greedy(made, prompt, 24) for prompt in prompts]
    for drafters in ([], ["ngram"]):
        engine = make_engine(worker, drafters, max_num_batched_tokens=16)
        asked = [request(str(i), p, max_tokens=24, temperature=0.0, ignore_eos=True) for i, p in enumerate(prompts)]
        found = answers(engine, asked)
        assert [found[str(i), 0].tokens for i in range(4)] == wanted


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_from_gguf(family: str, tmp_path: Path) -> None:
    """The rotary order of GGUF's Llamas, undone, is the order that the decoder rotates in."""
    made = tiny.model(tiny.config(family))
    decoder = load(tiny.write_gguf(made, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.F32))
    prompts = texts(2, 12)
    hidden, _ = step(decoder, [Context(), Context()], [Rows.chain(p.tolist()) for p in prompts])
    assert close(decoder.logits(hidden).view(2, 12, -1), made(input_ids=prompts, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gguf_file_is_rounded_once_and_to_the_dtype_that_was_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    made = tiny.model(tiny.config("Qwen2"))
    decoder = served(tiny.write_gguf(made, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.F32), dtype)
    assert torch.equal(decoder.embedding, made.model.embed_tokens.weight.to(dtype))
    if dtype == torch.float32:
        prompts = texts(2, 12)
        hidden, _ = step(decoder, [Context(), Context()], [Rows.chain(p.tolist()) for p in prompts])
        assert close(decoder.logits(hidden).view(2, 12, -1), made(input_ids=prompts, use_cache=False).logits)


def test_the_fallback_serves_through_the_engine(tmp_path: Path) -> None:
    """Another family, and one of ours forced through transformers: the same paged attention, the same tokens."""
    phi = tiny.model(tiny.config("Phi"))
    mistral = tiny.model(tiny.config("Mistral", sliding_window=7))
    for made, options in ((phi, {}), (mistral, {"load_format": "transformers"})):
        path = tiny.save(made, tmp_path / type(made).__name__)
        engine = make_engine(load_worker(path, **options), ["ngram"], max_num_batched_tokens=16)
        prompts = [[int(t) for t in row] for row in texts(3, 20)]
        asked = [request(str(i), p, max_tokens=16, temperature=0.0, ignore_eos=True) for i, p in enumerate(prompts)]
        found = answers(engine, asked)
        assert [found[str(i), 0].tokens for i in range(3)] == [own_greedy(made, p, 16) for p in prompts]


@pytest.mark.parametrize("rounded", [True, False])
def test_smollm2(rounded: bool, smollm2_dir: Path, smollm2_gguf: Path) -> None:
    """A real model, all logits of a prompt: our decoder on its 4-bit file, transformers on the converted directory, and on that
    with the weights in float32, which the directory holds rounded to bfloat16."""
    from transformers import AutoModelForCausalLM

    config = load_config(str(smollm2_gguf))
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval().requires_grad_(False)
    if not rounded:
        whole = dict(iter_weights(str(smollm2_gguf), config, torch.float32))
        assert theirs.load_state_dict(whole, strict=False) == (["lm_head.weight"], [])  # which is tied
        del whole
    prompt = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json")).encode("The three primary colours are").ids
    own = theirs(input_ids=torch.tensor([prompt])).logits[0]
    del theirs
    if rounded:
        decoder = Decoder(config, iter_weights(str(smollm2_gguf), config), torch.float32, CPU)
    else:
        decoder = served(smollm2_gguf, torch.float32)
    hidden, _ = step(decoder, [Context()], [Rows.chain(prompt)])
    assert close(decoder.logits(hidden), own)
