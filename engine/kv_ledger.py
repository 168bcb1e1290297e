"""Which text's keys and values lie in the blocks of a drafter's own KV, so that a block is trusted for what it holds, not by id.

A drafter with a KV of its own shares the target's block ids, but it fills its half at other times: not at all while it is
off, and later than the target after a prefix hit. A full block is therefore written down under the chained digest of every
token up to its end, and struck out before anything is stored in it. Who comes to hold a block, by a prefix hit, after a
preemption or because it was free, finds out by its own tokens how much of it is right. Only integers and digests; a wrong
entry could cost acceptance, never an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.blocks import HashChain


class KVLedger:
    """Block id -> digest of the text up to the block's end, for the blocks that are whole."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._digest: dict[int, bytes] = {}

    def chain(self, salt: str) -> HashChain:
        """The chain of one sequence; pass it with that sequence's tokens only, which may grow."""
        return HashChain(salt, self.block_size)

    def find(self, tokens: Sequence[int], blocks: Sequence[int], chain: HashChain, valid: int = 0) -> int:
        """How many leading tokens the blocks hold, given that the first `valid` are held. Hashes no further than it finds."""
        if valid % self.block_size:
            return valid
        for i in range(valid // self.block_size, min(len(blocks), len(tokens) // self.block_size)):
            digest = self._digest.get(blocks[i])
            if digest is None:
                break
            chain.extend(tokens, i + 1)
            if digest != chain.digests[i]:
                break
            valid += self.block_size
        return valid

    def strike(self, blocks: Sequence[int], begin: int, end: int) -> None:
        """Positions begin ... end - 1 of this block table are about to be written."""
        for i in range(begin // self.block_size, -(-end // self.block_size)):
            self._digest.pop(blocks[i], None)

    def enter(self, tokens: Sequence[int], blocks: Sequence[int], chain: HashChain, begin: int, end: int) -> None:
        """Positions begin ... end - 1 hold `tokens`, and so does everything before them."""
        num_full = end // self.block_size
        chain.extend(tokens, num_full)
        for i in range(begin // self.block_size, num_full):
            self._digest[blocks[i]] = chain.digests[i]
