"""The plug-ins: what a drafter, a verifier and a policy promise. The engine asks for capabilities, never for a name."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

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
    `observe` is called after every step for the sequences that were judged, before their commit. One that takes too long is
    not called for a while. A drafter that says `reports_prediction = True` fills the OpenAI usage fields on predicted tokens.
    """

    name: str
    needs: Signals
    siblings: Siblings

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest: ...

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None: ...

    def forget(self, seq_id: int) -> None: ...


@runtime_checkable
class CatchesUp(Protocol):
    """A drafter with a state of its own that falls behind while it is not asked, and catches up, within limits, when it is.

    `costly`: every depth of a draft costs a forward, so that whether to draft has to be decided before. `patience`: seconds
    that a draft may take, catching up not counted, until it is a drafter that hangs.
    """

    costly: bool
    patience: float
    depth_price: float  # Policy.depth_price, told before every draft

    def backlog(self, seq: Sequence) -> int:
        """Committed tokens that it has to read before it can draft for this sequence, the root not counted."""
        ...

    def take_catch_up(self) -> float:
        """Seconds of the last `draft` that went into catching up: no price of its depth, and no sign of one that hangs."""
        ...


@runtime_checkable
class Reads(Protocol):
    """A drafter that reads prompts, in portions (engine/reading.py): it may begin before there is anything to draft."""

    def read(self, seqs: Seq[Sequence]) -> None:
        """Read on in these; called in every step for the sequences whose prompt is still being computed."""
        ...


class Verifier(Protocol):
    """Decides which draft nodes stand. `scores` is what `target_law` made of the logits, one row per node.

    `anticipates`: may nodes be dropped after drafting by somebody who has looked at their tokens? A rule that judges a token
    by the law q it was drawn from is biased by that (core.md 0.4, R1): False. It concerns trees with sampled nodes
    (`DraftForest.is_sampled`); nodes that were chosen deterministically may be dropped under every verifier. A verifier that
    says `chains_only = True` judges the first of several sampled children and no other: more would be drafted for nothing.
    `prefers` names the kind of siblings that serves it best, for drafters that can choose; by default any in `accepts` may do.
    """

    name: str
    accepts: frozenset[Siblings]
    lossless: bool
    anticipates: bool

    def verify(self, forest: DraftForest, scores: torch.Tensor, seqs: Seq[Sequence]) -> Verdict: ...


@dataclass(frozen=True, slots=True)
class Load:
    """What a step carries besides drafts."""

    prefill_tokens: int  # committed tokens to be fed beyond one root per decoding sequence
    free_blocks: int
    block_size: int
    context_tokens: int = 0  # tokens computed before the step, all its sequences together
    sequences: int = 0  # rows of the plan: the judged ones and the prompt chunks
    draft_seconds: float = 0.0  # spent on drafting in this step already
    trims: bool = True  # sampled nodes may be dropped after they were seen (Verifier.anticipates)


Reason = Literal[
    "",  # nobody decides: a fixed budget
    "goodput",  # chosen freely: more nodes would have been possible, or there were no more
    "no_match",  # nobody had a guess
    "cost",  # nodes were dropped because they do not pay
    "itl",  # a longer step would break --max-itl-ms
    "max_nodes",  # the request's own limit
    "max_tokens",  # the request's end is near
    "blocks",  # no KV blocks, or no room in the step
    "probe",  # would not pay by what is known: drafted to learn
    "off",  # the request wants none
    "stale",  # the drafter has to catch up first
]


@dataclass(slots=True)
class Choice:
    """What a policy made of a step's drafts: the forest that the target will see, and what it expects of it.

    dropped and reasons [trees]. tokens: expected commits of the step; seconds: predicted, drafting included; plain_seconds: of
    the same step with bare roots; decode_seconds: of a step of those roots alone. 0 where nothing was predicted.
    """

    forest: DraftForest
    dropped: list[int]
    reasons: list[Reason]
    tokens: float = 0.0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    decode_seconds: float = 0.0


