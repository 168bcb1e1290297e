"""The kernels that move keys and values in the paged pool, and the tree masks, against their plain-torch twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference

pytest.importorskip("triton")

from kernels.commit_kv import HELD, LEAST_STRIP, commit_kv
from kernels.copy_blocks import copy_blocks
from kernels.tree_mask import tree_mask
from kernels.write_kv import write_kv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = [(1, 1, 1, 16), (3, 3, 16, 80), (7, 2, 32, 64)]  # rows, KV heads, block size, head size
FULL = [(256, 8, 16, 128), (512, 3, 16, 64), (64, 8, 1, 256)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit: nothing here computes, and NaN moves like anything else."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.dtype.itemsize]
    return torch.equal(found.view(integer), expected.view(integer))


def pool(layers: int, blocks: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    heads, block_size, size = shape
    kv = torch.randn(layers, blocks, 2, heads, block_size, size, device=device).to(dtype)
    kv[:, 0] = torch.nan
    return kv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL)
def test_rows_are_written_to_their_slots(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    check_write(*shape, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FULL)
def test_rows_are_written_at_full_size(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    check_write(*shape, dtype, device)


def check_write(rows: int, heads: int, block_size: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    blocks = rows + 2
    kv = pool(1, blocks, (heads, block_size, size), dtype, device)[0]
    # Keys and values as a layer has them: inside a wider matrix, behind its queries.
    qkv = torch.randn(rows, 5 * size + 2 * heads * size, device=device).to(dtype)
    new = qkv[:, 5 * size :].unflatten(1, (2, heads, size))
    new[0, 0, 0, 0] = torch.nan
    slots = torch.randperm(blocks * block_size, device=device)[:rows]
    slots[rows // 2] = -1
    expected = kv.clone()
    reference.write_kv(expected, new, slots)
    write_kv(kv, new, slots.int())
    assert same(kv, expected)


def test_no_rows_are_no_launch(device: torch.device) -> None:
    kv = pool(2, 3, (1, 4, 16), torch.float32, device)
    before, none = kv.clone(), torch.empty(0, dtype=torch.int64, device=device)
    write_kv(kv[0], torch.empty(0, 2, 1, 16, device=device), none)
    commit_kv(kv, none, none)
    copy_blocks(kv, none, none)
    assert same(kv, before)
    depth, words = tree_mask(none.int(), torch.zeros(1, dtype=torch.int32, device=device), 2)
    assert depth.shape == (0,) and words.shape == (0, 2)


def test_float8_is_stored_divided_by_its_scale(device: torch.device) -> None:
    heads, block_size, size = 3, 16, 64
    kv = torch.zeros(4, 2, heads, block_size, size, device=device).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0, 4.0], [1.0, 0.25, 8.0]], device=device)
    exact = (torch.randint(-8, 9, (5, 2, heads, size), device=device) * 2.0).to(torch.float8_e4m3fn).float()
    new = (exact * scale[..., None]).to(torch.bfloat16)
    new[0, 1, 2, 3] = 30000  # beyond 448 * 8: it saturates
    slots = torch.tensor([3, 17, 40, 0, 63], device=device)
    expected = kv.clone()
    reference.write_kv(expected, new, slots, scale)
    write_kv(kv, new, slots, scale)
    assert same(kv, expected)
    assert kv[0, 1, 2, 3, 3].float() == 448


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("moved", [1, 3, 40])
def test_paths_are_packed_in_every_layer(moved: int, dtype: torch.dtype, device: torch.device) -> None:
    check_commit(2, moved, (2, 7, 80), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", [1, 17, 256, 2048, 2049])
def test_paths_are_packed_at_full_size(moved: int, dtype: torch.dtype, device: torch.device) -> None:
    for _ in range(5):  # a race shows now and then
        check_commit(16, moved, (8, 16, 128), dtype, device)


def check_commit(layers: int, moved: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Sources and targets out of the same few slots: cycles, chains, and slots that stay."""
    slots = moved + moved // 2 + 1
    kv = pool(layers, -(-slots // shape[1]), shape, torch.float32, device).nan_to_num().to(dtype)
    source, target = (torch.randperm(slots, device=device)[:moved] for _ in range(2))
    expected = kv.clone()
    reference.commit_kv(expected, source, target)
    commit_kv(kv, source, target.int())
    assert same(kv, expected)


def test_more_moves_than_registers_hold_go_through_a_copy(device: torch.device) -> None:
    check_commit(1, HELD // LEAST_STRIP + 1, (1, 16, 16), torch.float32, device)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 16, 80), (2, 32, 64)])
def test_blocks_are_copied(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    check_copy(2, 3, shape, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", [1, 7, 256])
def test_blocks_are_copied_at_full_size(moved: int, dtype: torch.dtype, device: torch.device) -> None:
    check_copy(16, moved, (8, 16, 128), dtype, device)


def check_copy(layers: int, moved: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    kv = pool(layers, 2 * moved + 1, shape, torch.float32, device).nan_to_num().to(dtype)
    order = torch.randperm(2 * moved + 1, device=device)
    expected = kv.clone()
    reference.copy_blocks(expected, order[:moved], order[moved : 2 * moved])
    copy_blocks(kv, order[:moved], order[moved : 2 * moved].int())
    assert same(kv, expected)


def test_a_pool_in_pieces_is_refused(device: torch.device) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="one piece"):
        copy_blocks(pool(1, 2, (2, 4, 16), torch.float32, device)[..., :8], none, none)


def parents(sizes: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Random trees of so many nodes, and where each begins."""
    parent = [int(torch.randint(0, node, ())) if node else -1 for size in sizes for node in range(size)]
    start = torch.tensor([0, *sizes]).cumsum(0)
    return torch.tensor(parent, dtype=torch.int32, device=device), start.to(device=device, dtype=torch.int32)


@pytest.mark.parametrize(("sizes", "words"), [([1], 1), ([5, 1, 0], 1), ([33, 64, 1, 2, 31, 32, 65], 3), ([512, 7], 16)])
def test_masks_of_random_trees(sizes: list[int], words: int, device: torch.device) -> None:
    parent, start = parents(sizes, device)
    (depth, seen), (depth_twin, seen_twin) = (f(parent, start, words) for f in (tree_mask, reference.tree_mask))
    assert torch.equal(depth, depth_twin) and torch.equal(seen, seen_twin)


def test_the_mask_of_a_chain_is_causal(device: torch.device) -> None:
    parent = torch.arange(-1, 69, dtype=torch.int32, device=device)
    depth, words = tree_mask(parent, torch.tensor([0, 70], dtype=torch.int32, device=device), 3)
    assert depth.tolist() == list(range(70))
    assert torch.equal(reference.unpack_words(words)[:, :70], torch.ones(70, 70, dtype=torch.bool, device=device).tril())
    assert not reference.unpack_words(words)[:, 70:].any()


def test_words_are_bits() -> None:
    mask = torch.rand(5, 70) < 0.5
    words = reference.pack_words(mask)
    assert words.dtype == torch.int32 and words.shape == (5, 3)
    assert torch.equal(reference.unpack_words(words)[:, :70], mask)
    assert [int(words[0, j // 32]) >> (j % 32) & 1 for j in range(70)] == mask[0].int().tolist()
