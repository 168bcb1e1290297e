"""Device functions: addressed noise. The same bits as engine/noise.py gives on the CPU, at the same addresses.

Philox4x32-10 (Salmon et al., SC 2011): the key is a 64-bit seed, the counter (token // 4, position, sample, stream), the word of
a token lane token % 4. Logarithms are taken in float64 and rounded once to float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST: tl.constexpr = tl.constexpr(17.33)  # no Gumbel value of a 24-bit uniform number exceeds this


@triton.jit
def noise_bits(seed, sample, position, stream, first, TILE: tl.constexpr):
    """The upper 24 bits (int32 [TILE]) of the words of tokens first .. first + TILE; first and TILE are multiples of four."""
    block = first // 4 + tl.arange(0, TILE // 4)
    none = block * 0
    a, b, c, d = tl.philox(seed, block, position + none, sample + none, stream + none)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return (words >> 8).to(tl.int32)


@triton.jit
def gumbel(bits):
    """-log(-log U) in float32 of 24-bit integers, U the middle of each of 2^24 equal intervals."""
    uniform = (bits.to(tl.float64) + 0.5) * (1.0 / 16777216.0)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def coin(seed, sample, position, node):
    """A uniform float64 in [0, 1) of 53 bits: what a rejection rule asks about one node of the tree rooted at `position`."""
    a, b, _c, _d = tl.philox(seed, node, position, sample, node * 0 + 2)  # stream 2: coins
    high = (a >> 5).to(tl.float64) * 67108864.0
    return (high + (b >> 6).to(tl.float64)) * (1.0 / 9007199254740992.0)
