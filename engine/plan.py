"""What a step is told and what it answers: plain integers, no tensors, so that rank 0 can broadcast them."""

from __future__ import annotations

import msgspec

from engine.messages import TokenLogprobs
from engine.request import Request


class NewSequence(msgspec.Struct, array_like=True):
    seq_id: int
    request: Request
    sample_index: int


class Row(msgspec.Struct, array_like=True):
    """One sequence's share of a step: feed `num_new` committed tokens from `num_computed` on, then up to `budget` draft nodes.

    The last committed token is the root of the draft tree; a row that does not reach it (a prompt chunk) has budget 0 and
    is not judged. `block_ids` are appended to the sequence's block table, or replace it when `reset` is true (first
    row of a sequence, or the first after a preemption).
    """

    seq_id: int
    num_computed: int
    num_new: int
    budget: int
    block_ids: list[int]
    reset: bool


class StepPlan(msgspec.Struct):
    step: int
    new: list[NewSequence]
    rows: list[Row]
    removed: list[int]  # sequences that ended or were aborted since the last plan: forget them first
    preempted: list[int] = []  # sequences that lost all their blocks since the last plan; these may have other owners in this one


class RowResult(msgspec.Struct):
    """What one row gained. `token_ids` is the verdict (accepted path + bonus), empty for a prompt chunk that was not judged."""

    seq_id: int
    token_ids: list[int]
    num_draft: int = 0  # draft nodes shown to the target
    drafter: str = ""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # of prompt positions num_computed+1 ... num_computed+num_new
    error: str | None = None
    invalid: bool = False  # with an error: the request contradicts itself, and what it computed is sound
    depth: int = 0  # of the deepest draft node
    num_dropped: int = 0  # drafted nodes that the budget dropped before the target saw them
    drafted_by: dict[str, int] = {}  # draft nodes by drafter, where trees were fused; else all are `drafter`'s
    accepted_by: dict[str, int] = {}
    reason: str = ""  # what limited the budget
    seconds_saved: float = 0.0  # estimated

    @property
    def num_accepted(self) -> int:
        return max(len(self.token_ids) - 1, 0)


class StepTimes(msgspec.Struct):
    """Wall seconds of one step's parts."""

    draft: float = 0.0
    forward: float = 0.0
    target_law: float = 0.0
    verify: float = 0.0
    commit: float = 0.0


class StepResult(msgspec.Struct):
    rows: list[RowResult]
    times: StepTimes
    num_forward_tokens: int = 0
    fallbacks: dict[str, int] = {}  # drafter fallbacks in this step, by reason
    draft_seconds: dict[str, float] = {}  # by drafter
    predicted_tokens: float = 0.0  # what the policy expected of the step; 0 where it decided nothing
    predicted_seconds: float = 0.0
