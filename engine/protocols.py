"""The plug-ins: what a drafter, a verifier and a policy promise. The engine asks for capabilities, never for a name."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from engine.messages import EngineInfo
from engine.plan import StepPlan, StepResult
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

if TYPE_CHECKING:
    import torch


class Siblings(Enum):
    """How the children of a draft node were chosen; a verifier states which of these keep it exact (core.md 0.4)."""

    POINT = "point"  # deterministic (n-gram, suffix, top-k): the draft law is one-hot
    COUPLED = "coupled"  # drawn with the target's own noise
    IID = "iid"  # drawn independently from q
    DISTINCT = "distinct"  # drawn from q without replacement
    GREEDY = "greedy"  # the likeliest of q and then one token drawn from the rest of q, renormalised: that is the node's law


@dataclass(frozen=True, slots=True)
class Signals:
    """What a drafter wants back from the target's forward; `needs` asks, `observe` receives."""

    top_k: int = 0  # the k likeliest tokens of every judged row
    hidden_layers: tuple[int, ...] = ()  # hidden states after these layers, for every fed token
    probabilities: bool = False  # the whole target law of every judged row


NO_SIGNALS = Signals()


@dataclass(slots=True)
class Observed:
    """The signals of one step, in row order. Only what `needs` asked for is filled."""

    top_ids: torch.Tensor | None = None  # [nodes, top_k]
    top_logits: torch.Tensor | None = None  # [nodes, top_k]
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [fed tokens, hidden size]
    probabilities: torch.Tensor | None = None  # [nodes, vocab]


class Drafter(Protocol):
    """Guesses what comes next. Reads sequences, never changes one.

    `draft` gives one tree per sequence, rooted at its last committed token, with at most budgets[i] nodes below the
    root; an empty guess is a bare root. It may raise: the worker then uses bare roots for this step.
    `observe` is called after every step for the sequences that were judged, before their commit.
    """

    name: str
    needs: Signals
    siblings: Siblings

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest: ...

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None: ...

    def forget(self, seq_id: int) -> None: ...


class Verifier(Protocol):
    """Decides which draft nodes stand. `scores` is what `target_law` made of the logits, one row per node.

    `anticipates`: may nodes be dropped after drafting by somebody who has looked at their tokens? A rule that judges a token
    by the law q it was drawn from is biased by that (core.md 0.4, R1): False. It concerns trees with sampled nodes
    (`DraftForest.is_sampled`); nodes that were chosen deterministically may be dropped under every verifier.
    """

    name: str
    accepts: frozenset[Siblings]
    lossless: bool
    anticipates: bool

    def verify(self, forest: DraftForest, scores: torch.Tensor, seqs: Seq[Sequence]) -> Verdict: ...


@dataclass(frozen=True, slots=True)
class Load:
    """What the next step carries besides drafts."""

    prefill_tokens: int  # committed tokens to be fed beyond one root per decoding sequence
    free_blocks: int
    block_size: int


class Policy(Protocol):
    """Decides how far ahead to guess. `budgets` runs before drafting; 0 is plain decoding."""

    name: str

    def budgets(self, seqs: Seq[Sequence], load: Load) -> list[int]: ...

    def trim(self, forest: DraftForest) -> DraftForest: ...

    def observe(self, plan: StepPlan, result: StepResult) -> None: ...


class Executor(Protocol):
    """Runs a step on every rank. `execute` gives one RowResult per row of the plan, in the plan's order."""

    info: EngineInfo

    def execute(self, plan: StepPlan) -> StepResult: ...

    def close(self) -> None: ...
