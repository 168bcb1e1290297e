"""A toy language model behind the Executor protocol: no torch, no weights, the real bookkeeping.

The model is a hash chain. The KV entry of a token is a hash of the KV entry before it and the token itself, read from
and written to paged slots through the block tables of the plan, and the next token is a function of the last entry, the
seed and the sample index. So a block that was shared wrongly, overwritten or not compacted gives other tokens than
`rollout`, which computes the same chain from the request alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from engine.messages import EngineInfo, TokenLogprobs
from engine.plan import Row, RowResult, StepPlan, StepResult, StepTimes
from engine.protocols import Policy
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest

VOCAB_SIZE = 64
EOS = 1
MASK = (1 << 61) - 1
EMPTY = -1  # a slot that was never written

# (truth(depth, path) -> the token the model would emit, budget, rng) -> tokens and parents of the nodes below the root
Guess = Callable[[Callable[[list[int]], int], int, random.Random], tuple[list[int], list[int]]]


def kv_entry(before: int, token: int) -> int:
    return (before * 6364136223846793005 + token * 1442695040888963407 + 1013904223) & MASK


def next_token(entry: int, request: Request, sample_index: int) -> int:
    mixed = entry ^ (request.params.seed * 0x9E3779B97F4A7C15) ^ (sample_index * 0xC2B2AE3D27D4EB4F)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return (mixed ^ (mixed >> 31)) % VOCAB_SIZE


def rollout(request: Request, sample_index: int = 0, eos_ids: frozenset[int] = frozenset({EOS})) -> Sequence:
    """The finished sequence that any schedule must arrive at."""
    seq = Sequence(0, request, sample_index, eos_ids)
    entry = 0
    for token in seq.tokens:
        entry = kv_entry(entry, token)
    while not seq.finished:
        seq.commit([next_token(entry, request, sample_index)])
        entry = kv_entry(entry, seq.tokens[-1])
    return seq


def no_guess(truth: Callable[[list[int]], int], budget: int, rng: random.Random) -> tuple[list[int], list[int]]:
    return [], []


def good_guess(truth: Callable[[list[int]], int], budget: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """A chain that is always right."""
    path: list[int] = []
    for _ in range(budget):
        path.append(truth(path))
    return path, list(range(budget))


def garbage(truth: Callable[[list[int]], int], budget: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """A random tree of random tokens: twins among siblings, out of luck mostly."""
    return [rng.randrange(VOCAB_SIZE) for _ in range(budget)], [rng.randrange(i + 1) for i in range(budget)]


def mixed_guess(truth: Callable[[list[int]], int], budget: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """A random tree of random size whose nodes are right two times out of three."""
    paths: list[list[int]] = [[]]
    parents: list[int] = []
    for i in range(rng.randint(0, budget)):
        parents.append(rng.choice([i, rng.randrange(i + 1)]))
        path = paths[parents[-1]]
        paths.append([*path, truth(path) if rng.random() < 0.67 else rng.randrange(VOCAB_SIZE)])
    return [path[-1] for path in paths[1:]], parents


def fake_info(**changes: object) -> EngineInfo:
    values: dict[str, object] = {
        "model": "fake",
        "architecture": "hash chain",
        "vocab_size": VOCAB_SIZE,
        "max_model_len": 512,
        "dtype": "int",
        "device": "none",
        "backend": "fake",
        "drafters": ["fake"],
        "verifier": "match",
        "lossless": True,
        "policy": "fixed",
        "budget": 8,
        "weight_bytes": 0,
        "kv_bytes": 0,
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "load_seconds": 0.0,
        "eos_ids": [EOS],
        "prediction_drafters": ["prediction"],
    }
    return EngineInfo(**(values | changes))  # type: ignore[arg-type]  # values of many types


class FakeExecutor:
    """Executes plans with the toy model. `guess` drafts; `fail` names request ids whose next row ends in an error."""

    def __init__(self, info: EngineInfo | None = None, guess: Guess = mixed_guess, drafter: str = "fake", seed: int = 0) -> None:
        self.info = info or fake_info()
        self.guess = guess
        self.drafter = drafter
        self.rng = random.Random(seed)
        self.fail: set[str] = set()
        self.seqs: dict[int, Sequence] = {}
        self.plans: list[StepPlan] = []
        self.keep_plans = True
        self.reread = True  # read every slot of the context, not only the last
        self.closed = False
        self._kv = [EMPTY] * (self.info.num_blocks * self.info.block_size)

    def guide(self, policy: Policy) -> None:
        """Nothing that it drafts is trimmed."""

    def execute(self, plan: StepPlan) -> StepResult:
        if self.keep_plans:
            self.plans.append(plan)
        for seq_id in plan.removed:
            del self.seqs[seq_id]
        for new in plan.new:
            self.seqs[new.seq_id] = Sequence(new.seq_id, new.request, new.sample_index, frozenset(self.info.eos_ids))
        rows = [self._row(self.seqs[row.seq_id], row) for row in plan.rows]
        num_tokens = sum(row.num_new for row in plan.rows) + sum(row.num_draft for row in rows)
        return StepResult(rows, StepTimes(forward=1e-6), num_tokens)

    def close(self) -> None:
        self.closed = True

    def _slot(self, seq: Sequence, position: int) -> int:
        size = self.info.block_size
        return seq.block_ids[position // size] * size + position % size

    def _context(self, seq: Sequence) -> int:
        """The KV entry of the last computed token, as the paged memory has it."""
        if self.reread:
            entry = 0
            for position in range(seq.num_computed):
                entry = kv_entry(entry, seq.tokens[position])
                assert self._kv[self._slot(seq, position)] == entry, f"position {position} of {seq.seq_id} holds something else"
        return self._kv[self._slot(seq, seq.num_computed - 1)] if seq.num_computed else 0

    def _row(self, seq: Sequence, row: Row) -> RowResult:
        seq.block_ids = list(row.block_ids) if row.reset else seq.block_ids + row.block_ids
        seq.num_computed = row.num_computed
        if seq.request.request_id in self.fail:
            return RowResult(seq.seq_id, [], error="not a number")
        entry = self._context(seq)
        last = row.num_computed + row.num_new
        for position in range(row.num_computed, last):
            entry = kv_entry(entry, seq.tokens[position])
            self._kv[self._slot(seq, position)] = entry
        result = self._judge(seq, row, entry) if last == seq.num_tokens else RowResult(seq.seq_id, [])
        if seq.params.prompt_logprobs is not None:
            fed = seq.tokens[row.num_computed + 1 : min(last + 1, seq.num_prompt)]
            result.prompt_logprobs = [TokenLogprobs(-float(token), 1, []) for token in fed]
        seq.num_computed = last + result.num_accepted
        seq.commit(result.token_ids)
        return result

    def _judge(self, seq: Sequence, row: Row, root: int) -> RowResult:
        """Draft a tree, write its nodes behind the root in node order, descend by the match rule, pack the path."""

        def token_after(entry: int) -> int:
            return next_token(entry, seq.request, seq.sample_index)

        def truth(path: list[int]) -> int:
            entry = root
            for token in path:
                entry = kv_entry(entry, token)
            return token_after(entry)

        tokens, parents = self.guess(truth, row.budget, self.rng)
        assert len(tokens) <= row.budget
        forest = DraftForest.from_parents([([seq.tokens[-1], *tokens], [-1, *parents])], [self.drafter])
        base = row.num_computed + row.num_new - 1
        entries = [root]
        for node in range(1, forest.size(0)):
            entries.append(kv_entry(entries[forest.parent[node]], int(forest.token[node])))
            self._kv[self._slot(seq, base + node)] = entries[node]
        node, path, verdict = 0, [], []
        while True:
            verdict.append(token_after(entries[node]))
            children = [i for i in range(node + 1, forest.size(0)) if forest.parent[i] == node and forest.token[i] == verdict[-1]]
            if not children:
                break
            node = children[0]
            path.append(node)
        packed = [self._kv[self._slot(seq, base + node)] for node in path]
        for i, entry in enumerate(packed, start=1):
            self._kv[self._slot(seq, base + i)] = entry
        logprobs = None if seq.params.logprobs is None else [TokenLogprobs(-float(token), 1, []) for token in verdict]
        return RowResult(seq.seq_id, verdict, len(tokens), self.drafter if tokens else "", logprobs)


def make_request(
    request_id: str = "r",
    prompt: list[int] | int = 5,
    max_tokens: int = 8,
    *,
    n: int = 1,
    priority: int = 0,
    cache_salt: str = "",
    **params: object,
) -> Request:
    """A request of `prompt` token ids; a number stands for that many ids, different for each number and request id."""
    if isinstance(prompt, int):
        prompt = [random.Random(f"{request_id}/{prompt}/{i}").randrange(2, VOCAB_SIZE) for i in range(prompt)]
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]  # values of many types
    return Request(request_id=request_id, prompt_ids=prompt, params=sampling, n=n, priority=priority, cache_salt=cache_salt)
