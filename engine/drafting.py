"""Drafting that cannot hurt: whatever a drafter does, the step gets a well-formed forest within its budgets."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import TYPE_CHECKING

from engine.fusion import Tree, forest_of, fuse
from engine.protocols import NO_SIGNALS, CatchesUp, Drafter, Load, Observed, Policy, Reads, Siblings, Signals
from engine.resting import Bench
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SLOW_SECONDS = 1.0  # a guess that took longer is dropped, and its drafter benched (`CatchesUp.patience`: one that costs)
DEBT_DRAFTS = 32
SAMPLED = frozenset({Siblings.IID, Siblings.DISTINCT, Siblings.GREEDY})
NO_LOAD = Load(0, 0, 0)


class FirstWins(Policy):
    """Asks drafters in order until one has a guess."""

    name = "first"

    def budgets(self, seqs: Seq[Sequence], load: Load) -> list[int]:
        return [0] * len(seqs)


class Drafting:
    """Asks the configured drafters in order, as far as the policy allots; trees for the same sequence are fused.

    A drafter that raises, takes too long, answers with the wrong shape, roots or sizes, or with ids outside the vocabulary
    costs its guess for this step, not the request; the reason is counted. (The target law and the verdict never depend on
    it.) A slow one is benched, each time for twice as long, so that it costs one step and not every step.
    """

    def __init__(
        self,
        drafters: Seq[Drafter],
        vocab_size: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        slow_seconds: float = SLOW_SECONDS,
    ) -> None:
        self.drafters, self.vocab_size = list(drafters), vocab_size
        self.needs = _union([d.needs for d in self.drafters])
        self._clock, self._slow_seconds = clock, slow_seconds
        self._fallbacks: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._debts: dict[str, float] = {}  # seconds of catching up that no draft has paid for yet
        self._benches = {id(d): Bench() for d in self.drafters}
        self.stale: set[int] = set()  # sequences for which a drafter had nothing in the last step because it is behind
        self._catching = {id(d): d for d in self.drafters if isinstance(d, CatchesUp)}

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int], policy: Policy | None = None, load: Load = NO_LOAD) -> DraftForest:
        """One tree per sequence, rooted at its last committed token, at most budgets[b] nodes below the root."""
        roots = [seq.tokens[-1] for seq in seqs]
        self.stale.clear()
        if not any(budgets):
            return DraftForest.roots(roots)
        policy = policy or FirstWins()
        answers = _Answers(len(seqs), load.trims)
        for drafter in self.drafters:
            allowed = [
                0 if answers.closed(b, drafter) else _limit(drafter, seq, budget)
                for b, (seq, budget) in enumerate(zip(seqs, budgets, strict=True))
            ]
            if not any(allowed) or self._benches[id(drafter)].sits(self._clock()):
                continue
            asked = policy.allot(drafter, seqs, allowed, answers.gained, load)
            owners = [b for b, budget in enumerate(asked) if budget > 0]
            if not owners:
                continue
            forest = self._ask(drafter, [seqs[b] for b in owners], [asked[b] for b in owners], policy)
            if forest is not None:
                answers.add(forest, owners, drafter.name)
            if id(drafter) in self._catching:
                behind = self._catching[id(drafter)].backlog
                self.stale |= {seqs[b].seq_id for b in owners if answers.gained[b] is None and behind(seqs[b]) > 0}
        return answers.forest(roots, budgets)

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        for drafter in self.drafters:
            self._tell(drafter, partial(drafter.observe, seqs, forest, verdict, signals))

    def read(self, seqs: Seq[Sequence]) -> None:
        """Sequences whose prompts are still being computed: who reads prompts has read them when there is something to draft."""
        for drafter in self.drafters:
            wanted = [seq for seq in seqs if not seq.request.speculation.off and _limit(drafter, seq, 1)]
            if wanted and isinstance(drafter, Reads):
                self._tell(drafter, partial(drafter.read, wanted))

    def forget(self, seq_id: int) -> None:
        for drafter in self.drafters:
            try:
                drafter.forget(seq_id)
            except Exception:
                self._raised(drafter)

    def fell_back(self, reason: str) -> None:
        """Count a guess that somebody else could not use."""
        self._fallbacks[reason] += 1

    def take_fallbacks(self) -> dict[str, int]:
        """Fallbacks since the last call, by reason: raised, malformed, vocabulary, slow, not_finite."""
        taken = dict(self._fallbacks)
        self._fallbacks.clear()
        return taken

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent drafting since the last call, by drafter."""
        taken, self._seconds = self._seconds, {}
        return taken

    def _ask(self, drafter: Drafter, seqs: list[Sequence], budgets: list[int], policy: Policy) -> DraftForest | None:
        """The drafter's forest with the policy's estimates, or None for one that cannot be used."""
        if id(drafter) in self._catching:
            self._catching[id(drafter)].depth_price = policy.depth_price(drafter.name, len(seqs))
        started, reason = self._clock(), None
        try:
            forest = drafter.draft(seqs, budgets)
            reason = self._fault(forest, seqs, budgets)
        except Exception:
            self._raised(drafter)
            return None
        finally:
            seconds = self._clock() - started
            self._seconds[drafter.name] = self._seconds.get(drafter.name, 0.0) + seconds
            caught_up = self._catching[id(drafter)].take_catch_up() if id(drafter) in self._catching else 0.0
            slow = self._took(drafter, seconds - caught_up)
            self._debts[drafter.name] = self._debts.get(drafter.name, 0.0) + caught_up
        if reason:
            self._fallbacks[reason] += 1
        if reason or slow:
            return None
        depth = max(forest.depth.tolist(), default=0)
        if not caught_up:
            # What catching up took is paid for by the drafts that it made possible.
            paid = self._debts[drafter.name] / DEBT_DRAFTS
            self._debts[drafter.name] -= paid
            policy.drafted(drafter.name, len(seqs), max(depth, 1), seconds + paid)
        if not depth:
            return None
        forest.estimate = policy.estimate(drafter.name, seqs, forest)
        return forest

    def _tell(self, drafter: Drafter, tell: Callable[[], None]) -> None:
        if self._benches[id(drafter)].sits(self._clock(), observing=True):
            return
        started = self._clock()
        try:
            tell()
        except Exception:
            self._raised(drafter)
        self._took(drafter, self._clock() - started, observing=True)

    def _took(self, drafter: Drafter, seconds: float, *, observing: bool = False) -> bool:
        """Whether that was too long; if so the drafter rests."""
        patience = self._catching[id(drafter)].patience if id(drafter) in self._catching else 0.0
        if seconds <= max(self._slow_seconds, patience):
            return False
        rest = self._benches[id(drafter)].send(self._clock(), observing=observing)
        self._fallbacks["slow"] += 1
        logger.warning("drafter %s took %.1f s: it is not asked for %.0f s", drafter.name, seconds, rest)
        return True

    def _fault(self, forest: DraftForest, seqs: list[Sequence], budgets: list[int]) -> str | None:
        starts, token, parent, depth = (a.tolist() for a in (forest.start, forest.token, forest.parent, forest.depth))
        if len(starts) != len(seqs) + 1 or starts[0] != 0 or not len(token) == len(parent) == len(depth) == starts[-1]:
            return "malformed"
        for row in (forest.confidence, forest.law_row):
            if row is not None and row.shape != (len(token),):
                return "malformed"
        if any(row.dtype.kind != "i" for row in (forest.start, forest.token, forest.parent, forest.depth)):
            return "malformed"
        if forest.node_drafter is not None and len(forest.node_drafter) != len(token):
            return "malformed"
        if (forest.law is None) != (forest.law_row is None):
            return "malformed"
        for seq, budget, first, last in zip(seqs, budgets, starts, starts[1:], strict=False):
            if not 0 < last - first <= budget + 1 or token[first] != seq.tokens[-1] or parent[first] != -1 or depth[first] != 0:
                return "malformed"
            for node in range(first + 1, last):
                up = parent[node]
                # Positions follow from depths: a wrong one would change the answer.
                if not 0 <= up < node - first or depth[node] != depth[first + up] + 1:
                    return "malformed"
        return "vocabulary" if token and (min(token) < 0 or max(token) >= self.vocab_size) else None

    def _raised(self, drafter: Drafter) -> None:
        self._fallbacks["raised"] += 1
        logger.exception("drafter %s failed; this step goes on without it", drafter.name)


