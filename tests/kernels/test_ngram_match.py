"""The batched suffix match against its twin and against the drafter `ngram`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.drafters.ngram import NgramDrafter
from engine.request import Request, SamplingParams
from engine.sequence import Sequence

pytest.importorskip("triton")

from kernels import reference_ngram as reference
from kernels.ngram_match import ngram_draft


def texts(count: int, longest: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Texts of few words, one behind the other in a wider table; lengths down to one token, budgets down to none."""
    torch.manual_seed(longest)
    table = torch.randint(0, vocab, (count, longest + 4), dtype=torch.int32)[:, :longest]
    lengths = torch.randint(max(1, longest // 2), longest + 1, (count,), dtype=torch.int32)
    lengths[0] = longest
    if count > 2:
        lengths[1], lengths[2] = 1, 2
        table[2, :2] = 5
    budgets = torch.arange(count, dtype=torch.int32) * 3 % 11 + 4
    budgets[count // 2] = 0 if count > 1 else 6
    return table.to(device), lengths.to(device), budgets.to(device)


def check(
    tables: tuple[Tensor, Tensor, Tensor], splits: int, min_n: int, max_n: int, trust: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    found = ngram_draft(*tables, 12, min_n, max_n, trust, splits)
    twin = reference.ngram_draft(*tables, 12, min_n, max_n, trust)
    assert all(torch.equal(a, b) for a, b in zip(found, twin, strict=True))
    return found


@pytest.mark.parametrize(("min_n", "max_n"), [(1, 16), (3, 4), (2, 2)])
@pytest.mark.parametrize(("count", "longest", "vocab", "splits"), [(1, 2500, 7, 2), (3, 1111, 3, 1), (7, 60, 4, 3)])
def test_the_longest_latest_match_is_found(
    count: int, longest: int, vocab: int, splits: int, min_n: int, max_n: int, device: torch.device
) -> None:
    assert int(check(texts(count, longest, vocab, device), splits, min_n, max_n)[1].max()) > 0


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "longest"), [(1, 131072), (64, 8192), (256, 1025)])
def test_the_longest_latest_match_is_found_at_full_size(count: int, longest: int, device: torch.device) -> None:
    check(texts(count, longest, 9, device), 0, 1, 16)


@pytest.mark.parametrize("vocab", [2, 6, 40])
def test_it_drafts_what_the_drafter_drafts(vocab: int, device: torch.device) -> None:
    table, lengths, budgets = texts(7, 60, vocab, device)
    chains, counts, _ = check((table, lengths, budgets), 1, 1, 16)
    drafter = NgramDrafter(min_n=1, max_n=16, trust=2)
    seqs = []
    for b, size in enumerate(lengths.tolist()):
        params = SamplingParams(max_tokens=9)
        seqs.append(Sequence(b, Request(request_id=str(b), prompt_ids=table[b, :size].tolist(), params=params)))
    forest = drafter.draft(seqs, budgets.clamp(max=12).tolist())
    for b in range(7):
        assert chains[b, : int(counts[b])].tolist() == forest.token[forest.nodes(b)].tolist()[1:]


def test_a_repetition_is_followed_past_the_end(device: torch.device) -> None:
    table = torch.tensor([[9, 1, 2, 3, 1, 2, 3, 1, 2]], dtype=torch.int32, device=device)
    args = (table, torch.tensor([9], dtype=torch.int32, device=device), torch.tensor([8], dtype=torch.int32, device=device))
    chains, counts, matched = check(args, 1, 1, 16, trust=3)
    assert chains[0, :8].tolist() == [3, 1, 2, 3, 1, 2, 3, 1] and int(counts) == 8 and int(matched) == 5


def test_texts_with_nothing_to_find(device: torch.device) -> None:
    table = torch.tensor([[1, 2, 3, 4], [7, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.int32, device=device)
    lengths = torch.tensor([4, 1, 0], dtype=torch.int32, device=device)
    chains, counts, matched = check((table, lengths, torch.full_like(lengths, 5)), 1, 1, 16)
    assert (chains == -1).all() and not counts.any() and not matched.any()
    assert ngram_draft(table[:0], lengths[:0], lengths[:0], 4)[0].shape == (0, 4)
