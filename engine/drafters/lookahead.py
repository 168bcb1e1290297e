"""Drafter `lookahead`: n-grams that the target itself produced on a Jacobi trajectory beside the text are guessed when they fit.

Break the Sequential Dependency of LLM Inference Using Lookahead Decoding (arXiv 2402.02057). A window of `window` columns of
ngram - 1 tokens holds guesses of the text to come that are refined in every step: the model's best token behind a column
is appended to it, the column and it give an n-gram to the pool, and the column's first token leaves. A guess is a pool entry that
begins with the last token.

As in the paper: the tree's layout. Column i hangs below the first tokens of the columns before it, so its token of level l
lies at depth i + l and sees just what it sees there; a pool of `guesses` n-grams per first token, the least recently found
dropped first; EOS never enters the window; the pool begins with the n-grams of the prompt.
Different here: every row the model is fed is a node of the draft tree and counts against the budget, so the window gets at
most `share` of it and loses columns where that is too little (a column that is not fed waits); a window token that happens to be
right is accepted like any draft; the columns begin whole, with n-grams spread evenly over the prompt, so there is no warm-up;
where several tokens are committed at once the columns move on as many; verification is the engine's, exact at any temperature.
The window looks useless to a policy that weighs nodes by what they give in this step: it drops it, and the pool is left.

Paper's defaults for 7B on a GPU: window 7, ngram 5, guesses 7. State is a sequence's own, at most about 1 MB.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from engine.continuations import most_frequent
from engine.growth import NO_BRANCHES, Branches, forest_of
from engine.protocols import Observed, Siblings, Signals
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

POOL_TOKENS = 1024  # first tokens with n-grams in the pool of one sequence
PROMPT_TOKENS = 4096  # of a prompt, the last ones, that seed the pool
WINDOW_CONFIDENCE = 0.03  # a window token stands about so often (measured, see bench/RESULTS.md)
FADING = 0.8  # an n-gram found one before the latest counts for so much of it


class LookaheadDrafter:
    """Raises ValueError for numbers that make no sense."""

    name = "lookahead"
    needs = Signals(top_k=1)
    siblings = Siblings.POINT

    def __init__(
        self,
        eos_ids: frozenset[int] = frozenset(),
        *,
        window: int = 5,
        ngram: int = 4,
        guesses: int = 5,
        share: float = 0.5,
        doubt: float = 1.0,
    ) -> None:
        if window < 1 or ngram < 2 or guesses < 1 or not 0 <= share <= 1 or doubt < 0:
            raise ValueError("lookahead needs window >= 1, ngram >= 2, guesses >= 1, 0 <= share <= 1 and doubt >= 0")
        self.eos_ids = eos_ids
        self.window, self.ngram, self.guesses, self.share, self.doubt = window, ngram, guesses, share, doubt
        self._states: dict[int, _State] = {}

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        branches = [self._branches(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]
        return forest_of([seq.tokens[-1] for seq in seqs], branches, self.name)

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        """Every column that was fed grows by what the target said behind it."""
        if signals.top_ids is None:
            return
        best = signals.top_ids[:, 0].tolist()
        for b, seq in enumerate(seqs):
            state = self._states.get(seq.seq_id)
            if state is not None and state.fed:
                part = forest.nodes(b)
                places = _places(forest.token[part].tolist(), forest.parent[part].tolist())
                state.grow(places, best[part], self.eos_ids)
                state.move(len(verdict.tokens[b]))

    def forget(self, seq_id: int) -> None:
        self._states.pop(seq_id, None)

    def _branches(self, seq: Sequence, budget: int) -> Branches:
        if budget < 1:
            return NO_BRANCHES
        state = self._states.get(seq.seq_id)
        if state is None:
            state = self._states[seq.seq_id] = _State(seq, self.window, self.ngram, self.guesses)
        state.read(seq.tokens)
        window = state.feed(seq.tokens[-1], int(budget * self.share))
        new = _new_nodes(window)
        found = state.pool.get(seq.tokens[-1])
        tree = self._guesses(list(found), budget - new) if found else Branches([], [], [])
        return _with_window(tree, window)

    def _guesses(self, found: list[tuple[int, ...]], budget: int) -> Branches:
        rows = np.array(found, np.int32)
        weights = (FADING ** np.arange(len(rows) - 1, -1, -1)).astype(np.float32)
        return most_frequent(rows, budget, weights=weights, doubt=self.doubt)


class _State:
    """The window and the pool of one sequence."""

    def __init__(self, seq: Sequence, window: int, ngram: int, guesses: int) -> None:
        self.pool: dict[int, dict[tuple[int, ...], None]] = {}
        self.fed: list[list[int]] = []  # the paths of the first columns, as they were last fed
        size = seq.num_prompt
        self._columns = [[seq.tokens[(i * size // window + j) % size] for j in range(ngram - 1)] for i in range(window)]
        self._spare = [column[0] for column in self._columns]  # stand in for EOS
        self._ngram, self._guesses = ngram, guesses
        self._read = max(ngram, seq.num_prompt - PROMPT_TOKENS)

    def read(self, tokens: list[int]) -> None:
        """Take in the n-grams of the text that are new."""
        for end in range(self._read, len(tokens) + 1):
            self._add(tokens[end - self._ngram : end])
        self._read = max(self._read, len(tokens) + 1)

    def feed(self, root: int, most: int) -> list[list[int]]:
        """The paths below the root that end in the columns' newest tokens, as many columns as `most` nodes hold."""
        self._columns[0][0] = root
        count = max(0, min(len(self._columns), (most + 1) // (self._ngram - 1)))
        chain = [column[0] for column in self._columns[1:count]]
        self.fed = [[*chain[:i], *column[1:]] for i, column in enumerate(self._columns[:count])]
        return self.fed

    def grow(self, places: dict[tuple[int, int], int], best: list[int], eos_ids: frozenset[int]) -> None:
        """Each fed column whose tip was really shown to the target goes one token further."""
        for i, (column, path) in enumerate(zip(self._columns, self.fed, strict=False)):
            node: int | None = 0
            for token in path:
                node = places.get((node, token)) if node is not None else None
            if node is None:
                continue
            column.append(self._spare[i] if best[node] in eos_ids else best[node])
            self._add(column)
            del column[0]
        self.fed = []

    def move(self, committed: int) -> None:
        """Column 0 begins where the text ends: what more than one token covered goes to the far end."""
        over = (committed - 1) % len(self._columns) if committed else 0
        self._columns = self._columns[over:] + self._columns[:over]

    def _add(self, ngram: list[int]) -> None:
        found = self.pool.pop(ngram[0], {})
        self.pool[ngram[0]] = found  # the latest last, here and below
        key = tuple(ngram[1:])
        found.pop(key, None)
        found[key] = None
        if len(found) > self._guesses:
            del found[next(iter(found))]
        if len(self.pool) > POOL_TOKENS:
            del self.pool[next(iter(self.pool))]


def _places(tokens: list[int], parents: list[int]) -> dict[tuple[int, int], int]:
    """(parent, token) -> node, of one tree."""
    return {(parents[node], tokens[node]): node for node in range(len(tokens) - 1, 0, -1)}


def _new_nodes(paths: list[list[int]]) -> int:
    """Nodes of the trie of some paths."""
    return len({tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)})


def _with_window(tree: Branches, paths: list[list[int]]) -> Branches:
    """The guesses' tree and the window's paths in one trie."""
    places = _places([-1, *tree.tokens], [-1, *tree.parents])
    for path in paths:
        node = 0
        for token in path:
            below = places.get((node, token))
            if below is None:
                tree.tokens.append(token)
                tree.parents.append(node)
                tree.confidence.append(WINDOW_CONFIDENCE)
                below = places[node, token] = len(tree.tokens)
            node = below
    return tree
