"""Noise is a function of its address: the same bits in any shape, beside anything, on any number of threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.noise import (
    COIN,
    DRAWS,
    GUMBEL_MAX,
    RESIDUAL,
    TARGET,
    _bits_torch,
    block_words,
    coin,
    draft_stream,
    gumbel,
    gumbel_at,
    philox,
    to_gumbel,
    to_uniform,
    uniform,
    word,
)

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
SEED = 0xFEDCBA9876543210


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers_in_integers_numpy_and_torch(counter: list[int], key: list[int], words: list[int]) -> None:
    assert list(philox(*counter, *key)) == words
    as_numpy = philox(*(np.array([v, v], dtype=np.uint64) for v in counter + key))
    assert [w.tolist() for w in as_numpy] == [[w, w] for w in words]
    as_torch = philox(*(torch.tensor([v, v]) for v in counter + key))
    assert [w.tolist() for w in as_torch] == [[w, w] for w in words]


def test_the_address_is_laid_out_as_written() -> None:
    lanes = philox(1234 // 4, 7, 3, 0, SEED & 0xFFFFFFFF, SEED >> 32)
    assert word(SEED, 3, 7, 1234) == lanes[1234 % 4]
    blocks = block_words(SEED, 3, 7, np.array([5, 308], dtype=np.uint64))
    assert blocks[:, 1].tolist() == list(lanes)
    assert gumbel([SEED], [3], [7], vocab_size=1235)[0, 1234].item() == pytest.approx(gumbel_at(SEED, 3, 7, 1234), rel=1e-6)


def test_every_part_of_the_address_matters() -> None:
    here = gumbel([5], [1], [9], vocab_size=64)
    for other in ([6, 1, 9], [5 + 2**32, 1, 9], [5 + 2**63, 1, 9], [5, 2, 9], [5, 1, 10], [5, 9, 1]):
        assert not torch.equal(here, gumbel([other[0]], [other[1]], [other[2]], vocab_size=64))


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 127, 32_003, 49_152])
def test_all_tokens_a_few_and_one_have_the_same_noise(vocab_size: int) -> None:
    seeds, samples, positions = [SEED, 1, 2**64 - 1], [0, 5, 2**31], [0, 77, 2**31]
    every = gumbel(seeds, samples, positions, vocab_size=vocab_size)
    assert every.shape == (3, vocab_size)
    assert every.dtype == torch.float32
    for k in (1, 2, 7, 33):
        token = torch.randint(vocab_size, (3, k), generator=torch.Generator().manual_seed(k))
        assert torch.equal(gumbel(seeds, samples, positions, token), every.gather(1, token))
    for i in range(3):
        assert torch.equal(gumbel(seeds[i : i + 1], samples[i : i + 1], positions[i : i + 1], vocab_size=vocab_size)[0], every[i])


def test_threads_do_not_matter() -> None:
    before = torch.get_num_threads()
    one = gumbel([SEED], [0], [3], vocab_size=100_000)
    try:
        torch.set_num_threads(2)
        assert torch.equal(gumbel([SEED], [0], [3], vocab_size=100_000), one)
    finally:
        torch.set_num_threads(before)


def test_the_logarithm_does_not_depend_on_where_a_value_lies() -> None:
    bits = torch.randint(2**24, (4099,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    together = to_gumbel(bits)
    for size in (1, 2, 3, 5, 8, 17, 64):
        for first in range(0, 200, 7):
            assert torch.equal(to_gumbel(bits[first : first + size]), together[first : first + size])


def test_torch_integer_operations_give_the_same_bits() -> None:
    # What a GPU runs, on the CPU; seeds as unsigned integers and as the int64 of the same bits.
    seeds, samples, positions = [SEED, 3], [0, 2**32 - 1], [2**32 - 1, 4]
    token = torch.arange(1001).expand(2, -1)
    bits = _bits_torch(seeds, samples, positions, token, 0, torch.device("cpu"))
    assert torch.equal(to_gumbel(bits), gumbel(seeds, samples, positions, vocab_size=1001))
    signed = torch.tensor([SEED - 2**64, 3])
    assert torch.equal(_bits_torch(signed, samples, positions, token, 0, torch.device("cpu")), bits)
    assert torch.equal(gumbel(signed, torch.tensor(samples), torch.tensor(positions), token), to_gumbel(bits))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    seeds, samples, positions = [SEED, 3], [0, 1], [5, 4]
    token = torch.arange(50_001).expand(2, -1)
    there = _bits_torch(seeds, samples, positions, token.cuda(), 0, torch.device("cuda")).cpu()
    assert torch.equal(there, _bits_torch(seeds, samples, positions, token, 0, torch.device("cpu")))
    noise = gumbel(seeds, samples, positions, token.cuda()).cpu()
    torch.testing.assert_close(noise, gumbel(seeds, samples, positions, token), rtol=1e-6, atol=0)


def test_uniform_never_reaches_an_end_and_gumbel_stays_below_its_bound() -> None:
    extremes = torch.tensor([0, 2**24 - 1])
    low, high = to_uniform(extremes).tolist()
    assert low == 2.0**-25
    assert high == 1 - 2.0**-25
    assert to_gumbel(extremes).tolist() == pytest.approx([-math.log(25 * math.log(2)), 25 * math.log(2)], rel=1e-6)
    assert to_gumbel(extremes).max() <= GUMBEL_MAX
    u = uniform([SEED], [0], [0], vocab_size=100_000)
    assert u.mean().item() == pytest.approx(0.5, abs=0.005)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.002)


def test_gumbel_argmax_follows_the_softmax() -> None:
    # 20,000 positions of one seed; chi-square with 7 degrees of freedom, whose 99.99% quantile is 29.9.
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 1.5])
    n = 20_000
    for seed, sample in ((1, 0), (2**63 + 11, 3)):
        token = torch.arange(8).expand(n, 8)
        noise = to_gumbel(_bits_torch([seed] * n, [sample] * n, range(n), token, 0, torch.device("cpu")))
        counts = (logits + noise).argmax(-1).bincount(minlength=8)
        expected = n * logits.softmax(-1)
        assert ((counts - expected) ** 2 / expected).sum().item() < 29.9


def test_streams_are_independent_and_the_target_is_the_default() -> None:
    seeds, samples, positions = [SEED] * 3, [1] * 3, [9] * 3
    streams = [TARGET, RESIDUAL, draft_stream(5, 2)]
    noise = gumbel(seeds, samples, positions, vocab_size=4001, stream=streams)
    assert torch.equal(noise[0], gumbel([SEED], [1], [9], vocab_size=4001)[0])
    assert abs(torch.corrcoef(noise.double()) - torch.eye(3)).max() < 0.06
    token = torch.arange(4001).expand(3, -1)
    assert torch.equal(noise, to_gumbel(_bits_torch(seeds, samples, positions, token, 0, torch.device("cpu"), streams)))
    for row, stream in zip(noise, streams, strict=True):
        assert row[17].item() == pytest.approx(gumbel_at(SEED, 1, 9, 17, stream), rel=1e-6)
        assert torch.equal(row[:4000], to_gumbel(torch.from_numpy(_lanes(stream)))[:4000])


def _lanes(stream: int) -> np.ndarray:
    words = block_words(SEED, 1, 9, np.arange(1001, dtype=np.uint64), stream)
    return (words.T.reshape(-1) >> 8).view(np.int32)


def test_no_two_uses_of_draft_noise_share_a_stream() -> None:
    streams = [draft_stream(node, draw) for node in range(40) for draw in range(DRAWS)]
    assert len({*streams, TARGET, RESIDUAL, COIN}) == 40 * DRAWS + 3
    assert draft_stream(2**22 - 1, DRAWS - 1) < 2**32


def test_coins_are_uniform_and_a_function_of_their_address() -> None:
    coins = np.array([coin(SEED, 3, position, node) for position in range(100) for node in range(50)])
    assert coins.min() >= 0 and coins.max() < 1 and len(set(coins)) == 5000
    assert coins.mean() == pytest.approx(0.5, abs=0.02) and coins.var() == pytest.approx(1 / 12, abs=0.005)
    assert coins[57] == coin(SEED, 3, 1, 7)