class Policy(Protocol):
    """Decides how far ahead to guess. Subclasses inherit what a policy does that decides nothing after `budgets`."""

    name: str
    calibration_error: float = 0.0  # mean |predicted - observed| survival at equal predictions, recent draft nodes
    cost_error: float = 0.0  # mean |predicted / measured - 1| of a step's time, recent steps

    def budgets(self, seqs: Seq[Sequence], load: Load) -> list[int]:
        """Before drafting: the most draft nodes of each sequence in this step; 0 is plain decoding."""
        ...

    def allot(self, drafter: Drafter, seqs: Seq[Sequence], budgets: Seq[int], gained: Seq[float | None], load: Load) -> list[int]:
        """Before each drafter in turn: how many nodes it may draft for each sequence, at most budgets[b]; 0 = it is not asked.

        gained[b]: tokens expected from the trees of the drafters before it; None where they had nothing. Here: the first drafter
        that has more than a root wins.
        """
        return [budget if gain is None else 0 for budget, gain in zip(budgets, gained, strict=True)]

    def depth_price(self, drafter: str, sequences: int) -> float:
        """What one more depth of a drafter that costs takes for so many sequences, in plain steps of theirs; 0: not known.

        A path that is less likely than that is not worth it.
        """
        return 0.0

    def estimate(self, drafter: str, seqs: Seq[Sequence], forest: DraftForest) -> NDArray[np.float64] | None:
        """P(node stands | its parent stands) for each node of one drafter's forest; None: its own confidence will do."""
        return None

    def drafted(self, drafter: str, sequences: int, depth: int, seconds: float) -> None:
        """What asking a drafter took, for so many sequences, down to the deepest node that it drafted."""
        return  # and nothing is learned

    def trim(self, forest: DraftForest, seqs: Seq[Sequence], load: Load) -> Choice:
        """After drafting: which nodes the target will see."""
        return Choice(forest, [0] * forest.num_trees, [""] * forest.num_trees)

    def learn(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict) -> None:
        """What the target said of the nodes it saw. Called in the worker, before the commit."""
        return  # and nothing is learned

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """A whole step is over: its wall seconds."""
        return  # and nothing is learned

    def forget(self, seq_id: int) -> None:
        """A sequence is gone."""
        return  # and nothing is learned


class CostModel(Protocol):
    """What steps cost on this machine, in seconds. `verify_seconds` is a whole step less its drafting, commit included.

    tokens: rows of the forward (roots, draft nodes and prompt tokens); context_tokens: computed before the step, all sequences
    together; sequences: rows of the plan; depth: of the deepest node drafted. `measured`: False as long as it is a guess.
    """

    @property
    def measured(self) -> bool: ...

    @overload
    def verify_seconds(self, tokens: int, context_tokens: int, sequences: int) -> float: ...

    @overload
    def verify_seconds(self, tokens: NDArray[np.int64], context_tokens: int, sequences: int) -> NDArray[np.float64]: ...

    def draft_seconds(self, drafter: str, sequences: int, depth: int) -> float: ...

    def observe(self, tokens: int, context_tokens: int, sequences: int, seconds: float) -> None: ...

    def observe_draft(self, drafter: str, sequences: int, depth: int, seconds: float) -> None: ...


@runtime_checkable
class Studies(Protocol):
    """An executor that has something to read out of the model while nobody is served."""

    def study(self) -> bool:
        """Some milliseconds of it; False when there was nothing left to do."""
        ...


class ExecutorLostError(RuntimeError):
    """What an executor rests on is gone, by no request's fault: another engine may serve them."""


@runtime_checkable
class Watched(Protocol):
    """An executor that rests on other processes."""

    def check(self) -> None:
        """Raises ExecutorLostError when one of them is gone. Called at least once a second."""
        ...


class Executor(Protocol):
    """Runs a step on every rank. `execute` gives one RowResult per row of the plan, in the plan's order.

    `guide` names the policy that trims drafts from now on. It decides on rank 0 alone; the others are told its forest.
    """

    info: EngineInfo

    def guide(self, policy: Policy) -> None: ...

    def execute(self, plan: StepPlan) -> StepResult: ...

    def close(self) -> None: ...