class _Answers:
    """The forests that drafters gave for B sequences, and what each sequence makes of them."""

    def __init__(self, count: int, trims: bool) -> None:
        self.gained: list[float | None] = [None] * count  # expected tokens of each sequence's trees so far
        self._trims = trims
        self._trees: list[list[tuple[DraftForest, int, str]]] = [[] for _ in range(count)]
        self._closed = [False] * count
        self._forests: list[DraftForest] = []

    def closed(self, b: int, drafter: Drafter) -> bool:
        """Where sampled nodes may not be chosen among after the fact, the first drafter that has a guess is the only one."""
        return self._closed[b] or (not self._trims and self.gained[b] is not None and drafter.siblings in SAMPLED)

    def add(self, forest: DraftForest, owners: list[int], name: str) -> None:
        self._forests.append(forest)
        sampled = forest.law_row is not None and not self._trims
        for i, b in enumerate(owners):
            if forest.size(i) > 1:
                self._trees[b].append((forest, i, name))
                self.gained[b] = (self.gained[b] or 0.0) + _gain(forest, i)
                self._closed[b] = self._closed[b] or (sampled and forest.is_sampled(i))

    def forest(self, roots: list[int], budgets: Seq[int]) -> DraftForest:
        """One tree per sequence."""
        if not self._forests:
            return DraftForest.roots(roots)
        only = self._forests[0]
        if len(self._forests) == 1 and only.num_trees == len(roots):
            only.drafter = [trees[0][2] if trees else "" for trees in self._trees]
            if self._trims:
                only.law = only.law_row = None
            return only
        offsets: dict[int, int] = {}
        laws: list[Tensor] = []
        for forest in self._forests:
            if forest.law is not None and not self._trims:
                offsets[id(forest)] = sum(len(law) for law in laws)
                laws.append(forest.law)
        chosen = []
        for root, budget, trees in zip(roots, budgets, self._trees, strict=True):
            made = [_tree(forest, i, name, offsets.get(id(forest))) for forest, i, name in trees]
            tree = made[0] if len(made) == 1 else fuse(made).cut(budget) if made else Tree([root], [-1], [1.0], [1.0], [""])
            chosen.append(tree)
        whole = forest_of(chosen)
        if whole.law_row is not None:
            import torch  # only where a drafter that has a law has imported it already

            whole.law = laws[0] if len(laws) == 1 else torch.cat(laws)
        return whole


