"""Addressed randomness: noise is a pure function of (seed, sample, position, token). Nothing here has a state.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the key is the request's 64-bit seed
(low word, high word), the counter (token // 4, position, sample, stream), and the token's own word is lane token % 4: the
words Triton's `tl.philox(seed, token // 4, position, sample, stream)` returns. `position` counts output tokens from 0, so
neither a preemption nor the batch nor a draft can move it.

`stream` keeps apart what must be independent: the noise that draws the target's tokens (`TARGET`, which a coupled drafter
shares), what draws a draft from its own law (`draft_stream`), the coins of rejection rules (`coin`), and their final draws
where the drafts may have seen the target's noise (`RESIDUAL`). A drafted token that is judged by its law q must not be
drawn with noise that its verdict uses: core.md 0.4, R2 to R4.

What it is not: a generator. The same address gives the same bits whatever else is computed beside it, in any shape, on one
thread or many; that is what makes speculation invisible under sampling. The logarithms are therefore taken in float64
and rounded once: a float32 log may differ in its last bit between a vector loop and its tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ints = Sequence[int] | Tensor

ROUNDS = 10
MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
# Streams: the counter's fourth word. The low two bits say what for, the rest which one.
TARGET, DRAFT, COIN, RESIDUAL = range(4)
DRAWS = 256  # of one draft node's children: a stream each
# U lies in [2^-25, 1 - 2^-25], so no Gumbel value exceeds this.
GUMBEL_MAX = 17.33
# Blocks computed at a time, at one address or at many: a call costs 45 us and 10 to 15 ns a block, until its arrays (with many
# addresses there are four more) leave the L2 cache.
CHUNK = 12_288
CHUNK_MANY = 4096
CHUNK_CUDA = 1 << 22


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """One Philox4x32-10 block per element: four 32-bit words.

    Takes Python ints, numpy uint64 arrays or torch int64 tensors holding 32-bit values, mixed where they broadcast.
    """
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIER[0], c2 * MULTIPLIER[1]
        # The low words stay unmasked until they meet a high word: a signed product's sign bits fall to the same mask.
        c0, c1, c2, c3 = ((p1 >> 32) ^ (c1 ^ k0)) & MASK, p1, ((p0 >> 32) ^ (c3 ^ k1)) & MASK, p0
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return c0, c1 & MASK, c2, c3 & MASK


def draft_stream(node: int, draw: int = 0) -> int:
    """The stream that draws children of a draft node (its index in the tree) from the draft's own law.

    To be used at the position of the tree's root (`Sequence.num_output`, whatever the node's depth): a root is judged once,
    so no two trees of a sequence share noise. Children drawn one independently of the other take draw 0, 1, ...; children
    drawn without replacement share draw 0 (Gumbel top-k). 0 <= node < 2^22, 0 <= draw < DRAWS.
    """
    return DRAFT | (node * DRAWS + draw) << 2


def coin(seed: int, sample: int, position: int, node: int) -> float:
    """A uniform number in [0, 1) of 53 bits: what a rejection rule asks about one node of the tree rooted at `position`."""
    a, b, _, _ = philox(node, position, sample, COIN, seed & MASK, seed >> 32 & MASK)
    return float((a >> 5) * 2**26 + (b >> 6)) * 2.0**-53


def word(seed: int, sample: int, position: int, token: int, stream: int = TARGET) -> int:
    """The 32-bit word of one address, in plain integers."""
    return int(philox(token >> 2, position, sample, stream, seed & MASK, seed >> 32 & MASK)[token & 3])


def gumbel_at(seed: int, sample: int, position: int, token: int, stream: int = TARGET) -> float:
    """`gumbel` of one address, quickly (3 us); its last bit is not the one that counts."""
    u = ((word(seed, sample, position, token, stream) >> 8) + 0.5) * 2.0**-24
    return -float(np.log(-np.log(u)))


def block_words(seed: Any, sample: Any, position: Any, block: np.ndarray, stream: Any = TARGET) -> np.ndarray:
    """32-bit words (uint32) [4, N] of blocks of four tokens, token = 4 * block + lane.

    block is uint64 [N]; the other arguments are ints, or uint64 arrays [N].
    """
    out = np.empty((4, len(block)), dtype=np.uint32)
    step = CHUNK_MANY if isinstance(seed, np.ndarray) else CHUNK
    for first in range(0, len(block), step):
        part = slice(first, first + step)
        own = (a[part] if isinstance(a, np.ndarray) else a for a in (seed, sample, position, stream))
        seed_p, sample_p, position_p, stream_p = own
        out[:, part] = philox(block[part], position_p, sample_p, stream_p, seed_p & MASK, seed_p >> 32 & MASK)
    return out


def to_uniform(bits: Tensor) -> Tensor:
    """24-bit integers to float64 U in (0, 1): the middle of each of 2^24 equal intervals, never 0 or 1."""
    return bits.to(torch.float64).add_(0.5).mul_(2.0**-24)


def to_gumbel(bits: Tensor) -> Tensor:
    """24-bit integers to float32 standard Gumbel noise, -log(-log U)."""
    return to_uniform(bits).log_().neg_().log_().neg_().to(torch.float32)


def uniform(seed: Ints, sample: Ints, position: Ints, token: Tensor | None = None, *, vocab_size: int = 0) -> Tensor:
    """float64 U in [2^-25, 1 - 2^-25] of M addresses x tokens, as `gumbel`: [M, K] or [M, vocab_size].

    float64, because 24 bits and half a step need 25: in float32 the largest would round to 1.
    """
    return to_uniform(_bits(seed, sample, position, token, vocab_size))


def gumbel(
    seed: Ints,
    sample: Ints,
    position: Ints,
    token: Tensor | None = None,
    *,
    vocab_size: int = 0,
    stream: Ints | None = None,
) -> Tensor:
    """float32 Gumbel noise of M addresses (seed[i], sample[i], position[i], stream[i]) x tokens.

    token [M, K] int64 picks the tokens and the device; None means all of range(vocab_size) on seed's device (CPU for plain
    ints). stream None is the target's. Returns [M, K] or [M, vocab_size].
    """
    return to_gumbel(_bits(seed, sample, position, token, vocab_size, stream))


def _bits(seed: Ints, sample: Ints, position: Ints, token: Tensor | None, vocab_size: int, stream: Ints | None = None) -> Tensor:
    """The upper 24 bits of the words: integers [M, K or V] on token's (or seed's) device."""
    device = token.device if token is not None else seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    if device.type != "cpu":
        return _bits_torch(seed, sample, position, token, vocab_size, device, stream)
    seeds = _ints(seed)
    addresses = zip(seeds, _ints(sample), _ints(position), strict=True)
    streams = [TARGET] * len(seeds) if stream is None else _ints(stream)
    if token is None:
        blocks = np.arange(-(-vocab_size // 4), dtype=np.uint64)
        rows = [
            block_words(*address, blocks, s).T.reshape(-1)[:vocab_size] for address, s in zip(addresses, streams, strict=True)
        ]
    else:
        ids = token.numpy().astype(np.uint64)
        rows = [
            np.choose((t & 3).astype(np.intp), block_words(*address, t >> 2, s))
            for address, t, s in zip(addresses, ids, streams, strict=True)
        ]
    columns = vocab_size if token is None else token.shape[1]
    words = np.stack(rows) if rows else np.empty((0, columns), dtype=np.uint32)
    return torch.from_numpy((words >> 8).view(np.int32))


def _bits_torch(
    seed: Ints,
    sample: Ints,
    position: Ints,
    token: Tensor | None,
    vocab_size: int,
    device: torch.device,
    stream: Ints | None = None,
) -> Tensor:
    """The same by torch integer operations, all rows at once; what a GPU runs."""
    s, n, p = (_column(a, device) for a in (seed, sample, position))
    d = torch.full_like(s, TARGET) if stream is None else _column(stream, device)
    if token is None:
        token = torch.arange(vocab_size, device=device).expand(len(s), vocab_size)
    step = max(1, CHUNK_CUDA // max(1, token.shape[1]))
    out = torch.empty(token.shape, dtype=torch.int64, device=device)
    for first in range(0, len(s), step):
        part = slice(first, first + step)
        t = token[part]
        lanes = philox(t >> 2, p[part], n[part], d[part], s[part] & MASK, s[part] >> 32 & MASK)
        out[part] = torch.stack([lane.expand(t.shape) for lane in lanes]).gather(0, (t & 3).unsqueeze(0))[0] >> 8
    return out


def _ints(values: Ints) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]


def _column(values: Ints, device: torch.device) -> Tensor:
    """[M, 1] int64; an unsigned 64-bit seed wraps to the signed integer of the same bits."""
    wrapped = [(v + 2**63) % 2**64 - 2**63 for v in _ints(values)]
    return torch.tensor(wrapped, dtype=torch.int64, device=device).unsqueeze(1)
