"""The block pool: who gets which block, what is found again, and that the integrity check sees every kind of damage."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks import BlockPool, HashChain, IntegrityError
from engine.sequence import Sequence
from tests.fakes import make_request

SIZE = 4


def computed(pool: BlockPool, tokens: list[int], salt: str = "", seq_id: int = 0) -> tuple[Sequence, HashChain]:
    """A sequence whose tokens are all committed and computed in blocks of its own, and published."""
    seq = Sequence(seq_id, make_request(prompt=tokens, cache_salt=salt))
    seq.block_ids = pool.allocate(pool.blocks_for(len(tokens)))
    seq.num_computed = len(tokens)
    chain = HashChain(salt, pool.block_size)
    pool.publish(seq, chain)
    return seq, chain


def match(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    return pool.match(tokens, HashChain(salt, pool.block_size))


def test_blocks_are_taken_and_given_back() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert (pool.num_free, pool.num_used) == (0, 4)
    with pytest.raises(IntegrityError, match="1 blocks asked for, 0 free"):
        pool.allocate(1)
    pool.free(first)
    assert (pool.num_free, pool.num_used) == (3, 1)
    assert not pool.is_idle()
    pool.free(second)
    assert pool.is_idle()


def test_freeing_twice_is_refused() -> None:
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(IntegrityError, match="nobody holds it"):
        pool.free(blocks)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(num_blocks, block_size)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(4, SIZE).blocks_for(tokens) == blocks


@pytest.mark.parametrize(("length", "found"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 2), (40, 2)])
def test_a_match_is_full_blocks_and_leaves_a_token_to_compute(length: int, found: int) -> None:
    pool = BlockPool(16, SIZE)
    seq, _ = computed(pool, list(range(10)))  # two full blocks and a half
    assert match(pool, list(range(length))) == seq.block_ids[:found]


@pytest.mark.parametrize("length", [8, 9, 12, 13])
def test_it_is_known_without_a_walk_whether_a_match_has_grown(length: int) -> None:
    pool = BlockPool(16, SIZE)
    tokens = list(range(length))
    computed(pool, tokens[:4])
    chain = HashChain("", SIZE)
    assert len(pool.match(tokens, chain)) == 1
    assert not pool.knows_more(tokens, chain, 1)
    computed(pool, tokens)
    grown = len(pool.match(tokens, chain))
    assert pool.knows_more(tokens, chain, 1) == (grown > 1)
    assert not pool.knows_more(tokens, chain, grown)
    assert not BlockPool(16, SIZE, enable_prefix_caching=False).knows_more(tokens, HashChain("", SIZE), 0)


def test_what_is_given_back_is_counted_when_the_last_holder_lets_go() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(3)
    pool.share(blocks[:1])
    pool.free(blocks)
    assert pool.num_given_back == 2
    pool.free(blocks[:1])
    assert pool.num_given_back == 3


def test_only_computed_committed_tokens_are_published() -> None:
    pool = BlockPool(16, SIZE)
    seq = Sequence(0, make_request(prompt=list(range(12))))
    seq.block_ids = pool.allocate(5)
    chain = HashChain("", SIZE)
    for num_computed, found in [(3, 0), (4, 1), (7, 1), (11, 2), (12, 3)]:
        seq.num_computed = num_computed
        pool.publish(seq, chain)
        assert len(match(pool, list(range(20)))) == found
        pool.check_integrity([seq])
    seq.num_computed = 17  # accepted behind the end: computed, never committed
    pool.publish(seq, chain)
    assert match(pool, list(range(20))) == seq.block_ids[:3]


def test_a_block_is_found_only_behind_the_same_tokens() -> None:
    pool = BlockPool(16, SIZE)
    computed(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert match(pool, [5, 6, 7, 8, 9]) == []
    assert match(pool, [1, 2, 3, 9, 5, 6, 7, 8, 9]) == []
    assert len(match(pool, [1, 2, 3, 4, 9, 6, 7, 8, 9])) == 1


def test_salts_never_share() -> None:
    pool = BlockPool(64, SIZE)
    tokens = list(range(9))
    salts = ["", "a", "b", "ab", "outrider root", "\0", "é", "\udcff"]
    held = {salt: computed(pool, tokens, salt, seq_id)[0].block_ids for seq_id, salt in enumerate(salts)}
    for salt in salts:
        assert match(pool, tokens, salt) == held[salt][:2]
    assert len({block for blocks in held.values() for block in blocks}) == 3 * len(salts)


def test_digests_are_cryptographic_and_the_same_in_every_process() -> None:
    chain = HashChain("salt", 2)
    chain.extend([1, 258, 2**31, 7], 2)
    root = blake2b(b"salt", digest_size=32, person=b"outrider root").digest()
    first = blake2b(root + bytes([1, 0, 0, 0, 2, 1, 0, 0]), digest_size=32).digest()
    assert chain.digests == [first, blake2b(first + bytes([0, 0, 0, 128, 7, 0, 0, 0]), digest_size=32).digest()]


def test_a_chain_hashes_each_block_once() -> None:
    class Watched(list[int]):
        read: list[slice]

        def __getitem__(self, item):  # type: ignore[no-untyped-def, override]  # list's overloads
            self.read.append(item)
            return super().__getitem__(item)

    tokens = Watched(range(12))
    tokens.read = []
    chain = HashChain("", SIZE)
    for num_blocks in (1, 1, 3, 3):
        chain.extend(tokens, num_blocks)
    assert tokens.read == [slice(0, 4), slice(4, 8), slice(8, 12)]


def test_a_forked_chain_goes_its_own_way() -> None:
    chain = HashChain("s", SIZE)
    chain.extend(list(range(12)), 3)
    fork = chain.fork(2)
    fork.extend([*range(8), 99, 98, 97, 96], 3)
    assert fork.digests[:2] == chain.digests[:2]
    assert fork.digests[2] != chain.digests[2]
    assert len(chain.digests) == 3


def test_published_blocks_survive_their_sequence() -> None:
    pool = BlockPool(8, SIZE)
    seq, _ = computed(pool, list(range(9)))
    pool.free(seq.block_ids)
    assert pool.is_idle()
    found = match(pool, list(range(9)))
    assert found == seq.block_ids[:2]
    pool.share(found)
    assert pool.num_used == 2
    pool.share(found)
    pool.free(found)
    assert pool.num_used == 2


def test_usable_are_free_blocks_shared_ones_and_those_that_nobody_else_holds() -> None:
    pool = BlockPool(8, SIZE)
    one, two, other = pool.allocate(2), pool.allocate(1), pool.allocate(1)
    pool.share(one[:1])
    two += one[:1]
    assert pool.num_usable([]) == pool.num_free == 4
    assert pool.num_usable(one[:1]) == 5  # held, and shared with whoever holds it
    assert pool.num_usable([], [one]) == 5
    assert pool.num_usable([], [two]) == 5
    assert pool.num_usable([], [one, two]) == 7
    assert pool.num_usable(one[:1], [one, two]) == 7  # counted once
    assert pool.num_usable([one[0], other[0]], [one, two]) == 8
    pool.free(one)
    pool.free(two)
    assert pool.num_usable([one[0], other[0]]) == 8  # one of them is free already


def test_blocks_that_nobody_could_find_again_are_reused_first() -> None:
    pool = BlockPool(4, SIZE)
    cached, _ = computed(pool, [1, 2, 3, 4])
    plain = pool.allocate(2)
    pool.free(cached.block_ids)
    pool.free(plain)
    assert cached.block_ids[0] not in pool.allocate(3)
    assert match(pool, [1, 2, 3, 4, 5]) == cached.block_ids
    assert pool.allocate(1) == cached.block_ids
    assert match(pool, [1, 2, 3, 4, 5]) == []


def test_the_least_recently_used_prefix_goes_first_and_its_tail_before_its_head() -> None:
    pool = BlockPool(6, SIZE)
    prompts = [[seed * 10 + i for i in range(8)] for seed in range(3)]
    tables = [computed(pool, prompt)[0].block_ids for prompt in prompts]
    for table in tables:
        pool.free(table)
    again = match(pool, [*prompts[0], 99])  # used again: now the most recent
    pool.share(again)
    pool.free(again)
    order = [pool.allocate(1)[0] for _ in range(6)]
    assert order == [*reversed(tables[1]), *reversed(tables[2]), *reversed(tables[0])]


def test_the_second_copy_of_a_block_is_not_published() -> None:
    pool = BlockPool(8, SIZE)
    first, _ = computed(pool, list(range(8)), seq_id=1)
    second, _ = computed(pool, list(range(8)), seq_id=2)
    assert match(pool, list(range(9))) == first.block_ids
    pool.check_integrity([first, second])
    pool.free(second.block_ids)
    assert match(pool, list(range(9))) == first.block_ids


def test_unpublished_blocks_are_not_found_again() -> None:
    pool = BlockPool(8, SIZE)
    seq, _ = computed(pool, list(range(8)))
    pool.unpublish(seq.block_ids[1:])
    assert match(pool, list(range(9))) == seq.block_ids[:1]
    pool.check_integrity([seq])
    pool.free(seq.block_ids)
    pool.unpublish(seq.block_ids)
    assert match(pool, list(range(9))) == []
    pool.check_integrity([])


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(8, SIZE, enable_prefix_caching=False)
    seq, _ = computed(pool, list(range(8)))
    assert match(pool, list(range(9))) == []
    pool.check_integrity([seq])


def test_reset_forgets_everything() -> None:
    pool = BlockPool(8, SIZE)
    computed(pool, list(range(8)))
    pool.reset()
    assert pool.is_idle()
    assert match(pool, list(range(9))) == []
    pool.check_integrity([])


def _lose(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    seq.block_ids.pop()


def _hold_once_more(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    pool.share([seq.block_ids[0]])


def _free_while_held(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    pool._free[seq.block_ids[0]] = None


def _not_free(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    pool._free.popitem()


def _unknown_block(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    pool._free[pool.num_blocks] = None


def _twice(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    pool.share([seq.block_ids[0]])
    seq.block_ids.append(seq.block_ids[0])


def _shared_write(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    pool.share([seq.block_ids[-1]])
    other.block_ids.append(seq.block_ids[-1])


def _published_write(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    digest = b"x" * 32
    pool._digest[seq.block_ids[-1]] = digest
    pool._by_digest[digest] = seq.block_ids[-1]


def _other_content(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    seq.tokens[0] += 1


def _write_back(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    seq.num_computed = 3  # would write into a full published block


def _too_far(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    seq.tokens += range(20)
    seq.num_computed += 20


def _dangling_digest(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    pool._by_digest[b"y" * 32] = 0


def _forgotten_digest(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    del pool._by_digest[pool._digest[seq.block_ids[0]] or b""]


def _same_digest_twice(pool: BlockPool, seq: Sequence, other: Sequence) -> None:
    pool._digest[pool.allocate(1)[0]] = pool._digest[seq.block_ids[0]]


DAMAGE = [
    _lose,
    _hold_once_more,
    _free_while_held,
    _not_free,
    _unknown_block,
    _twice,
    _shared_write,
    _published_write,
    _other_content,
    _write_back,
    _too_far,
    _dangling_digest,
    _forgotten_digest,
    _same_digest_twice,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_integrity_check_sees(damage: Callable[[BlockPool, Sequence, Sequence], None]) -> None:
    pool = BlockPool(16, SIZE)
    seq, _ = computed(pool, list(range(10)), seq_id=1)
    other, _ = computed(pool, list(range(50, 57)), seq_id=2)
    pool.check_integrity([seq, other])
    damage(pool, seq, other)
    with pytest.raises(IntegrityError):
        pool.check_integrity([seq, other])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "give", "find"]), st.integers(0, 5)), max_size=60))
def test_reuse_follows_the_plain_list_model(actions: list[tuple[str, int]]) -> None:
    """Against a pool that is nothing but a list in the order of reuse."""
    pool = BlockPool(6, SIZE)
    order = list(range(6))
    content: dict[int, int] = {}  # block -> the prompt it is published for
    held: list[tuple[int, int]] = []
    for action, prompt in actions:
        tokens = [prompt * 10 + i for i in range(SIZE)]
        known = [block for block, what in content.items() if what == prompt]
        if action == "take" and order and not known:
            seq, _ = computed(pool, tokens)
            assert seq.block_ids == [order.pop(0)]
            content.pop(seq.block_ids[0], None)
            content[seq.block_ids[0]] = prompt
            held.append((prompt, seq.block_ids[0]))
        elif action == "find":
            assert match(pool, [*tokens, 0]) == known
            if known:
                pool.share(known)
                order = [block for block in order if block != known[0]]
                held.append((prompt, known[0]))
        elif action == "give" and held:
            _, block = held.pop(prompt % len(held))
            pool.free([block])
            if block not in [other for _, other in held]:
                order.append(block)
        assert pool.num_free == len(order)