def _tree(forest: DraftForest, index: int, name: str, offset: int | None) -> Tree:
    tree = Tree.of(forest, index, name)
    if offset is not None and forest.is_sampled(index) and forest.law_row is not None:
        tree.law_row = [row if row < 0 else row + offset for row in forest.law_row[forest.nodes(index)].tolist()]
    return tree


def _gain(forest: DraftForest, index: int) -> float:
    if forest.estimate is None:
        return 0.0
    part = forest.nodes(index)
    survival = [1.0]
    for parent, estimate in zip(forest.parent[part].tolist()[1:], forest.estimate[part].tolist()[1:], strict=True):
        survival.append(survival[parent] * estimate)
    return sum(survival) - 1.0


def _limit(drafter: Drafter, seq: Sequence, budget: int) -> int:
    """The budget, or 0 where the request does not want this drafter, or has nothing for it."""
    request = seq.request
    wanted = request.speculation.drafters
    if wanted is not None and drafter.name not in wanted:
        return 0
    return budget if request.prediction_ids or not getattr(drafter, "reports_prediction", False) else 0


def _union(needs: list[Signals]) -> Signals:
    if not needs:
        return NO_SIGNALS
    return Signals(
        top_k=max(n.top_k for n in needs),
        hidden_layers=tuple(sorted({layer for n in needs for layer in n.hidden_layers})),
        probabilities=any(n.probabilities for n in needs),
    )
