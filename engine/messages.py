"""What the HTTP process and the engine process say to each other: msgspec structs, MessagePack on the wire, never pickle."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.request import Request

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Natural-log probabilities at one position, from the raw target logits (before any sampling parameter)."""

    logprob: float  # of the token that was emitted
    rank: int  # 1 = likeliest
    top: list[tuple[int, float]]  # (token id, logprob), likeliest first


class SequenceUsage(msgspec.Struct, omit_defaults=True):
    """Totals of one sequence: of a finished one, or so far where a request asks for that (`Request.report_usage`)."""

    cached_tokens: int = 0  # prompt tokens served by the prefix cache
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0  # really shown to the target and rejected
    steps: int = 0  # verify steps
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    first_scheduled_time: float = 0.0  # time.monotonic(), seconds
    accepted_per_position: list[int] = []  # [d]: verify steps in which the draft stood to depth d + 1 or further
    drafted_by: dict[str, int] = {}  # draft nodes shown to the target, by drafter
    accepted_by: dict[str, int] = {}
    budget_reasons: dict[str, int] = {}  # verify steps by what limited their budget (engine/protocols: Reason)
    seconds_saved: float = 0.0  # estimated: plain decoding's predicted time for the same tokens, less the steps' own share


class TokenDelta(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The tokens one sequence gained in one step. The last delta of a sequence has `finish_reason` and `usage`.

    `token_ids` includes the token that ended the sequence (EOS or a stop id); `stop_token_id` then names it and its text
    must not be shown. `logprobs` runs parallel to `token_ids` when asked for.
    """

    request_id: str
    index: int = 0  # sample index, 0 <= index < n
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first delta; entry 0 is None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None  # with finish_reason "error": what went wrong, fit for the client
    invalid: bool = False  # with an error: it is the request's own
    usage: SequenceUsage | None = None


class EngineInfo(msgspec.Struct, kw_only=True):
    """Static facts, sent once when the engine is ready."""

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str
    backend: str
    drafters: list[str]
    verifier: str
    lossless: bool
    policy: str
    budget: int
    weight_bytes: int
    kv_bytes: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    load_seconds: float
    verifiers: list[str] = []  # that a request may choose: lossless, and exact for every configured drafter
    max_budget: int = 0  # most draft nodes of one sequence in one step
    prediction_drafters: list[str] = []  # whose tokens the OpenAI usage fields report as predicted ones
    depth_seconds: dict[str, float] = {}  # drafters with a model: what a depth takes for one sequence, timed at start
    eos_ids: list[int] = []  # ids that end a sequence, from the model's own generation settings
    quantization: str = ""  # how the weights are quantized, in words; empty where they are not


class EngineStats(msgspec.Struct, kw_only=True):
    """Gauges, cumulative counters since engine start, and the observations made since the previous message."""

    steps: int = 0
    # gauges
    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    uncomputed_tokens: int = 0  # of prompts and of preempted sequences: committed, and no step has computed them yet
    # cumulative counters
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0  # tokens looked up
    prefix_cache_hits: int = 0  # tokens found
    preemptions: int = 0
    num_drafts: int = 0  # trees with at least one draft node
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = []
    draft_tokens_by_drafter: dict[str, int] = {}
    accepted_tokens_by_drafter: dict[str, int] = {}
    drafter_fallbacks: dict[str, int] = {}  # by reason: raised, vocabulary, malformed, slow, not_finite
    corrupted_requests: int = 0  # ended because what the target computed for them held NaN
    looping_sequences: int = 0  # whose answer ended in a repetition (engine/repetition.py)
    seconds_draft: float = 0.0
    seconds_forward: float = 0.0
    seconds_target_law: float = 0.0
    seconds_verify: float = 0.0
    seconds_commit: float = 0.0
    seconds_step: float = 0.0  # whole steps, the parts above included
    num_dropped_tokens: int = 0  # drafted, then dropped by the budget before the target saw them
    drafts_by_drafter: dict[str, int] = {}  # trees
    seconds_draft_by_drafter: dict[str, float] = {}
    predicted_tokens: float = 0.0  # what the policy expected the steps it decided to commit, and
    predicted_seconds: float = 0.0  # to take;
    decided_tokens: int = 0  # what the same steps did commit, and
    decided_seconds: float = 0.0  # did take
    # gauges of the policy
    calibration_error: float = 0.0  # mean |predicted - observed| survival of a draft node, recent steps
    cost_error: float = 0.0  # mean |predicted / measured - 1| of a step's time, recent steps
    # observations since the previous message
    draft_depths: list[int] = []  # depth of the deepest draft of each step
    draft_nodes: list[int] = []  # draft nodes of each step, all sequences together
    iteration_tokens: list[int] = []  # rows of each step's forward


# HTTP process -> engine
class Add(msgspec.Struct, tag="add"):
    request: Request


class Abort(msgspec.Struct, tag="abort"):
    request_id: str


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Leave after the running step; drop what is in flight (the front end has drained by then)."""


ToEngine = Add | Abort | Shutdown


# engine -> HTTP process
class Ready(msgspec.Struct, tag="ready"):
    info: EngineInfo


class Deltas(msgspec.Struct, tag="deltas"):
    deltas: list[TokenDelta]


class Stats(msgspec.Struct, tag="stats"):
    """Sent at least once a second, busy or idle: it is the heartbeat that liveness rests on."""

    stats: EngineStats


class Fatal(msgspec.Struct, tag="fatal"):
    """The engine cannot start or go on; the process ends after this."""

    message: str
    exit_code: int = 1


FromEngine = Ready | Deltas | Stats | Fatal
