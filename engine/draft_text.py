"""What a model drafter has fed to its own KV of one sequence: the committed tokens, and behind them the last draft tree.

A drafter's KV follows the target's with a delay, and lazily: rejected nodes are simply overwritten, accepted ones are found in
the tree when the next draft begins, whoever dropped or fused nodes in between, and whatever was committed without this
drafter is a backlog. A block table that was replaced (a preemption) makes it ask the ledger what its new blocks hold.
"""

from __future__ import annotations

from engine.draft_tree import DraftTree
from engine.kv_ledger import KVLedger
from engine.sequence import Sequence

Moves = tuple[list[int], list[int]]  # slots: from, to


class DraftText:
    """`view` is what is fed: the tokens so far, and the target's own block table."""

    __slots__ = ("broken", "chain", "ledger", "num_committed", "seq", "tree", "valid", "view")

    def __init__(self, seq: Sequence, ledger: KVLedger) -> None:
        self.seq, self.ledger = seq, ledger
        self.view = Sequence(seq.seq_id, seq.request, seq.sample_index)
        self.num_committed = 0  # committed tokens in view.tokens; behind them lies the trunk of the tree
        self.valid = 0  # leading tokens whose keys and values are right
        self.tree: DraftTree | None = None  # fed behind the root at num_committed - 1
        self.chain = ledger.chain(seq.request.cache_salt)
        self.broken = False  # the draft model cannot read this text: its logits were not finite

    @property
    def backlog(self) -> int:
        """Tokens to be fed before a draft can begin; at least the root, whose logits are needed."""
        return self.num_committed - self.valid

    def follow(self) -> Moves:
        """Take in what was committed since the last time; the slots that its accepted nodes have to move."""
        seq, view = self.seq, self.view
        del view.tokens[self.num_committed :]
        begin = self.num_committed
        view.tokens += seq.tokens[begin:]
        self.num_committed = seq.num_tokens
        moves: Moves = ([], [])
        if view.block_ids is not seq.block_ids:
            view.block_ids = seq.block_ids
            self.valid = self.ledger.find(view.tokens, view.block_ids, self.chain)
        elif self.tree is not None:
            moves = self._accept(self.tree, begin)
        self.tree = None
        self.valid = self.ledger.find(view.tokens, view.block_ids, self.chain, self.valid)
        self.valid = min(self.valid, self.num_committed - 1)
        return moves

    def fed(self, begin: int, end: int) -> None:
        """Committed tokens begin ... end - 1 have been fed."""
        self.valid = end
        self.ledger.enter(self.view.tokens, self.view.block_ids, self.chain, begin, end)

    def remember(self, tree: DraftTree) -> None:
        """The tree that was fed behind the root."""
        self.tree = None if self.broken else tree

    def discard(self) -> list[int]:
        """Trust nothing from the first block on that is not whole; those blocks. No more drafts of this text."""
        size = self.ledger.block_size
        first = self.valid // size
        self.valid, self.tree, self.broken = first * size, None, True
        return self.view.block_ids[first:]

    def _accept(self, tree: DraftTree, begin: int) -> Moves:
        """Follow the tokens committed from position `begin` on down the tree, as far as its nodes were fed."""
        node, source, target = 0, [], []
        tokens = self.view.tokens
        for position in range(begin, len(tokens)):
            found = tree.child(node, tokens[position])
            if found is None or found not in tree.place:
                break
            node = found
            if tree.place[node] != position - begin:
                source.append(self._slot(begin + tree.place[node]))
                target.append(self._slot(position))
            self.valid = position + 1
        if self.valid > begin:
            self.ledger.enter(tokens, self.view.block_ids, self.chain, begin, self.valid)
        return source, target

    def _slot(self, position: int) -> int:
        size = self.ledger.block_size
        return self.view.block_ids[position // size] * size + position % size
