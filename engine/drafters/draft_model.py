"""Drafter `draft_model`: a smaller model with the same vocabulary runs ahead of the target.

Speculative decoding in its first form (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318), batched, with trees
that grow best first (engine/draft_tree.py). By default the children of a node are coupled: the best of log q / T + gumbel,
with the very noise that will choose the target's token there (arXiv 2408.07978; for lists of drafts, "List-Level Distribution
Coupling"), so draft and target err alike; greedy requests, and `siblings` "point", get the likeliest tokens. The other kinds
are drawn from q with noise of their own, for verifiers that judge a token by its law; the shape of such a tree depends on
the budget alone.

Its KV lies in the target's blocks and is filled lazily: a draft begins by feeding, in one batch, what was committed since the
last one. A sequence that is far behind (a long prompt, a prefix hit on blocks that were never filled, a time without drafts)
catches up over several steps and drafts when it is there.

It is not self-speculation: nothing of the target's activations is used, and every depth costs a forward.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import groupby
from operator import itemgetter
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.draft_draws import draw_distinct, draw_greedy, draw_iid
from engine.draft_law import DraftLaw
from engine.draft_text import DraftText
from engine.draft_tree import DraftTree
from engine.gumbel_max import Address
from engine.gumbel_top import gumbel_top
from engine.kv_ledger import KVLedger
from engine.pace import Pace
from engine.plan import Row
from engine.protocols import NO_SIGNALS, Observed, Siblings
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

NEAR = 16  # tokens: who is no further behind is always fed, whatever the others have to catch up
DRAWN = frozenset({Siblings.IID, Siblings.DISTINCT, Siblings.GREEDY})
# Tokens read for one token to come, at most. A drafted token saves some tenths of a step, a prompt's is read in some hundredths.
WORTH = 16
MOST_PRICE = 0.5  # a path likelier than this is followed whatever a depth costs
RUNNERS_UP = 2  # tokens beside the children that a child's confidence is measured against
# Qwen2.5-Coder 0.5B for 1.5B, 138 nodes each at T = 0.8 and T = 1: log loss 0.34 at 0.7 and at 1, 0.37 at 0.5, 0.40 at 1.5
# (0.53 for the mean alone). A greedy draft's own probability is right as it is: 0.27; it said 0.83, and 0.82 of them stood.
MARGIN_SHARPNESS = 0.8


class DraftModel(Protocol):
    """The model and its KV, as the worker hands it in (engine/draft_runner.py)."""

    vocab_size: int
    max_len: int
    block_size: int

    def forward(self, seqs: Seq[Sequence], rows: Seq[Row], forest: DraftForest, trees: Seq[int]) -> Tensor: ...

    def move(self, source: list[int], target: list[int]) -> None: ...

    def clear(self, blocks: list[int]) -> None: ...


class DraftModelDrafter:
    """accepts, prefers, chains_only: of the verifier (engine/protocols.py); siblings: the kind to draw, by default what suits it.
    branches: children per node (1 where a verifier judges no more of sampled ones); width: nodes fed per forward and sequence;
    least: paths less likely are not followed any further; catch_up: most tokens fed in one step before drafts begin, all
    sequences together, and catch_up_seconds: about how long that may take.

    Raises ValueError without a model and for options that make no sense.
    """

    name = "draft_model"
    needs = NO_SIGNALS
    costly = True
    depth_price = 0.0
    patience = 4.0  # seconds: several forwards of a model on a busy machine

    def __init__(
        self,
        draft_model: DraftModel | None,
        eos_ids: frozenset[int] = frozenset(),
        accepts: frozenset[Siblings] = frozenset(Siblings),
        prefers: Siblings | None = None,
        chains_only: bool = False,
        siblings: str | None = None,
        branches: int = 3,
        width: int = 1,
        least: float = 0.05,
        catch_up: int = 512,
        catch_up_seconds: float = 0.05,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if draft_model is None:
            raise ValueError("drafters: draft_model needs a second model: --draft-model PATH")
        if min(branches, width, catch_up) < 1 or not 0 <= least < 1:
            raise ValueError(
                f"draft_model needs branches, width and catch_up >= 1 and 0 <= least < 1, not {branches}, {width}, {catch_up} "
                f"and {least}"
            )
        self.siblings = _kind(siblings, prefers, accepts)
        self.eos_ids = eos_ids
        self.branches = 1 if chains_only and self.siblings in DRAWN else branches
        self.width, self.least = width, least
        self._pace, self._clock = Pace(catch_up, catch_up_seconds), clock
        self._caught_up = 0.0
        self._model = draft_model
        self._ledger = KVLedger(draft_model.block_size)
        self._texts: dict[int, DraftText] = {}
        self._laws: dict[int, DraftLaw] = {}

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        guesses = [self._guess(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]
        open_ = [guess for guess in guesses if guess.budget > 0]
        self._follow([guess.text for guess in open_])
        open_ = [guess for guess in open_ if not guess.text.broken and guess.is_worth_reading()]
        logits, growing = self._read(open_)
        wanted = [(guess, 0) for guess in growing]
        while wanted:
            self._expand(wanted, logits)
            wanted = [(guess, node) for guess in growing for node in guess.frontier()]
            if wanted:
                logits = self._feed(wanted)
        for guess in growing:
            guess.text.remember(guess.tree)
        return _forest(guesses, self.name)

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        """It reads what was committed when it drafts again."""

    def forget(self, seq_id: int) -> None:
        self._texts.pop(seq_id, None)
        self._laws.pop(seq_id, None)

    def take_catch_up(self) -> float:
        """Seconds of the last `draft` in which tokens were caught up; 0 where it read no more than a verdict."""
        taken, self._caught_up = self._caught_up, 0.0
        return taken

    def backlog(self, seq: Sequence) -> int:
        """Committed tokens that have to be fed before a draft of this sequence can begin, its root not counted."""
        text = self._texts.get(seq.seq_id)
        known = text is not None and text.seq is seq and text.view.block_ids is seq.block_ids
        return seq.num_tokens - 1 - (min(text.valid, seq.num_tokens - 1) if known and text is not None else 0)

    # ---- before the draft

    def _guess(self, seq: Sequence, budget: int) -> Guess:
        text = self._texts.get(seq.seq_id)
        if text is None or text.seq is not seq:
            text = self._texts[seq.seq_id] = DraftText(seq, self._ledger)
            self._laws[seq.seq_id] = DraftLaw(seq, self.eos_ids)
        budget = min(budget, self._model.max_len - seq.num_tokens)
        law = self._laws[seq.seq_id]
        if self.siblings in DRAWN and not seq.params.greedy:
            return DrawnGuess(text, law, budget, self.branches)
        coupled = self.siblings is Siblings.COUPLED and not seq.params.greedy
        # A depth is a forward for everyone: who is less likely to gain a token by it than it costs of a step stays out.
        least = max(self.least, min(self.depth_price, MOST_PRICE))
        return Guess(text, law, budget, self.width, least, coupled=coupled)

    def _follow(self, texts: list[DraftText]) -> None:
        """Take in the last verdicts; pack the accepted paths of branched trees."""
        source: list[int] = []
        target: list[int] = []
        for text in texts:
            moved_from, moved_to = text.follow()
            source += moved_from
            target += moved_to
        if source:
            self._model.move(source, target)

    def _read(self, guesses: list[Guess]) -> tuple[Tensor, list[Guess]]:
        """Feed what was committed since the last draft, within limits; logits [M, V] of the roots of those who are up to date."""
        left = self._pace.limit
        shares: list[tuple[Guess, int]] = []
        for guess in sorted(guesses, key=lambda guess: guess.text.backlog):
            share = guess.text.backlog
            if share > NEAR:
                share = min(share, left)
                left -= share
            if share:
                shares.append((guess, share))
        if not shares:
            return torch.empty(0, self._model.vocab_size), []
        ready: list[Guess] = []
        rows: list[Row] = []
        trees: list[int] = []
        for guess, share in shares:
            text = guess.text
            trees.append(len(ready) if share == text.backlog else -1)
            if share == text.backlog:
                ready.append(guess)
            rows.append(Row(text.seq.seq_id, text.valid, share, 0, [], False))
            self._ledger.strike(text.view.block_ids, text.valid, text.valid + share)
        forest = DraftForest.roots([guess.text.view.tokens[-1] for guess in ready])
        started = self._clock()
        logits = self._model.forward([guess.text.view for guess, _ in shares], rows, forest, trees)
        behind = sum(share for _, share in shares if share > NEAR)
        if behind:
            self._caught_up = self._clock() - started
            self._pace.took(behind, self._caught_up)
        for (guess, share), row in zip(shares, rows, strict=True):
            guess.text.fed(row.num_computed, row.num_computed + share)
        return logits, ready

    # ---- the draft

    def _feed(self, wanted: list[tuple[Guess, int]]) -> Tensor:
        """Feed nodes of the trees; their logits [M, V] in the order of `wanted`, in which a guess's own lie together."""
        views, rows, trees, picks = [], [], [], []
        first = 0
        for guess, group in groupby(wanted, itemgetter(0)):
            text, tree = guess.text, guess.tree
            new = [node for _, node in group]
            trunk, inside, parents = tree.feed(new)
            tokens = [tree.token[node] for node in inside]
            del text.view.tokens[text.num_committed :]
            text.view.tokens += [tree.token[node] for node in tree.order[:trunk]]
            at = text.num_committed - 1 + trunk
            self._ledger.strike(text.view.block_ids, at, at + len(inside))
            views.append(text.view)
            rows.append(Row(text.seq.seq_id, at, 1, 0, [], False))
            trees.append((tokens, parents))
            picks += [first + inside.index(node) for node in new]
            first += len(inside)
        logits = self._model.forward(views, rows, DraftForest.from_parents(trees), range(len(trees)))
        return logits if len(picks) == len(logits) else logits[picks]

    def _expand(self, wanted: list[tuple[Guess, int]], logits: Tensor) -> None:
        """Give each node its children. logits [M, V], a row per node, shaped in place."""
        for i, (guess, node) in enumerate(wanted):
            guess.law.apply(logits[i : i + 1], [guess.tree.tokens_to(node)])
        best = [i for i, (guess, _) in enumerate(wanted) if not guess.is_drawn]
        drawn = [i for i, (guess, _) in enumerate(wanted) if guess.is_drawn]
        if best:
            self._expand_best([wanted[i] for i in best], logits if not drawn else logits[best])
        if drawn:
            self._expand_drawn([wanted[i] for i in drawn], logits if not best else logits[drawn])
        for guess, node in wanted:
            guess.tree.expanded.add(node)
            if not guess.tree.has_children(node):  # not finite, or nothing allowed
                self._model.clear(guess.text.discard())

    def _expand_best(self, wanted: list[tuple[Guess, int]], scores: Tensor) -> None:
        """The tokens that the target would take if it were the draft model, and the next best."""
        addresses = [guess.address(node) for guess, node in wanted]
        ranked = gumbel_top(scores, addresses, self.branches + RUNNERS_UP)
        totals = torch.logsumexp(scores, -1).tolist() if None in addresses else []
        for i, ((guess, node), (tokens, values)) in enumerate(zip(wanted, ranked, strict=True)):
            if addresses[i] is None:
                chances = [math.exp(min(value - totals[i], 0.0)) for value in values]
            else:
                chances = margin_chances(values)
            for token, chance in zip(tokens[: self.branches], chances, strict=False):
                guess.tree.add(node, token, chance)

    def _expand_drawn(self, wanted: list[tuple[Guess, int]], scores: Tensor) -> None:
        """Children drawn from the draft's own law, which the verifier gets to see."""
        law = torch.softmax(scores, -1)
        # Of the law, never of the tokens: nothing that is decided by it may look at what was drawn.
        chances = law.amax(-1).tolist()
        alike: dict[int, list[int]] = {}
        for i, (guess, _) in enumerate(wanted):
            if math.isfinite(chances[i]):
                alike.setdefault(min(self.branches, guess.budget), []).append(i)
        for count, rows in alike.items():
            nodes = [wanted[i] for i in rows]
            children, drawn_from = _draw(self.siblings, law if len(rows) == len(law) else law[rows], nodes, count)
            for (guess, node), tokens, row, i in zip(nodes, children, drawn_from, rows, strict=True):
                guess.laws[node] = row
                for token in tokens:
                    guess.tree.add(node, token, chances[i])


