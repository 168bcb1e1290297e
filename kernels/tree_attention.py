"""Attention of prompt chunks and draft trees over a paged KV cache, in Triton. Twin: kernels.reference.tree_attention.

A program holds the query heads of one key head for a few rows of one sequence, and walks over a part of that sequence's keys with
a running softmax (FlashAttention, arXiv 2205.14135; parts merged by their log-sum-exp as in Flash-Decoding). Which sequence a
program belongs to it finds out itself, so a launch depends on nothing but sizes: no number has to come back from the device.

With `fixed_split` a row's bits depend on its own tokens alone, not on its company, nor on whether it was drafted: tiles and parts
of one size, one code path for every tile, and a row of a branched tree reads its path's keys in the order of their positions, as
plain decoding will find them.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import pack_words

MOST_PARTS = 128  # of one context
PART_KEYS = 256  # at least, where the kernel chooses the parts
LONGEST_PART = 8192  # keys: a few long contexts among many short ones do not keep the others waiting
PROGRAMS = 4  # per multiprocessor, to keep its memory pipes full
LOG2E = tl.constexpr(1.4426950408889634)
NO_ROOT = 1 << 30  # behind all rows
FIXED_MULTIPLE = 128  # keys; of every tile's
MOST_PER_HEAD = 128  # query heads of one key head
MOST_SIZE = 256


class Tile(NamedTuple):
    """Query heads and keys of one program's step, warps, and loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _sequence_of(tile, cu_q, num_seqs, STEP: tl.constexpr):
    """Tiles are numbered so that sequence b begins with tile cu_q[b] // STEP + b: enough for its rows, however ragged."""
    low: tl.int32 = 0
    high = num_seqs
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(cu_q + middle) // STEP + middle
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle - 1)
    return low


