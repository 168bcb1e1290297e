"""Paged KV memory by block id: who holds which block, which are free, and which full ones serve as a prefix cache.

Integers only; the tensors live with the workers. A block is free exactly when nobody holds it. A freed block that was
published keeps its content and can be found again until it is needed for something else, least recently used first.

Sources: PagedAttention (arXiv 2309.06180) for block tables and reference counts.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from engine.sequence import Sequence as TokenSequence

DIGEST_BYTES = 32  # 256 bits: finding two prompts with one digest is as hard as breaking blake2b


class IntegrityError(RuntimeError):
    """The block pool contradicts itself or the sequences it serves; the message names the block."""


class HashChain:
    """The chained digests of one sequence's full blocks: digest i stands for the salt and every token up to block i's end.

    `num_published` counts the leading blocks of the current block table that need no (further) publishing.
    """

    __slots__ = ("_root", "block_size", "digests", "num_published")

    def __init__(self, salt: str, block_size: int) -> None:
        # `person` keeps the roots apart from the digests of blocks, whatever the salt looks like.
        self._root = blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, person=b"outrider root").digest()
        self.block_size = block_size
        self.digests: list[bytes] = []
        self.num_published = 0

    def extend(self, tokens: Sequence[int], num_blocks: int) -> None:
        """Hash on up to `num_blocks` full blocks of `tokens`; earlier blocks are not read again."""
        size, digests = self.block_size, self.digests
        for i in range(len(digests), num_blocks):
            # The parent and the ids have fixed lengths, so two different chains never give the same bytes.
            content = (digests[i - 1] if i else self._root) + array("I", tokens[i * size : (i + 1) * size]).tobytes()
            digests.append(blake2b(content, digest_size=DIGEST_BYTES).digest())

    def fork(self, num_blocks: int) -> HashChain:
        """A chain of its own for a sequence that shares the first `num_blocks` blocks' tokens."""
        chain = HashChain.__new__(HashChain)
        chain._root, chain.block_size = self._root, self.block_size
        chain.digests, chain.num_published = self.digests[:num_blocks], 0
        return chain


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each. Every operation is O(1) per block it touches."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        """Raises ValueError when there would be no room for a single token."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a block pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_given_back = 0  # blocks that became free since the start
        self.reset()

    def reset(self) -> None:
        """Everything free, nothing published."""
        self._refs = [0] * self.num_blocks
        self._digest: list[bytes | None] = [None] * self.num_blocks  # of published blocks
        self._by_digest: dict[bytes, int] = {}
        # In the order of reuse: never-published blocks first, then published ones, least recently used first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_usable(self, matched: Iterable[int], tables: Iterable[Iterable[int]] = ()) -> int:
        """Blocks for a sequence that shares `matched`: those, and all that are free once `tables` were given back.

        A block that many hold counts once, and only if all of them are among `tables`.
        """
        usable = {block for block in matched if self._refs[block]}  # the others are on the free list
        given: Counter[int] = Counter()
        for table in tables:
            given.update(table)
        usable.update(block for block, count in given.items() if count == self._refs[block])
        return len(self._free) + len(usable)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; ask `num_free` first. What was published in them is forgotten.

        Raises IntegrityError when there are not enough.
        """
        if count > len(self._free):
            raise IntegrityError(f"{count} blocks asked for, {len(self._free)} free")
        taken = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._withdraw(block)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """Hold blocks that `match` found, free or not."""
        for block in block_ids:
            if not self._refs[block]:
                del self._free[block]
            self._refs[block] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Let go of a block table. Its tail is given up for reuse before its head, which more prompts can share."""
        for block in reversed(block_ids):
            if self._refs[block] < 1:
                raise IntegrityError(f"block {block} freed while nobody holds it")
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                self.num_given_back += 1
                if self._digest[block] is None:
                    self._free.move_to_end(block, last=False)

    def match(self, tokens: Sequence[int], chain: HashChain) -> list[int]:
        """The published blocks that hold the longest known prefix of `tokens`, not yet held: `share` them.

        Never all of `tokens`: the last one is left to compute, for without it there is no logit to go on from.
        """
        found: list[int] = []
        if not self.enable_prefix_caching:
            return found
        for i in range((len(tokens) - 1) // self.block_size):
            chain.extend(tokens, i + 1)
            block = self._by_digest.get(chain.digests[i])
            if block is None:
                break
            found.append(block)
        return found

    def knows_more(self, tokens: Sequence[int], chain: HashChain, num_matched: int) -> bool:
        """Whether `match`, which found this many blocks before, would find the next one now. O(1)."""
        known = min((len(tokens) - 1) // self.block_size, len(chain.digests))  # match hashed the block that it did not find
        return num_matched < known and chain.digests[num_matched] in self._by_digest

    def publish(self, seq: TokenSequence, chain: HashChain) -> None:
        """Make the blocks of `seq` findable that have filled with computed, committed tokens since the last call."""
        if not self.enable_prefix_caching:
            return
        num_full = min(seq.num_computed, seq.num_tokens) // self.block_size
        if num_full <= chain.num_published:
            return
        chain.extend(seq.tokens, num_full)
        for i in range(chain.num_published, num_full):
            block, digest = seq.block_ids[i], chain.digests[i]
            # The same tokens computed twice at once: the first copy stays the one that is found.
            if digest not in self._by_digest and self._digest[block] is None:
                self._by_digest[digest] = block
                self._digest[block] = digest
        chain.num_published = num_full

    def unpublish(self, block_ids: Iterable[int]) -> None:
        """Forget what these blocks hold (their content is not to be trusted); who holds them keeps them."""
        for block in block_ids:
            self._withdraw(block)
            if block in self._free:
                self._free.move_to_end(block, last=False)

    def _withdraw(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digest[block] = None

    def is_idle(self) -> bool:
        """Every block is free and nobody holds any: what must be true without sequences. Cheap."""
        return len(self._free) == self.num_blocks and not any(self._refs)

    def check_integrity(self, sequences: Iterable[TokenSequence]) -> None:
        """Prove that the pool agrees with itself and with all sequences that hold blocks; O(blocks + tokens).

        Raises IntegrityError.
        """
        held: Counter[int] = Counter()
        for seq in sequences:
            held.update(seq.block_ids)
            self._check_table(seq)
        for block, refs in enumerate(self._refs):
            if refs != held[block]:
                raise IntegrityError(f"block {block} is in {held[block]} block tables and counts {refs}")
            if (block in self._free) != (refs == 0):
                raise IntegrityError(f"block {block} has {refs} holders and is {'' if block in self._free else 'not '}free")
        if len(self._free) != self._refs.count(0):
            raise IntegrityError("the free list holds a block that does not exist")
        published = {digest: block for block, digest in enumerate(self._digest) if digest is not None}
        if published != self._by_digest or len(published) != self.num_blocks - self._digest.count(None):
            raise IntegrityError("the prefix cache finds blocks by digests that they do not have")

    def _check_table(self, seq: TokenSequence) -> None:
        table, computed = seq.block_ids, min(seq.num_computed, seq.num_tokens)
        if len(set(table)) != len(table):
            raise IntegrityError(f"sequence {seq.seq_id} has a block twice in its table")
        if len(table) * self.block_size < computed:
            raise IntegrityError(f"sequence {seq.seq_id} computed {computed} tokens, more than its {len(table)} blocks hold")
        chain = HashChain(seq.request.cache_salt, self.block_size)
        num_full = computed // self.block_size
        chain.extend(seq.tokens, num_full)
        for i, block in enumerate(table):
            digest = self._digest[block]
            if i < num_full:
                if digest is not None and digest != chain.digests[i]:
                    raise IntegrityError(f"block {block} is published as something else than sequence {seq.seq_id} holds in it")
            # From here on draft nodes and new tokens are written: nobody else may see or find these blocks.
            elif digest is not None or self._refs[block] != 1:
                raise IntegrityError(f"block {block} is shared or published and sequence {seq.seq_id} writes into it")