def margin_chances(values: Seq[float]) -> list[float]:
    """P(target takes the token) for the best tokens of a coupled race, from what they reached, best first.

    The target perturbs its own law by the same noise, so it takes another token only where the two laws differ by more than
    the distance: a softmax of the distances. A raw estimate, which the policy calibrates.
    """
    weights = [math.exp(MARGIN_SHARPNESS * (value - values[0])) for value in values]
    total = sum(weights)
    return [weight / total for weight in weights]


class Guess:
    """One sequence's tree under way, best first."""

    is_drawn = False

    def __init__(self, text: DraftText, law: DraftLaw, budget: int, width: int, least: float, *, coupled: bool = False) -> None:
        self.text, self.law, self.budget = text, law, budget
        self._width, self._least, self._coupled = width, least, coupled
        self.tree = DraftTree(text.seq.tokens[-1])
        self.laws: dict[int, Tensor] = {}  # node -> the law that its children were drawn from

    def address(self, node: int) -> Address | None:
        """Where the target's noise for the token after the node lies; None where the likeliest are drafted."""
        seq = self.text.seq
        if not self._coupled:
            return None
        return Address(seq.params.seed, seq.sample_index, seq.num_output + self.tree.depth[node])

    def is_worth_reading(self) -> bool:
        """Whether there are enough tokens to come for what has to be read before."""
        seq, behind = self.text.seq, self.text.backlog
        return behind <= NEAR or behind <= WORTH * (seq.params.max_tokens - seq.num_output)

    def frontier(self) -> list[int]:
        return [] if self.text.broken else self.tree.frontier(self.budget, self._width, self._least)

    def kept(self) -> list[int]:
        """The nodes of the result, the root first."""
        return self.tree.best(self.budget)