@triton.jit
def _attend_tile(
    q,  # [BLOCK_M, BLOCK_D]
    acc,
    total,
    most,
    begin,  # the tile's first key
    end,  # keys that a row of this program may see
    keys,  # of one head: [N, S, D]
    values,
    table,
    kv_block,
    kv_slot,
    row,  # [BLOCK_M] of the own sequence
    position,
    context,
    root,
    own_positions,
    words,  # [BLOCK_M] pointers
    path,
    scale,
    soft_cap,
    window,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    TREE: tl.constexpr,
    BY_PATH: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    n = begin + tl.arange(0, BLOCK_N)
    ids = tl.arange(0, BLOCK_D)
    inside = n < end
    tree = context + root  # position of the tree's root
    at = n
    if BY_PATH:
        node = tl.load(path + (n - tree), mask=inside & (n >= tree), other=0)
        at = tl.where(n >= tree, tree + node, n)
    if MASKED:
        page = tl.load(table + at // S, mask=inside, other=0).to(tl.int64)
    else:
        page = tl.load(table + at // S).to(tl.int64)
    place = page * kv_block + (at % S) * kv_slot  # int64: a pool may hold more than 2^31 elements
    if MASKED:
        k = tl.load(keys + place[None, :] + ids[:, None], mask=inside[None, :] & (ids < D)[:, None], other=0.0)
        v = tl.load(values + place[:, None] + ids[None, :], mask=inside[:, None] & (ids < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        k = tl.load(keys + place[None, :] + ids[:, None], mask=(ids < D)[:, None], other=0.0)
        v = tl.load(values + place[:, None] + ids[None, :], mask=(ids < D)[None, :], other=0.0)
    else:
        k = tl.load(keys + place[None, :] + ids[:, None])
        v = tl.load(values + place[:, None] + ids[None, :])
    if WIDE:
        scores = tl.dot(q.to(tl.float32), k.to(q.dtype).to(tl.float32), input_precision="ieee") * scale
    else:
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
    if CAP:
        scores = soft_cap * LOG2E * (1 - 2 / (tl.exp(2 * scores / soft_cap) + 1))  # tanh; the scale has no log2(e) then
    if MASKED:
        if BY_PATH:
            seen = n[None, :] <= position[:, None]
        else:
            seen = n[None, :] <= context + row[:, None]
        if TREE and not BY_PATH:
            i = n - tree
            asked = (inside & (i >= 0))[None, :] & (row >= root)[:, None] & seen
            word = tl.load(words[:, None] + (i >> 5)[None, :], mask=asked, other=-1)
            seen = seen & (((word >> (i & 31)[None, :]) & 1) != 0)
        if WINDOW:
            distance = n
            if TREE and not BY_PATH:
                distance = tl.load(own_positions + (n - context), mask=inside & (n >= context), other=0)
                distance = tl.where(n >= context, distance, n)
            seen = seen & (distance[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, axis=1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    weights = tl.exp2(scores - anchor[:, None])
    fade = tl.exp2(most - anchor)
    total = total * fade + tl.sum(weights, axis=1)
    acc = acc * fade[:, None]
    if WIDE:
        acc = tl.dot(weights.to(q.dtype).to(tl.float32), v.to(q.dtype).to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
    return acc, total, higher


# Numbers that change from step to step must not be compiled in, nor where small tensors happen to lie.
RUNTIME = ["num_rows", "num_seqs", "split_keys", "parts", "table_row", "words_row", "path_row", "window"]
TABLES = ["tables", "cu_q", "context_lens", "roots", "positions", "words", "paths", "kv_scale", "told"]


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=TABLES)
def _attend(
    q,  # [T, H, D]
    kv,  # [N, 2, K, S, D]
    out,  # [T, H, D]
    partial,  # [T, H, parts, D] float32
    lse,  # [T, H, parts] float32, base 2
    tables,  # [B, W]
    cu_q,  # [B + 1]
    context_lens,  # [B]
    roots,  # [B]
    positions,  # [T]
    words,  # [T, words]
    paths,  # [T, nodes]
    kv_scale,  # [2, K]
    told,  # [2]: keys of a part, and how many parts there are
    num_rows,
    num_seqs,
    split_keys,
    parts,
    table_row,
    words_row,
    path_row,
    window,
    scale,
    soft_cap,
    q_row,
    q_head,
    kv_block,
    kv_side,
    kv_head,
    kv_slot,
    H: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    FIXED: tl.constexpr,
    TREE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    TOLD: tl.constexpr,
):
    part_keys = split_keys
    if TOLD:
        if tl.program_id(2) >= tl.load(told + 1):
            return
        part_keys = tl.load(told)
    FULL: tl.constexpr = BLOCK_M // G  # rows of a tile
    STEP: tl.constexpr = 1 if FIXED else FULL
    tile = tl.program_id(0)
    key_head = tl.program_id(1)
    b = _sequence_of(tile, cu_q, num_seqs, STEP)
    first = tl.load(cu_q + b)
    local = (tile - first // STEP - b) * STEP
    lane = tl.arange(0, BLOCK_M)
    ids = tl.arange(0, BLOCK_D)
    row = local + lane // G
    head = key_head * G + lane % G
    spot = (first + row).to(tl.int64)
    if b == num_seqs:  # rows of nobody
        idle = (lane < STEP * G) & (spot < num_rows)
        if not SPLIT:
            nothing = tl.zeros((BLOCK_M, BLOCK_D), out.dtype.element_ty)
            tl.store(out + (spot * H + head)[:, None] * D + ids[None, :], nothing, mask=idle[:, None] & (ids < D)[None, :])
        return
    rows = tl.load(cu_q + b + 1) - first
    if local >= rows:
        return
    context = tl.load(context_lens + b)
    root = rows
    if TREE:
        root = tl.minimum(tl.load(roots + b), rows)
    taken = FULL
    if FIXED:  # one row of a tree, or as many as fit of a chunk, and then none in the tiles behind it
        taken = tl.where(root < rows, 1, FULL)
        if local % taken != 0:
            return
    held = (lane < taken * G) & (row < rows)
    full = held[:, None] & (ids < D)[None, :]
    queries = tl.load(q + (spot * q_row + head * q_head)[:, None] + ids[None, :], mask=full, other=0.0)
    end = context + tl.minimum(local + taken, rows)
    position = context + row
    if FIXED or (TREE and WINDOW):
        position = tl.load(positions + spot, mask=held, other=-1).to(tl.int32)
        if FIXED:
            end = tl.max(position, axis=0) + 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(context + tl.minimum(local, root) - window + 1, 0) // BLOCK_N * BLOCK_N
    if SPLIT:
        part_begin = tl.program_id(2) * part_keys
        if WINDOW and not FIXED:  # the window is what is split
            part_begin += begin
        begin = tl.maximum(begin, part_begin)
        end = tl.minimum(end, part_begin + part_keys)
    if SCALED:
        scale = scale * tl.load(kv_scale + key_head)
    keys = kv + key_head * kv_head
    values = keys + kv_side
    table = tables + b.to(tl.int64) * table_row
    own_words = words + tl.where(held, spot, first) * words_row
    own_path = paths + (first + local).to(tl.int64) * path_row
    own_positions = positions + first
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    edge = begin  # before it every row sees every key
    if not FIXED and not WINDOW:
        edge = tl.maximum(begin, tl.minimum(end, context) // BLOCK_N * BLOCK_N)
        for n in range(begin, edge, BLOCK_N):
            acc, total, most = _attend_tile(
                queries, acc, total, most, n, end, keys, values, table, kv_block, kv_slot, row, position, context, root,
                own_positions, own_words, own_path, scale, soft_cap, window,
                S, D, BLOCK_N, BLOCK_D, False, False, False, False, CAP, WIDE,
            )  # fmt: skip
    for n in range(edge, end, BLOCK_N):
        acc, total, most = _attend_tile(
            queries, acc, total, most, n, end, keys, values, table, kv_block, kv_slot, row, position, context, root,
            own_positions, own_words, own_path, scale, soft_cap, window,
            S, D, BLOCK_N, BLOCK_D, True, TREE, FIXED, WINDOW, CAP, WIDE,
        )  # fmt: skip
    answer = acc / tl.where(total == 0, 1.0, total)[:, None]
    if SCALED:
        answer = answer * tl.load(kv_scale + H // G + key_head)
    if SPLIT:
        part = (spot * H + head) * parts + tl.program_id(2)
        tl.store(lse + part, tl.where(total == 0, float("-inf"), most + tl.log2(total)), mask=held)
        tl.store(partial + part[:, None] * D + ids[None, :], answer, mask=full)
    else:
        tl.store(out + (spot * H + head)[:, None] * D + ids[None, :], answer.to(out.dtype.element_ty), mask=full)


@triton.jit(do_not_specialize=["num_seqs", "parts"], do_not_specialize_on_alignment=["cu_q", "told"])
def _merge(
    out,
    partial,
    lse,
    cu_q,
    told,
    num_seqs,
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    TOLD: tl.constexpr,
):
    """One head of one row: its parts, added in their order."""
    used = parts
    if TOLD:
        used = tl.load(told + 1)
    row = tl.program_id(0)
    spot = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    ids = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    total = 0.0
    if row < tl.load(cu_q + num_seqs):
        part = tl.arange(0, PARTS)
        levels = tl.load(lse + spot * parts + part, mask=part < used, other=float("-inf"))
        most = tl.max(levels, axis=0)
        anchor = tl.where(most == float("-inf"), 0.0, most)
        for i in range(used):
            weight = tl.exp2(tl.load(lse + spot * parts + i) - anchor)
            piece = tl.load(partial + (spot * parts + i) * D + ids, mask=ids < D, other=0.0)
            acc += weight * piece
            total += weight
    answer = acc / tl.where(total == 0, 1.0, total)
    tl.store(out + spot * D + ids, answer.to(out.dtype.element_ty), mask=ids < D)


def tree_attention(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    cu_q: Tensor,
    context_lens: Tensor,
    ancestors: Tensor | None,
    scale: float,
    *,
    roots: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scale: Tensor | None = None,
    max_rows: int | None = None,
    max_keys: int | None = None,
    splits: int = 0,
    fixed_split: int = 0,
    paths: Tensor | None = None,
    told: Tensor | None = None,
) -> Tensor:
    """Paged attention of prompt chunks and draft trees; what comes out is the twin's, see there. Returns a new [T, H, D].

    q [T, H, D] fp32, bf16 or fp16; kv [N, 2, K, S, D] of q's type or float8_e4m3fn; any strides, the last dimension contiguous.
    H / K at most 128, D at most 256 (64, 80, 96, 128, 256 are the usual). block_tables [B, W] int32; cu_q [B + 1], context_lens,
    roots [B] int32; positions [T] int32 or int64; ancestors bool, or int32 words [T, words]; kv_scale [2, K] float32.

    The rest says how, not what: max_rows of one sequence and max_keys of one context, bounds known without asking the device
    (None: T, and what a block table holds). splits: parts of a context, 0 for as many as fill the device. fixed_split: keys of a
    part, a multiple of 128, for answers that do not depend on company; it needs positions, and for trees paths [T, nodes] int32:
    paths[t, i] is the tree node at depth i of row t's path, for i up to row t's own depth (anything beyond). told int32 [2], for
    launches that are recorded and run again: `splits` parts are launched (at least 2); how many keys each has and how many are in
    use is read from told on the device (`part_sizes`), and max_rows then says for how many rows tiles are made, and no more.

    Raises ValueError for sizes that it has no form for, and for arguments that are missing.
    """
    num_kv_heads, block_size, size = kv.shape[2:]
    num_rows, num_heads, _ = q.shape
    per_head, fixed = num_heads // num_kv_heads, fixed_split > 0
    tree = fixed or ancestors is not None  # a fixed order comes out of one and the same compiled kernel
    if (what := unsupported(num_heads, num_kv_heads, size)) is not None:
        raise ValueError(f"tree_attention has no form for {what}")
    if fixed_split % FIXED_MULTIPLE:
        raise ValueError(f"a fixed split is a multiple of {FIXED_MULTIPLE} keys, not {fixed_split}")
    if positions is None and (fixed or (tree and window is not None)):
        raise ValueError("positions are missing: a fixed split needs them, and so do trees with a window")
    if paths is None and fixed and ancestors is not None:
        raise ValueError("paths are missing: trees need them with a fixed split")
    out = torch.empty(num_rows, num_heads, size, dtype=q.dtype, device=q.device)
    if not num_rows:
        return out
    if ancestors is not None and ancestors.dtype == torch.bool:
        ancestors = pack_words(ancestors)
    if tree and (roots is None or ancestors is None):
        roots = torch.full_like(context_lens, 0 if ancestors is not None else NO_ROOT)
    q = q if q.stride(2) == 1 else q.contiguous()
    num_seqs = len(context_lens)
    rows_of_one = min(num_rows, max_rows or num_rows)
    tile = _tile(rows_of_one * per_head, per_head, size, q.dtype == torch.float32, fixed)
    full = tile.rows // per_head
    step = 1 if fixed else full
    keys = max(max_keys or block_tables.shape[1] * block_size, 1)
    if window is not None and not fixed:
        keys = min(keys, window + rows_of_one + tile.keys)
    if told is not None and not 2 <= splits <= MOST_PARTS:
        raise ValueError(f"2 to {MOST_PARTS} parts are launched where the device is told of them, not {splits}")
    busy = min(num_rows // full + num_seqs, num_seqs * -(-rows_of_one // full))
    split_keys = fixed_split or _split_keys(keys, busy * num_kv_heads, tile.keys, splits, q.device)
    parts = -(-keys // split_keys) if told is None else splits
    if parts > MOST_PARTS:
        raise ValueError(f"a context of {keys} keys has more than {MOST_PARTS} parts of {split_keys}")
    partial = lse = out
    merged = fixed or parts > 1
    if merged:
        partial = torch.empty(num_rows, num_heads, parts, size, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_rows, num_heads, parts, dtype=torch.float32, device=q.device)
    block_d = max(triton.next_power_of_2(size), 16)
    _attend[(num_rows // step + num_seqs + 1, num_kv_heads, parts)](
        q,
        kv,
        out,
        partial,
        lse,
        block_tables,
        cu_q,
        context_lens,
        cu_q if roots is None else roots,
        cu_q if positions is None else positions,
        cu_q if ancestors is None else ancestors,
        cu_q if paths is None else paths,
        cu_q if kv_scale is None else kv_scale,
        cu_q if told is None else told,
        num_rows,
        num_seqs,
        split_keys,
        parts,
        block_tables.stride(0),
        0 if ancestors is None else ancestors.stride(0),
        0 if paths is None else paths.stride(0),
        window or 0,
        scale if soft_cap is not None else scale * LOG2E.value,
        soft_cap or 0.0,
        q.stride(0),
        q.stride(1),
        *kv.stride()[:4],
        H=num_heads,
        G=per_head,
        S=block_size,
        D=size,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_D=block_d,
        SPLIT=merged,
        FIXED=fixed,
        TREE=tree,
        WINDOW=window is not None,
        CAP=soft_cap is not None,
        SCALED=kv_scale is not None,
        WIDE=q.device.type == "cpu",  # the interpreter multiplies no bf16 matrices
        TOLD=told is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if merged:
        sizes = {"D": size, "BLOCK_D": block_d, "PARTS": MOST_PARTS, "TOLD": told is not None}
        given = cu_q if told is None else told
        _merge[(num_rows, num_heads)](out, partial, lse, cu_q, given, num_seqs, parts, **sizes, num_warps=2 if size > 128 else 1)
    return out


def forms(per_head: int, size: int, dtype: torch.dtype, fixed: bool) -> list[tuple[int, int, int, bool]]:
    """(rows of a sequence, keys, splits, tree): calls that take between them every form this may be compiled to, window and
    positions given or not as ever. per_head: query heads of a key head."""
    tiles = {
        _tile(rows * per_head, per_head, size, dtype == torch.float32, fixed): rows for rows in (128, 64, 32, 16, 8, 4, 2, 1)
    }
    if fixed:
        return [(rows, 4 * tile.keys, 0, True) for tile, rows in tiles.items()]
    ways = ((1, False), (2, False), (1, True), (2, True))
    return [(rows, rows + 4 * tile.keys, splits, tree) for tile, rows in tiles.items() for splits, tree in ways]


def launched_parts(
    num_rows: int, num_seqs: int, num_kv_heads: int, per_head: int, size: int, wide: bool, longest: int, device: torch.device
) -> int:
    """Parts to launch for so many rows of so many sequences, contexts of up to `longest` keys; 1: nothing has to be told."""
    lanes = -(-num_rows // num_seqs) * per_head
    tile = _tile(lanes, per_head, size, wide, False)
    busy = min(num_rows * per_head // tile.rows + num_seqs, num_seqs * -(-lanes // tile.rows))
    keys = _split_keys(longest, busy * num_kv_heads, tile.keys, 0, device)
    return -(-longest // keys)


def part_sizes(most_keys: int, launched: int) -> tuple[int, int]:
    """(keys of a part, parts in use) for contexts of up to so many keys, the step's own rows among them: for `told`."""
    keys = max(-(-most_keys // launched), PART_KEYS)
    keys = -(-keys // FIXED_MULTIPLE) * FIXED_MULTIPLE
    return keys, max(-(-most_keys // keys), 1)


def unsupported(num_heads: int, num_kv_heads: int, size: int) -> str | None:
    """Why there is no form for heads of these numbers and this size; None when there is one."""
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MOST_PER_HEAD:
        return f"{num_heads} query heads over {num_kv_heads} key heads"
    return f"heads of {size}" if size > MOST_SIZE else None


def _tile(lanes: int, per_head: int, size: int, wide: bool, fixed: bool) -> Tile:
    """For `lanes` query heads (rows times heads per key head) of one sequence; wide: float32.

    The largest tiles that ptxas fits into registers for sm_90 (Triton 3.6). Keys are found through a block table, two
    loads one behind the other, between which Triton shares the stages: 3 keep one tile of keys in flight, 5 keep two.
    """
    most = 16 if wide else 64 if size > 128 else 128
    rows = min(64, most) if fixed else min(max(triton.next_power_of_2(lanes), 16), most)
    rows = max(rows, triton.next_power_of_2(per_head))
    if wide:
        return Tile(rows, 32 if size <= 64 else 16, min(max(rows // 8, 4), 16), 3)
    if size > 128:
        return Tile(rows, 32, 4 if rows < 64 else 8, 3)
    if rows < 64:
        return Tile(rows, 128 if size <= 64 else 64, 4, 5)
    return Tile(rows, 64, 4 if rows == 64 else 8, 3)


def _split_keys(keys: int, programs: int, tile_keys: int, splits: int, device: torch.device) -> int:
    """Keys of a part: whole tiles."""
    if not splits:
        filling = PROGRAMS * _processors(device) // max(programs, 1)
        splits = max(min(filling, keys // PART_KEYS), -(-keys // LONGEST_PART), 1)
    each = -(-keys // min(splits, MOST_PARTS))
    return max(-(-each // tile_keys), 1) * tile_keys


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
