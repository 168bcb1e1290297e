"""float32 greedy tokens and logprobs equal transformers' on SmolLM2, alone and sixteen at a time.

transformers judges whole answers at once: if its argmax after every prefix of our answer is our next token, its `generate`
would have written the same answer. `generate` itself runs on a few prompts to show that the two ways agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engine.messages import TokenLogprobs
from engine.worker import Worker
from tests.engine.real import Answer, answers, load_worker, make_engine, request
from tests.prompts import PROMPTS

MAX_TOKENS = 64
NUM_PROMPTS = 50
TOLERANCE = 1e-3  # of a logprob


@pytest.fixture(scope="module")
def worker(smollm2_dir: Path) -> Worker:
    return load_worker(smollm2_dir)


@pytest.fixture(scope="module")
def theirs(smollm2_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(smollm2_dir: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    texts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in PROMPTS]
    return [tokenizer.encode(text).ids for text in texts[:NUM_PROMPTS]]


def ours(worker: Worker, prompts: list[list[int]], at_a_time: int) -> list[Answer]:
    engine = make_engine(worker)
    found: dict[tuple[str, int], Answer] = {}
    requests = [
        request(str(i), prompt, max_tokens=MAX_TOKENS, temperature=0.0, logprobs=5, prompt_logprobs=1 if i % 10 == 0 else None)
        for i, prompt in enumerate(prompts)
    ]
    for first in range(0, len(requests), at_a_time):
        found |= answers(engine, requests[first : first + at_a_time])
    return [found[str(i), 0] for i in range(len(prompts))]


def check(theirs: Any, prompt: list[int], found: Sequence[Answer]) -> None:
    """Answers to one prompt, of which transformers judges the first; the others must be the same."""
    tokens = found[0].tokens
    with torch.inference_mode():
        logprobs = torch.log_softmax(theirs(torch.tensor([prompt + tokens])).logits[0], -1)
    rows = logprobs[len(prompt) - 1 : -1]
    assert rows.argmax(-1).tolist() == tokens
    for answer in found:
        assert answer.tokens == tokens
        assert answer.finish_reason in ("length", "stop")
        for row, token, entry in zip(rows, tokens, answer.logprobs, strict=True):
            compare(row, token, entry)
            assert entry.rank == 1
        for position, of_prompt in enumerate(answer.prompt_logprobs or []):
            if of_prompt is not None:
                compare(logprobs[position - 1], prompt[position], of_prompt)


def compare(row: torch.Tensor, token: int, found: TokenLogprobs) -> None:
    assert found.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
    for other, logprob in found.top:
        assert logprob == pytest.approx(float(row[other]), abs=TOLERANCE)
    assert found.top[0][1] == pytest.approx(float(row.max()), abs=TOLERANCE)


@pytest.mark.timeout(480)  # of one row at a time, 3,200 steps for all of them: minutes on one busy core
@pytest.mark.parametrize("count_alone", [6, pytest.param(NUM_PROMPTS, marks=pytest.mark.long)])
def test_greedy_tokens_and_logprobs(count_alone: int, worker: Worker, theirs: Any, prompts: list[list[int]]) -> None:
    assert len(prompts) == NUM_PROMPTS
    alone, together = ours(worker, prompts[:count_alone], 1), ours(worker, prompts, 16)
    for i, (prompt, answer) in enumerate(zip(prompts, together, strict=True)):
        check(theirs, prompt, [answer, *alone[i : i + 1]])


def test_generate_itself_agrees(worker: Worker, theirs: Any, prompts: list[list[int]]) -> None:
    chosen = prompts[:4]
    for prompt, answer in zip(chosen, ours(worker, chosen, 4), strict=True):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False)
        assert out[0, len(prompt) :].tolist() == answer.tokens
