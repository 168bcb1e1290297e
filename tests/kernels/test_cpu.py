"""The native CPU kernels against their plain-torch twins, and the promise that a row's bits do not depend on its company."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.cpu import build
from kernels.cpu.build import Unavailable, library
from kernels.cpu.native import Rows, Sink, Threads, move, pack, pad_bias, panels, top

try:
    library()
except Unavailable as unavailable:
    pytest.skip(f"no native kernels here: {unavailable}", allow_module_level=True)

BF16 = torch.bfloat16


@pytest.fixture(scope="module", params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Threads:
    return Threads(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def unpacked(panels: torch.Tensor, size: int) -> torch.Tensor:
    """Panels [N / 32][K / 2][32][2] back to [N, K]."""
    inner = panels.shape[1]
    return panels.view(-1, inner // 2, 32, 2).transpose(1, 2).reshape(-1, inner)[:size]


@pytest.mark.parametrize(("size", "inner"), [(32, 32), (64, 576), (111, 34), (1, 2), (49, 94)])
def test_packing_moves_every_weight_to_its_place(size: int, inner: int) -> None:
    weight = torch.randn(size, inner).to(BF16)
    assert torch.equal(unpacked(pack(weight).data, size), weight)


def test_gate_and_up_lie_side_by_side() -> None:
    gate, up = torch.randn(2, 48, 40).to(BF16)
    panels = unpacked(pack(gate, up).data, 96).view(3, 2, 16, 40)
    assert torch.equal(panels[:, 0].reshape(48, 40), gate)
    assert torch.equal(panels[:, 1].reshape(48, 40), up)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 11, 12, 13, 16, 25, 40])
@pytest.mark.parametrize(("size", "inner"), [(111, 34), (576, 192), (960, 64)])
def test_linear_is_its_twin(rows: int, size: int, inner: int, threads: Threads) -> None:
    x, weight, bias = torch.randn(rows, inner).to(BF16), (torch.randn(size, inner) / inner**0.5).to(BF16), torch.randn(size)
    expected = F.linear(x.float(), weight.float())
    panels = pack(weight)
    out = torch.empty(rows, size)
    threads.linear(x, panels, size, pad_bias(bias), Sink.STORE, out)
    torch.testing.assert_close(out, expected + bias, atol=2e-5, rtol=1e-5)
    added = torch.ones(rows, size)
    threads.linear(x, panels, size, None, Sink.ADD, added)
    torch.testing.assert_close(added, expected + 1, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 9, 30])
def test_silu_mul_is_its_twin(rows: int, threads: Threads) -> None:
    x, gate, up = torch.randn(rows, 64).to(BF16), torch.randn(48, 64).to(BF16), torch.randn(48, 64).to(BF16)
    out = torch.empty(rows, 48, dtype=BF16)
    threads.linear(x, pack(gate, up), 96, None, Sink.SILU_MUL, out)
    expected = reference.silu_mul(F.linear(x.float(), torch.cat((gate, up)).float()))
    torch.testing.assert_close(out.float(), expected, atol=1e-3, rtol=2**-8)


def test_a_rows_product_is_the_same_bits_in_any_company(threads: Threads) -> None:
    x, weight = torch.randn(40, 1536).to(BF16), torch.randn(576, 1536).to(BF16)
    panels, whole = pack(weight), torch.empty(40, 576)
    threads.linear(x, panels, 576, None, Sink.STORE, whole)
    for first, count in [(0, 1), (3, 2), (5, 6), (7, 7), (13, 12), (20, 20), (39, 1)]:
        part = torch.empty(count, 576)
        threads.linear(x[first : first + count], panels, 576, None, Sink.STORE, part)
        assert torch.equal(part, whole[first : first + count])


def test_a_nan_row_stays_alone(threads: Threads) -> None:
    x, weight = torch.randn(7, 64).to(BF16), torch.randn(64, 64).to(BF16)
    x[3, 5] = float("nan")
    out = torch.empty(7, 64)
    threads.linear(x, pack(weight), 64, None, Sink.STORE, out)
    assert out.isnan().any(dim=1).tolist() == [row == 3 for row in range(7)]


Member = tuple[int, int, list[int] | None]  # context, own rows, parents' picks of a tree or None for a chain


def step(members: list[Member], block: int, rng: np.random.Generator) -> tuple[Rows, list[np.ndarray]]:
    """Rows of sequences over shuffled blocks, and who sees whom among each one's own rows."""
    needed = [-(-(context + count) // block) for context, count, _ in members]
    blocks = rng.permutation(sum(needed) + 2).astype(np.int32)
    tables = np.split(blocks[: sum(needed)], np.cumsum(needed)[:-1])
    seen, positions, slots, trees, tree_first = [], [], [], [], []
    offset = 0
    for (context, count, picks), table in zip(members, tables, strict=True):
        own = np.tri(count, dtype=bool)
        if picks is not None:
            own = np.eye(count, dtype=bool)
            for node in range(1, count):
                own[node] |= own[picks[node - 1] % node]
        seen.append(own)
        positions += [context + int(row.sum()) - 1 for row in own]
        slots += [int(table[p // block]) * block + p % block for p in range(context, context + count)]
        tree_first.append(-1 if picks is None else offset)
        if picks is not None:
            trees.append(own.reshape(-1).astype(np.uint8))
            offset += own.size
    counts = [count for _, count, _ in members]
    rows = Rows(
        tokens=np.zeros(sum(counts), dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        slots=np.array(slots, dtype=np.int64),
        first=np.cumsum([0, *counts]).astype(np.int32),
        context=np.array([context for context, _, _ in members], dtype=np.int32),
        tables=np.concatenate(tables),
        table_first=np.cumsum([0, *needed[:-1]]).astype(np.int32),
        trees=np.concatenate(trees) if trees else np.zeros(1, dtype=np.uint8),
        tree_first=np.array(tree_first, dtype=np.int64),
    )
    return rows, seen


def twin(rows: Rows, seen: list[np.ndarray], q: torch.Tensor, kv: torch.Tensor, window: int | None) -> torch.Tensor:
    """reference.tree_attention in float32, with a sliding window by positions where there is one."""
    heads, (_, _, kv_heads, block, size) = q.shape[1], kv.shape
    out = torch.empty(q.shape)
    for b, own in enumerate(seen):
        first, last, context = int(rows.first[b]), int(rows.first[b + 1]), int(rows.context[b])
        table = torch.from_numpy(rows.tables[rows.table_first[b] :].astype(np.int64))
        length = context + last - first
        keys, values = (
            kv[table[: -(-length // block)]].float().permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, size)[:, :, :length]
        )
        visible = torch.cat((torch.ones(last - first, context, dtype=torch.bool), torch.from_numpy(own)), 1)
        if window:
            at = torch.cat((torch.arange(context), torch.from_numpy(rows.positions[first:last]).long()))
            visible &= at > torch.from_numpy(rows.positions[first:last]).long()[:, None] - window
        scores = q[first:last].float().transpose(0, 1) @ keys.repeat_interleave(heads // kv_heads, 0).transpose(1, 2) * size**-0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[first:last] = (weights @ values.repeat_interleave(heads // kv_heads, 0)).transpose(0, 1)
    return out


shapes = st.tuples(st.integers(0, 70), st.integers(1, 20), st.none() | st.lists(st.integers(0, 10**6), min_size=20, max_size=20))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block", "window"),
    [
        (3, 1, 64, 16, None),
        (4, 4, 32, 1, None),
        (8, 2, 96, 7, None),
        (6, 1, 128, 32, 9),
        (2, 1, 256, 16, 33),
        (40, 2, 32, 16, None),
    ],
)
@settings(max_examples=12, deadline=None)
@given(members=st.lists(shapes, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_attention_is_its_twin(
    heads: int, kv_heads: int, size: int, block: int, window: int | None, members: list[Member], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rows, seen = step(members, block, rng)
    kv = torch.randn(int(rows.tables.max()) + 3, 2, kv_heads, block, size).to(BF16)
    q = torch.randn(len(rows.tokens), heads, size).to(BF16)
    out = Threads(2).attention(q, kv, rows, size**-0.5, window)
    torch.testing.assert_close(out.float(), twin(rows, seen, q, kv, window), atol=4e-3, rtol=1e-2)


def test_a_rows_attention_is_the_same_bits_in_any_company() -> None:
    """Every node of a tree, beside other sequences, equals the last row of a plain context that holds its path."""
    rng, threads, block = np.random.default_rng(1), Threads(2), 16
    picks = [0, 0, 1, 1, 2, 5, 3, 4, 8, 9, 10]
    tree: Member = (37, 12, picks)
    rows, seen = step([(5, 9, None), tree, (100, 1, None)], block, rng)
    kv = torch.randn(64, 2, 2, block, 64).to(BF16)
    q = torch.randn(len(rows.tokens), 6, 64).to(BF16)
    out = threads.attention(q, kv, rows, 0.125)
    for node in range(12):
        path = np.flatnonzero(seen[1][node])
        alone, _ = step([(37 + len(path) - 1, 1, None)], block, np.random.default_rng(0))
        own = torch.zeros(8, 2, 2, block, 64, dtype=BF16)
        for position in range(37 + len(path)):
            from_slot = _slot(rows, 1, position if position < 37 else 37 + int(path[position - 37]), block)
            to_slot = _slot(alone, 0, position, block)
            own[to_slot // block, :, :, to_slot % block] = kv[from_slot // block, :, :, from_slot % block]
        row = int(rows.first[1]) + node
        assert torch.equal(threads.attention(q[row : row + 1], own, alone, 0.125)[0], out[row])


def _slot(rows: Rows, member: int, position: int, block: int) -> int:
    table = rows.tables[rows.table_first[member] :]
    return int(table[position // block]) * block + position % block


def test_a_machine_without_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(Unavailable, match="no C compiler"):
        library.__wrapped__(tmp_path / "kernels")


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho this cannot be >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(Unavailable, match="this cannot be"):
        library.__wrapped__(tmp_path / "kernels")
    assert not [name for name in os.listdir(tmp_path / "kernels") if name.endswith(".so")]


def test_kernels_beside_their_sources_need_no_compiler_and_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "HERE", Path(shutil.copytree(build.HERE, tmp_path / "installed")))
    flags = build._processor_flags()
    monkeypatch.setattr(build, "_processor_flags", lambda: set())  # whoever builds an image need not run them
    build.ship()
    monkeypatch.setattr(build, "_processor_flags", lambda: flags)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Path(library.__wrapped__()._name).parent == tmp_path / "installed"
    assert not (tmp_path / "cache").exists()


def test_an_old_processor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_processor_flags", lambda: {"avx512f", "fma"})
    with pytest.raises(Unavailable, match="avx512_bf16"):
        library.__wrapped__(None)


def peaks_of(logits: torch.Tensor) -> torch.Tensor:
    rows, size = logits.shape
    padded = torch.full((rows, panels(size) * 32), float("-inf"))
    padded[:, :size] = logits
    return padded.view(rows, -1, 32).amax(-1)


@given(data=st.data(), size=st.sampled_from([1, 31, 32, 111, 1000, 8193]), rows=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_top_is_a_stable_sort(data: st.DataObject, size: int, rows: int) -> None:
    k = data.draw(st.integers(1, min(size, 64)))
    levels = data.draw(st.sampled_from([1, 2, 5, 10**6]))  # few levels: many equal logits
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    values = torch.from_numpy(generator.integers(0, levels, (rows, size)).astype(np.float32) - levels / 2)
    values[torch.from_numpy(generator.random((rows, size)) < 0.1)] = float("-inf")
    ids, best = top(values, peaks_of(values), k)
    truth = values.sort(dim=-1, descending=True, stable=True)
    assert ids.tolist() == truth.indices[:, :k].tolist()
    assert best.tolist() == truth.values[:, :k].tolist()


def test_top_of_a_row_with_nan_is_nan_and_stays_alone() -> None:
    values = torch.randn(3, 100)
    values[1, 77] = float("nan")
    ids, best = top(values, peaks_of(values), 8)
    assert np.isnan(best[1]).all()
    assert ((ids >= 0) & (ids < 100)).all()
    assert best[[0, 2]].tolist() == values[[0, 2]].topk(8).values.tolist()


@pytest.mark.parametrize("k", [0, 12, 65])
def test_top_of_more_than_there_is_says_so(k: int) -> None:
    values = torch.randn(1, 11)
    with pytest.raises(ValueError, match="11 logits"):
        top(values, peaks_of(values), k)


def test_slots_move_in_every_layer_one_after_the_other() -> None:
    whole = torch.randn(4, 7, 2, 3, 16, 32).to(BF16)
    kv = whole[:, :6]  # layers do not lie one behind the other
    expected, untouched = kv.clone(), whole[:, 6].clone()
    moves = [(5, 3), (20, 4), (21, 5), (5, 90), (90, 17)]
    for source, target in moves:
        expected[:, target // 16, :, :, target % 16] = expected[:, source // 16, :, :, source % 16]
    move(kv, moves)
    assert torch.equal(kv, expected) and torch.equal(whole[:, 6], untouched)
