"""What the scheduler remembers about one sequence and its request. Not the tokens: those are the sequence's."""

from __future__ import annotations

from typing import NamedTuple

from engine.blocks import HashChain
from engine.messages import SequenceUsage, TokenLogprobs
from engine.protocols import Reason
from engine.request import Request
from engine.sequence import Sequence


class Entry:
    """One sequence under scheduling: its place in the order, its hashes, its totals.

    It is running while it holds blocks and waiting otherwise (new, or preempted).
    """

    __slots__ = ("chain", "group", "key", "known", "limit", "num_sent", "prompt_logprobs", "running", "seq", "usage")

    def __init__(self, seq: Sequence, group: Group, chain: HashChain) -> None:
        self.seq = seq
        self.group = group
        self.chain = chain
        self.key = (seq.request.priority, group.arrival, seq.sample_index)  # lowest first; unique
        self.running = False
        self.known = False  # a plan has told the workers about it
        self.limit: Reason = ""  # what cut the last budget below the policy's wish
        self.num_sent = 0  # leading blocks of its table that the workers know; 0: send the whole table
        self.usage = SequenceUsage()
        # Gathered chunk by chunk; None when not asked for, or sent already.
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if seq.params.prompt_logprobs is None else [None]

    @property
    def remaining(self) -> int:
        """Tokens this sequence may still gain."""
        return self.seq.params.max_tokens - self.seq.num_output


class Group:
    """One request and its siblings (n > 1), brought to life one after the other.

    While `hold` is true the first sibling computes the prompt and the others are not there yet: they will find the
    prompt's blocks in the prefix cache. At most one sibling waits for its first admission at a time, so a large n costs
    memory only as the siblings come to run.
    """

    __slots__ = ("arrival", "chain", "hold", "live", "next_index", "num_shared", "request")

    def __init__(self, request: Request, arrival: int, num_shared: int, chain: HashChain) -> None:
        self.request = request
        self.arrival = arrival  # a counter: the order in which requests reached the engine
        self.num_shared = num_shared  # prompt tokens that siblings find in the prefix cache
        self.hold = num_shared > 0
        self.chain = chain  # the first sibling's; its digests of the prompt serve all
        self.next_index = 0
        self.live: list[Entry] = []

    @property
    def num_unborn(self) -> int:
        return self.request.n - self.next_index


class Refusal(NamedTuple):
    """The first who waits found no room: what it looked at, and what would have to happen before it looks again."""

    seq_id: int
    num_matched: int  # blocks of its prefix that were cached
    until: int  # what the blocks given back since the start, less the running sequences, must come to


NO_REFUSAL = Refusal(-1, 0, 0)
