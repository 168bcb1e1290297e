"""Drafter `token_recycling`: the target's runners-up at a token's last row are guessed the next time the token is seen.

"Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling" (Luo et al., arXiv 2408.08696,
ACL 2025). A table M holds for each token the k = 8 likeliest tokens of the last row that was judged at it, whether the
node stood or fell. A draft tree is read out of M: the children of a node with token t are M[t].

What differs from the paper: the tree is no fixed template but grown best first (engine/growth.py) by how often each rank proved
right, learned as it goes and apart for rows whose preceding token is the same as here, for the others and for those alone; M is
kept per salt in bounded memory; where a token was judged more than once in a step its committed node is kept, the last of
several, else the first drafted; a token that was never judged has what the target says behind it alone, if that was read
out of the model (engine/successors.py). It reads no logits but the ranks of the top k, and knows nothing of longer contexts.

Replayed on SmolLM2-135M's answers to 26 of our prompts (26 greedy, 52 at T = 0.7, 96 tokens at most; `bench.replay`, which
knows no rows of fallen nodes), budget 8, starting from an empty table, tokens per step / drafted per step:

    least    greedy       T = 0.7      greedy, asked again
    0.01     1.42  4.9    1.56  5.7    1.84  7.6
    0.03     1.39  3.9    1.53  4.5    1.80  6.1
    0.06     1.35  2.5    1.46  2.8    1.71  3.6

A draft takes 15 to 20 us, learning 15 us a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from struct import Struct

from engine.growth import NO_BRANCHES, Branches, forest_of, grow
from engine.protocols import Observed, Siblings, Signals
from engine.sequence import Sequence
from engine.shared_state import Generations, SaltedStore
from engine.successors import TOP, Successors
from engine.tree import DraftForest, Verdict

ROW = Struct(f"={TOP + 1}i")  # the token before, then the likeliest next ones
ROW_BYTES = 250  # a row as bytes, its key and its share of the dict
# Before anything was seen, P(the r-th likeliest of the last row is next) and the weight of that: ranks 0 to 7.
SAME_BEFORE = (0.62, 0.12, 0.05, 0.03, 0.02, 0.01, 0.01, 0.01)
OTHER_BEFORE = (0.33, 0.1, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01)
PRIOR = 40.0
WINDOW = 4000.0  # rows after which the counts are halved

# The token before the row's was the same as here; another; there is only what the model says about the token alone.
SAME, OTHER, ALONE = range(3)

State = tuple[int, int]  # the token before, the token


class TokenRecyclingDrafter:
    """least: nodes whose path is less likely than this are not drafted; successors: rows of tokens that were not judged yet.

    Raises ValueError for a number that makes no sense.
    """

    name = "token_recycling"
    needs = Signals(top_k=TOP)
    siblings = Siblings.POINT

    def __init__(self, memory_bytes: int = 64 << 20, least: float = 0.02, successors: Successors | None = None) -> None:
        if not 0 <= least <= 1:
            raise ValueError(f"token_recycling needs 0 <= least <= 1, not {least}")
        self.least = least
        self._tables: SaltedStore[_Table] = SaltedStore(lambda limit: _Table(limit, successors), memory_bytes)

    @property
    def num_bytes(self) -> int:
        """Of what outlives the sequences."""
        return self._tables.num_bytes

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        trees = [self._tree(seq, budget) if budget > 0 else NO_BRANCHES for seq, budget in zip(seqs, budgets, strict=True)]
        return forest_of([seq.tokens[-1] for seq in seqs], trees, self.name)

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        """Every judged row of every tree. Raises ValueError when the rows' likeliest tokens are missing."""
        if signals.top_ids is None:
            raise ValueError("token_recycling was given no likeliest tokens")
        top = signals.top_ids[:, :TOP].tolist()
        tokens, parents, starts = forest.token.tolist(), forest.parent.tolist(), forest.start.tolist()
        for b, seq in enumerate(seqs):
            salt = seq.request.cache_salt
            first, last = starts[b], starts[b + 1]
            before = [tokens[first + parent] for parent in parents[first:last]]
            before[0] = seq.tokens[-2] if seq.num_tokens > 1 else -1
            self._tables.get(salt).learn(before, tokens[first:last], top[first:last], verdict.nodes[b], verdict.tokens[b])
            self._tables.settle(salt)

    def forget(self, seq_id: int) -> None:
        """It keeps nothing of a sequence."""

    def _tree(self, seq: Sequence, budget: int) -> Branches:
        table = self._tables.get(seq.request.cache_salt)
        before = seq.tokens[-2] if seq.num_tokens > 1 else -1
        return grow((before, seq.tokens[-1]), table.children, budget, self.least)


class _Table:
    """M of one salt, and how often each rank of its rows was right, by what the row is known for."""

    def __init__(self, limit: int, successors: Successors | None) -> None:
        self._rows: Generations[int, bytes] = Generations(limit, ROW_BYTES)
        self._successors = successors
        self._right = [[p * PRIOR for p in before] for before in (SAME_BEFORE, OTHER_BEFORE, OTHER_BEFORE)]
        self._seen = [PRIOR, PRIOR, PRIOR]

    @property
    def num_bytes(self) -> int:
        return self._rows.num_bytes

    def children(self, state: State) -> Iterable[tuple[int, float, State]]:
        before, token = state
        kind, ids = self._row(before, token)
        seen = self._seen[kind]
        return [(child, right / seen, (token, child)) for child, right in zip(ids, self._right[kind], strict=False)]

    def learn(self, before: list[int], tokens: list[int], top: list[list[int]], path: list[int], verdict: list[int]) -> None:
        """The rows of one tree: of node i with the token `tokens[i]` behind `before[i]` the likeliest tokens top[i].

        `path` are the nodes that stood and `verdict` what was committed behind the root and them.
        """
        stood = [0, *path]
        for node, truth in zip(stood, verdict, strict=False):
            self._count(before[node], tokens[node], truth)
        # The last writer stays: fallen nodes, the least likely first, then those that stood, in order.
        fallen = [node for node in range(len(tokens) - 1, 0, -1) if node not in stood]
        for node in [*fallen, *stood]:
            self._rows.put(tokens[node], ROW.pack(before[node], *top[node]))

    def _row(self, before: int, token: int) -> tuple[int, Seq[int]]:
        """What the row is known for (SAME, OTHER, ALONE) and its tokens, likeliest first."""
        row = self._rows.find(token)
        if row is not None:
            known_before, *ids = ROW.unpack(row)
            return (SAME if known_before == before else OTHER), ids
        return ALONE, (self._successors.of(token) if self._successors is not None else None) or ()

    def _count(self, before: int, token: int, truth: int) -> None:
        """What a child of this node would have been worth, by the row as it was."""
        kind, ids = self._row(before, token)
        if not ids:
            return
        self._seen[kind] += 1
        if truth in ids:
            self._right[kind][ids.index(truth)] += 1
        if self._seen[kind] > WINDOW:
            self._seen[kind] /= 2
            self._right[kind] = [right / 2 for right in self._right[kind]]
