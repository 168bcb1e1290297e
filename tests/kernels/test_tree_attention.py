"""Tree attention in Triton against its plain-torch twin, on ragged batches that mix prompt chunks and draft trees."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference

pytest.importorskip("triton")

from kernels.tree_attention import MOST_PARTS, launched_parts, part_sizes, tree_attention, unsupported

Shape = tuple[int, int, int]  # tokens before the step, rows of a chunk, nodes of the tree behind it
Heads = tuple[int, int, int]  # query heads, key heads, head size
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE: list[Shape] = [(37, 1, 0)]
THREE: list[Shape] = [(70, 1, 0), (5, 3, 9), (0, 7, 0)]
SEVEN: list[Shape] = [(33, 0, 20), (0, 1, 0), (0, 0, 0), (129, 2, 40), (64, 0, 1), (15, 17, 0), (16, 1, 3)]
KINDS: list[tuple[Heads, int, list[Shape]]] = [
    ((3, 1, 64), 16, SEVEN),
    ((4, 4, 80), 1, THREE),
    ((8, 2, 96), 32, THREE),
    ((6, 1, 128), 7, ONE),
    ((2, 1, 256), 16, THREE),
    ((40, 2, 16), 16, THREE),
]


@dataclass
class Batch:
    """Arguments of one call, and the paths that only the kernel takes."""

    arguments: dict[str, Any]
    paths: Tensor
    trees: list[list[int]]  # parents

    @property
    def sees_trees(self) -> dict[str, Any]:
        return self.arguments | {"paths": self.paths}


def make(
    shapes: list[Shape],
    heads: Heads,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    padding: int = 0,
    parents: list[list[int]] | None = None,
) -> Batch:
    num_heads, num_kv_heads, size = heads
    counts = [chunk + nodes for _, chunk, nodes in shapes]
    needed = [-(-(context + rows) // block_size) for (context, _, _), rows in zip(shapes, counts, strict=True)]
    blocks, total = torch.randperm(sum(needed) + 3), sum(counts) + padding
    tables = torch.full((len(shapes), max(needed) + 2), 2**30, dtype=torch.int32)  # what is not needed is not followed
    for table, count, end in zip(tables, needed, torch.tensor(needed).cumsum(0).tolist(), strict=True):
        table[:count] = blocks[end - count : end]
    # Neither queries nor pages lie side by side; nothing behind a sequence's end is finite.
    q = torch.randn(total, num_heads, size + 8, device=device).to(dtype)[..., :size]
    kv = torch.randn(len(blocks), 2, 2, num_kv_heads, block_size, size, device=device).to(dtype)[:, :, 0]
    if parents is None:
        parents = [[int(torch.randint(0, i, ())) if i else -1 for i in range(nodes)] for _, _, nodes in shapes]
    start = torch.tensor([0, *map(len, parents)]).cumsum(0).int()
    num_words = max(1, -(-max(map(len, parents)) // 32))
    depth, of_nodes = reference.tree_mask(
        torch.tensor([p for tree in parents for p in tree], dtype=torch.int32), start, num_words
    )
    words = torch.randint(-(2**31), 2**31, (total, num_words)).int()  # rows of no tree: anything
    positions, paths = torch.zeros(total, dtype=torch.int64), torch.randint(0, 2**30, (total, 1 + max(map(len, parents)))).int()
    first = 0
    for (context, chunk, nodes), rows, begin in zip(shapes, counts, start.tolist(), strict=False):
        positions[first : first + chunk] = torch.arange(context, context + chunk)
        positions[first + chunk : first + rows] = context + chunk + depth[begin : begin + nodes]
        words[first + chunk : first + rows] = of_nodes[begin : begin + nodes]
        for t in range(first + chunk, first + rows):
            path = reference.unpack_words(words[t]).nonzero().flatten()
            paths[t, : len(path)] = path
        first += rows
    for table, (context, _, _), rows in zip(tables, shapes, counts, strict=True):
        if (length := context + rows) % block_size:
            kv[table[length // block_size], :, :, length % block_size :] = torch.nan
    arguments = {
        "q": q,
        "kv": kv,
        "block_tables": tables.to(device),
        "cu_q": torch.tensor([0, *counts]).cumsum(0).int().to(device),
        "context_lens": torch.tensor([context for context, _, _ in shapes]).int().to(device),
        "ancestors": words.to(device),
        "scale": size**-0.5,
        "roots": torch.tensor([chunk for _, chunk, _ in shapes]).int().to(device),
        "positions": positions.to(device),
    }
    return Batch(arguments, paths.to(device), parents)


def check(arguments: dict[str, Any], **how: Any) -> Tensor:
    found, expected = tree_attention(**arguments, **how), reference.tree_attention(**arguments)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[found.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=step, atol=step, equal_nan=True)
    return found


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "block_size", "shapes"), KINDS)
def test_every_shape(heads: Heads, block_size: int, shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> None:
    found = check(make(shapes, heads, block_size, dtype, device, padding=2).arguments)
    assert not found[-2:].any()  # rows of nobody
    assert found.isfinite().all()


@pytest.mark.parametrize("how", [{"splits": 3}, {"splits": 2, "max_rows": 42, "max_keys": 171}, {"fixed_split": 128}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_merged(how: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
    batch = make([(130, 1, 3), (7, 2, 0), (0, 0, 0)], (3, 1, 64), 16, dtype, device, padding=1)
    found = check(batch.arguments, **how, paths=batch.paths)
    assert not found[-1:].any()


@pytest.mark.parametrize("told", [(128, 2), (256, 1)])
@pytest.mark.parametrize("flags", [{}, {"window": 9}])
def test_parts_that_only_the_device_is_told_of(told: tuple[int, int], flags: dict[str, int], device: torch.device) -> None:
    """Five are launched; those that are not in use write nothing, and nobody reads what they left."""
    batch = make([(130, 1, 3), (7, 2, 0), (0, 0, 0)], (3, 1, 64), 16, torch.float32, device, padding=1)
    for how in ({}, {"max_rows": 1, "max_keys": 1}):  # a bound that is none makes other tiles, no other answer
        found = check(batch.arguments | flags, splits=5, told=torch.tensor(told, dtype=torch.int32, device=device), **how)
        assert not found[-1:].any()
    fixed = {"fixed_split": 128, "paths": batch.paths} if told[0] == 128 else {}
    check(batch.arguments | flags, splits=5, told=torch.tensor(told, dtype=torch.int32, device=device), **fixed)


@pytest.mark.parametrize("most_keys", [0, 1, 255, 257, 4096, 100_000])
@pytest.mark.parametrize("launched", [2, 7, 128])
def test_parts_in_use_hold_every_key(most_keys: int, launched: int) -> None:
    keys, used = part_sizes(most_keys, launched)
    assert keys % 128 == 0 and 1 <= used <= launched and keys * used >= most_keys
    assert used == 1 or keys * (used - 1) < most_keys


def test_as_many_parts_are_launched_as_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.tree_attention._processors", lambda device: 132)
    cuda = torch.device("cuda")
    found = [launched_parts(rows, seqs, 8, 4, 128, False, 32768, cuda) for rows, seqs in ((1, 1), (8, 1), (64, 16), (512, 64))]
    assert found[0] > found[2] > 1 and found[3] == 32768 // 8192  # a long context is never left to one program
    assert launched_parts(512, 64, 8, 4, 128, False, 2048, cuda) == 1


@pytest.mark.parametrize("how", [{}, {"splits": 2}, {"fixed_split": 128}])
@pytest.mark.parametrize("flags", [{"window": 9}, {"window": 2}, {"soft_cap": 1.5}, {"window": 40, "soft_cap": 30.0}])
def test_windows_and_soft_caps(how: dict[str, int], flags: dict[str, Any], device: torch.device) -> None:
    """A window of 2 ends inside the trees: it counts positions, not slots."""
    tree = [-1, 0, 0, 2, 3, 3, 5]
    batch = make([(129, 2, 7), (5, 1, 0)], (2, 1, 32), 16, torch.float32, device, parents=[tree, []])
    batch.arguments["q"] *= 4
    check(batch.arguments | flags, **how, paths=batch.paths)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float8_pages_with_scales(dtype: torch.dtype, device: torch.device) -> None:
    batch = make(THREE, (4, 2, 64), 16, dtype, device)
    batch.arguments["kv"] = batch.arguments["kv"].nan_to_num().to(torch.float8_e4m3fn)
    batch.arguments["kv_scale"] = torch.tensor([[0.5, 2.0], [1.5, 0.25]], device=device)
    check(batch.arguments)
    check(batch.arguments, splits=2)


def test_a_chains_mask_is_the_causal_mask(device: torch.device) -> None:
    nodes = 40
    batch = make([(21, 0, nodes)], (4, 2, 32), 16, torch.float32, device, parents=[list(range(-1, nodes - 1))])
    causal = tree_attention(**batch.arguments | {"ancestors": None, "roots": None})
    torch.testing.assert_close(tree_attention(**batch.arguments), causal, rtol=1e-6, atol=1e-6)
    square = torch.ones(nodes, nodes, dtype=torch.bool, device=device).tril()
    found = tree_attention(**batch.arguments | {"ancestors": square, "roots": None})
    torch.testing.assert_close(found, causal, rtol=1e-6, atol=1e-6)
    check(batch.arguments | {"ancestors": None, "roots": None}, fixed_split=128)


def test_rows_may_see_any_earlier_rows(device: torch.device) -> None:
    batch = make([(21, 0, 40), (2, 0, 7)], (4, 2, 32), 16, torch.float32, device)
    rows = torch.rand(47, 40, device=device) < 0.3
    for first, count in ((0, 40), (40, 7)):
        rows[first : first + count, :count] |= torch.eye(count, dtype=torch.bool, device=device)
    check(batch.arguments | {"ancestors": rows, "roots": None})


def test_a_tree_of_512_nodes(device: torch.device) -> None:
    check(make([(3, 0, 512)], (1, 1, 16), 16, torch.float32, device).arguments)


def test_a_row_of_nan_harms_nobody(device: torch.device) -> None:
    batch = make([(20, 1, 5), (9, 1, 3)], (4, 2, 32), 16, torch.float32, device)
    clean = tree_attention(**batch.arguments)
    batch.arguments["q"][2] = torch.nan
    found = tree_attention(**batch.arguments)
    assert found[2].isnan().all()
    others = [row for row in range(len(found)) if row != 2]
    assert torch.equal(found[others], clean[others])
    batch.arguments["kv"][batch.arguments["block_tables"][0, 0]] = torch.nan  # of the first sequence
    found = tree_attention(**batch.arguments)
    assert found[:6].isnan().all() and torch.equal(found[6:], clean[6:])


def test_no_rows_and_no_context(device: torch.device) -> None:
    batch = make([(0, 1, 0)], (2, 1, 16), 16, torch.float32, device)
    found = check(batch.arguments)
    value = batch.arguments["kv"][batch.arguments["block_tables"][0, 0], 1, 0, 0]
    torch.testing.assert_close(found[0], value.expand(2, -1))
    empty = batch.arguments | {"q": batch.arguments["q"][:0], "cu_q": torch.zeros_like(batch.arguments["cu_q"])}
    assert tree_attention(**empty).shape == (0, 2, 16)
    nobody = {"cu_q": torch.zeros_like(empty["cu_q"][:1])}
    nobody |= {name: batch.arguments[name][:0] for name in ("context_lens", "block_tables", "roots")}
    assert not check(batch.arguments | nobody).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 12])
def test_fixed_splits_give_a_drafted_row_the_bits_of_plain_decoding(
    dtype: torch.dtype, window: int | None, device: torch.device
) -> None:
    check_bits((130, 1, 7), (3, 1, 32), 16, dtype, window, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (8, 4, 256)])
def test_fixed_splits_at_full_size(dtype: torch.dtype, heads: Heads, device: torch.device) -> None:
    check_bits((3000, 3, 60), heads, 16, dtype, None, device)


def check_bits(shape: Shape, heads: Heads, block_size: int, dtype: torch.dtype, window: int | None, device: torch.device) -> None:
    """Each node of a tree, in company, against the same row alone, its path committed before it."""
    context, chunk, nodes = shape
    batch = make([shape, (40, 5, 0)], heads, block_size, dtype, device)
    told = batch.sees_trees | {"window": window, "fixed_split": 128}
    together = tree_attention(**told)
    table, kv = batch.arguments["block_tables"][0], batch.arguments["kv"]
    pages = -(-(context + chunk + nodes) // block_size)
    dense = kv[table[:pages].long()]
    for node in range(nodes):
        path = reference.unpack_words(batch.arguments["ancestors"][chunk + node].cpu()).nonzero().flatten().to(device)
        length = context + chunk + len(path)
        slots = torch.cat((torch.arange(context + chunk, device=device), context + chunk + path))
        plain = torch.zeros_like(dense)
        at = torch.arange(length, device=device)
        plain[at // block_size, :, :, at % block_size] = dense[slots // block_size, :, :, slots % block_size]
        alone = tree_attention(
            batch.arguments["q"][chunk + node : chunk + node + 1],
            plain,
            torch.arange(pages, dtype=torch.int32, device=device)[None],
            torch.tensor([0, 1], dtype=torch.int32, device=device),
            torch.tensor([length - 1], dtype=torch.int32, device=device),
            None,
            batch.arguments["scale"],
            positions=torch.tensor([length - 1], device=device),
            window=window,
            fixed_split=128,
        )
        assert torch.equal(alone[0], together[chunk + node])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (32, 32, 80), (12, 12, 96), (8, 4, 256), (71, 1, 64)])
@pytest.mark.parametrize("flags", [{}, {"window": 200}, {"soft_cap": 20.0}])
def test_every_shape_at_full_size(heads: Heads, flags: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    shapes: list[Shape] = [(4096, 0, 17), (0, 300, 0), (1000, 1, 0), (777, 100, 60), (31, 0, 512), (8000, 0, 1), (0, 0, 0)]
    batch = make(shapes, heads, 16, dtype, device, padding=5)
    for how in ({}, {"splits": 1}, {"splits": 7}, {"fixed_split": 1024, "paths": batch.paths}):
        check(batch.arguments | flags, **how)


@pytest.mark.gpu
def test_a_pool_of_more_than_two_to_the_31_elements(device: torch.device) -> None:
    block_size, heads, size, blocks = 16, 8, 128, 70000
    kv = torch.zeros(blocks, 2, heads, block_size, size, dtype=torch.bfloat16, device=device)
    kv[-1] = torch.randn_like(kv[-1])
    q = torch.randn(1, 32, size, dtype=torch.bfloat16, device=device)
    one = torch.tensor([0, 1], dtype=torch.int32, device=device)
    far, near = (
        tree_attention(q, pool, torch.tensor([[block]], dtype=torch.int32, device=device), one, one[1:] * 15, None, 0.1)
        for pool, block in ((kv, blocks - 1), (kv[-1:], 0))
    )
    assert torch.equal(far, near)


def test_what_cannot_be_is_refused(device: torch.device) -> None:
    batch = make(ONE, (4, 2, 32), 16, torch.float32, device)
    with pytest.raises(ValueError, match="multiple of 128"):
        tree_attention(**batch.arguments, fixed_split=100, paths=batch.paths)
    with pytest.raises(ValueError, match="paths are missing"):
        tree_attention(**batch.arguments, fixed_split=128)
    with pytest.raises(ValueError, match="positions are missing"):
        tree_attention(**batch.arguments | {"positions": None, "window": 3})
    with pytest.raises(ValueError, match="positions are missing"):
        tree_attention(**batch.arguments | {"positions": None, "ancestors": None}, fixed_split=128)
    with pytest.raises(ValueError, match=f"more than {MOST_PARTS} parts"):
        tree_attention(**batch.sees_trees, fixed_split=128, max_keys=128 * MOST_PARTS + 1)
    with pytest.raises(ValueError, match="2 to 128 parts are launched"):
        tree_attention(**batch.arguments, told=torch.tensor([128, 1], dtype=torch.int32, device=device))
    assert unsupported(6, 4, 64) and unsupported(8, 8, 512) and unsupported(256, 1, 64)
    assert unsupported(71, 1, 64) is None
    with pytest.raises(ValueError, match="heads of 512"):
        tree_attention(**make(ONE, (1, 1, 512), 16, torch.float32, device).arguments)


def test_the_twin_takes_the_same_arguments() -> None:
    """The kernel takes some more, which say how it goes about it."""
    own, twin = (inspect.signature(f).parameters for f in (tree_attention, reference.tree_attention))
    assert list(own)[: len(twin)] == list(twin)
    assert all(own[name] == twin[name] for name in twin)
    assert set(own) - set(twin) == {"max_rows", "max_keys", "splits", "fixed_split", "paths", "told"}