class DrawnGuess(Guess):
    """Drawn from the draft's law: the first child of every node goes on, and the shape depends on nothing but the budget."""

    is_drawn = True

    def __init__(self, text: DraftText, law: DraftLaw, budget: int, branches: int) -> None:
        super().__init__(text, law, budget, 1, 0.0)
        self._levels = max(1, budget // branches)

    def frontier(self) -> list[int]:
        tip, tree = max(self.tree.expanded), self.tree
        if self.text.broken or tree.depth[tip] + 1 >= self._levels or not tree.has_children(tip):
            return []
        return [tree.parent.index(tip)]

    def kept(self) -> list[int]:
        return list(range(len(self.tree.token)))


def _draw(kind: Siblings, law: Tensor, wanted: list[tuple[Guess, int]], count: int) -> tuple[list[list[int]], Tensor]:
    """Children of each node and the law they were drawn from."""
    seqs, nodes = [guess.text.seq for guess, _ in wanted], [node for _, node in wanted]
    if kind is Siblings.IID:
        return draw_iid(law, seqs, nodes, count), law
    if kind is Siblings.DISTINCT:
        return draw_distinct(law, seqs, nodes, count), law
    return draw_greedy(law, seqs, nodes, count)


def _kind(wanted: str | None, preferred: Siblings | None, accepts: frozenset[Siblings]) -> Siblings:
    """Raises ValueError for an unknown kind."""
    if wanted is None:
        kinds = (Siblings.COUPLED, Siblings.DISTINCT, Siblings.IID, Siblings.GREEDY)
        return preferred or next((kind for kind in kinds if kind in accepts), Siblings.POINT)
    try:
        return Siblings(wanted)
    except ValueError:
        known = ", ".join(kind.value for kind in Siblings)
        raise ValueError(f"draft_model: siblings are one of {known}, not {wanted!r}") from None


def _forest(guesses: list[Guess], name: str) -> DraftForest:
    trees: list[tuple[list[int], list[int]]] = []
    confidence: list[float] = []
    laws: list[Tensor] = []
    law_row: list[int] = []
    for guess in guesses:
        tree, kept = guess.tree, guess.kept()
        local = {node: i for i, node in enumerate(kept)}
        trees.append(([tree.token[node] for node in kept], [-1, *(local[tree.parent[node]] for node in kept[1:])]))
        confidence += [tree.confidence[node] for node in kept]
        for node in kept:
            law_row.append(len(laws) if node in guess.laws else -1)
            if node in guess.laws:
                laws.append(guess.laws[node])
    forest = DraftForest.from_parents(trees, [name] * len(trees))
    forest.confidence = np.array(confidence, dtype=np.float32)
    if laws:
        forest.law, forest.law_row = torch.stack(laws), np.array(law_row, dtype=np.int32)
    return forest
