"""The parts of model drafting: ranking with noise, trees that grow, the ledger of blocks, the pace, vocabularies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from engine.draft_law import DraftLaw
from engine.draft_tree import DraftTree
from engine.drafters.draft_model import margin_chances
from engine.gumbel_max import Address, gumbel_argmax
from engine.gumbel_top import Ranked, gumbel_top, top_by_noise_for_all
from engine.kv_ledger import KVLedger
from engine.noise import draft_stream, gumbel
from engine.pace import Pace
from engine.target_law import TargetLaw
from engine.tree import DraftForest
from engine.vocabulary import check_same_vocabulary, read_tokens
from tests.engine.models import tiny
from tests.toy import sequence

VOCAB = 5003


def scores(rows: int, scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, VOCAB))).float()


# ---- gumbel_top


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_the_best_are_those_of_noise_for_every_token(scale: float, count: int) -> None:
    rows = scores(6, scale)
    rows[5, 7:] = -math.inf
    addresses: list[Address | None] = [Address(11, 2, i, draft_stream(i) if i % 2 else 0) for i in range(6)]
    for row, address, (tokens, values) in zip(rows, addresses, gumbel_top(rows, addresses, count), strict=True):
        assert address is not None
        noise = gumbel([address.seed], [address.sample], [address.position], vocab_size=VOCAB, stream=[address.stream])
        whole = row + noise[0]
        best = whole.topk(min(count, int(torch.isfinite(row).sum())))
        assert tokens == best.indices.tolist()
        assert values == pytest.approx(best.values.tolist())


def test_the_first_is_the_targets_own_draw() -> None:
    rows = scores(40, 2.0)
    addresses = [Address(7, 0, i) for i in range(40)]
    assert [tokens[0] for tokens, _ in gumbel_top(rows, addresses, 3)] == gumbel_argmax(rows, range(40), addresses)


def test_without_noise_the_likeliest() -> None:
    rows = scores(3, 1.0)
    for row, (tokens, values) in zip(rows, gumbel_top(rows, [None] * 3, 4), strict=True):
        assert tokens == row.topk(4).indices.tolist() and values == pytest.approx(row.topk(4).values.tolist())


def test_a_gpus_way_finds_the_same() -> None:
    rows = scores(4, 2.0)
    rows[3, 3:] = -math.inf
    addresses = [Address(7, 0, 1), None, Address(8, 1, 2), Address(9, 0, 0)]
    for (tokens, values), (others, reached) in zip(
        gumbel_top(rows, addresses, 5), top_by_noise_for_all(rows, addresses, 5), strict=True
    ):
        assert tokens == others and values == pytest.approx(reached)


@pytest.mark.parametrize("way", [gumbel_top, top_by_noise_for_all])
@pytest.mark.parametrize("address", [None, Address(1, 0, 0)])
def test_unusable_rows_give_nothing(address: Address | None, way: Callable[..., list[Ranked]]) -> None:
    rows = scores(3, 1.0)
    rows[0, 3] = math.nan
    rows[1] = -math.inf
    rows[2, 9] = math.inf
    assert way(rows, [address] * 3, 2) == [([], [])] * 3


# ---- the tree


def grown(*children: tuple[int, int, float]) -> DraftTree:
    tree = DraftTree(0)
    for parent, token, confidence in children:
        tree.add(parent, token, confidence)
        tree.expanded.add(parent)
    return tree


def test_only_nodes_whose_children_may_come_in_are_fed() -> None:
    tree = grown((0, 5, 0.6), (0, 6, 0.3), (0, 7, 0.1))
    assert tree.frontier(budget=8, width=1, least=0.0) == [1]
    assert tree.frontier(budget=8, width=2, least=0.0) == [1, 2]
    assert tree.frontier(budget=8, width=9, least=0.2) == [1, 2]
    assert tree.frontier(budget=2, width=9, least=0.0) == [1], "children of node 2 are worth less than it, the second best"
    assert tree.frontier(budget=1, width=9, least=0.0) == []


def test_the_best_nodes_never_lack_their_parent() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        tree = DraftTree(0)
        for i in range(20):
            tree.add(int(rng.integers(0, i + 1)), i, float(rng.choice([1.0, 0.5, rng.random()])))
        kept = tree.best(7)
        assert len(kept) == 8 and kept == sorted(kept)
        assert all(tree.parent[node] in kept for node in kept[1:])
        assert min(tree.path[node] for node in kept) >= max(p for i, p in enumerate(tree.path) if i not in kept)


def test_a_chain_is_fed_node_by_node() -> None:
    tree = grown((0, 5, 0.6), (0, 6, 0.3), (1, 7, 0.9))
    assert tree.feed([1]) == (1, [1], [-1])
    assert tree.feed([3]) == (2, [3], [-1])
    assert tree.place == {1: 0, 3: 1}


def test_where_branches_are_fed_what_they_share_is_context() -> None:
    tree = grown((0, 5, 0.6), (0, 6, 0.3), (1, 7, 0.9), (1, 8, 0.1), (3, 9, 0.5))
    assert tree.feed([1]) == (1, [1], [-1])
    assert tree.feed([3, 4]) == (1, [1, 3, 4], [-1, 0, 0])
    assert tree.feed([5]) == (1, [1, 3, 4, 5], [-1, 0, 0, 1]), "4 is stored between 3 and 5, which must not see it"
    assert tree.feed([2]) == (0, [0, 1, 3, 4, 5, 2], [-1, 0, 1, 1, 2, 0])
    assert [tree.place[node] for node in (1, 3, 4, 5, 2)] == list(range(5))


# ---- the ledger


def test_blocks_are_trusted_for_what_they_hold() -> None:
    ledger = KVLedger(4)
    text = list(range(20))
    ledger.enter(text, [7, 3, 9, 1, 5], ledger.chain(""), 0, 18)
    assert ledger.find(text, [7, 3, 9, 1, 5], ledger.chain("")) == 16, "the last block is not whole"
    assert ledger.find(text, [7, 3, 2, 1, 5], ledger.chain("")) == 8
    assert ledger.find(text, [3, 7], ledger.chain("")) == 0
    assert ledger.find([99, *text[1:]], [7, 3, 9], ledger.chain("")) == 0
    assert ledger.find([*text[:5], 99, *text[6:]], [7, 3, 9], ledger.chain("")) == 4
    assert ledger.find(text, [7, 3, 9], ledger.chain("another tenant")) == 0


def test_what_is_written_over_is_struck() -> None:
    ledger = KVLedger(4)
    text, blocks = list(range(16)), [7, 3, 9, 1]
    ledger.enter(text, blocks, ledger.chain(""), 0, 16)
    ledger.strike([0, 3], 4, 5)  # another text, one token into its second block
    assert ledger.find(text, blocks, ledger.chain("")) == 4
    assert ledger.find(text, blocks, ledger.chain(""), 8) == 16, "who has read that far itself finds the rest"
    assert ledger.find(text, blocks, ledger.chain(""), 9) == 9


# ---- the pace


def test_the_pace_finds_out_what_fits() -> None:
    pace = Pace(512, 0.1)
    for _ in range(5):
        pace.took(pace.limit, pace.limit / 2000)  # 2,000 tokens a second: 200 of them fit
    assert pace.limit == 200
    pace.took(200, 2.0)
    assert pace.limit == 32
    for _ in range(9):
        pace.took(pace.limit, 1e-6)
    assert pace.limit == 512
    pace.took(3, 1.0)
    assert pace.limit == 512, "a few tokens are all overhead"


# ---- the law


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 0.0, "logit_bias": {3: 2.0, 4: -100.0}},
        {"allowed_token_ids": [1, 5, 9]},
        {"min_tokens": 2, "stop_token_ids": [8]},
        {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.7, "temperature": 1.3},
    ],
)
def test_the_draft_is_shaped_as_the_target(params: dict[str, Any]) -> None:
    eos = frozenset({2})
    seq = sequence([1, 5, 5, 9], eos_ids=eos, **params)
    seq.commit([3])
    forest = DraftForest.from_chains([3], [[5, 7]])
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 12))).float()
    target = TargetLaw(12, eos, "cpu")(logits, [seq], forest)
    DraftLaw(seq, eos).apply(logits, [[], [5], [5, 7]])
    torch.testing.assert_close(logits, target)


def test_the_margin_is_a_probability() -> None:
    chances = margin_chances([3.0, 2.0, -4.0])
    assert chances == sorted(chances, reverse=True) and sum(chances) == pytest.approx(1)
    assert margin_chances([9.0, 1.0])[0] > margin_chances([9.0, 8.0])[0] > 0.5


# ---- vocabularies


def write_tokenizer(folder: Path, tokens: list[str], added: dict[int, str] | None = None) -> str:
    folder.mkdir(exist_ok=True)
    data = {
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
        "added_tokens": [{"id": i, "content": token} for i, token in (added or {}).items()],
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return str(folder)


TOKENS = [f"t{i}" for i in range(1000)]


def test_the_same_vocabulary_in_matrices_of_other_sizes(tmp_path: Path) -> None:
    ours, theirs = write_tokenizer(tmp_path / "a", TOKENS), write_tokenizer(tmp_path / "b", TOKENS, {1000: "<tool>"})
    check_same_vocabulary(ours, 1024, theirs, 1152)


def test_another_token_is_named(tmp_path: Path) -> None:
    ours, theirs = write_tokenizer(tmp_path / "a", TOKENS), write_tokenizer(tmp_path / "b", [*TOKENS[:17], "x", *TOKENS[18:]])
    with pytest.raises(
        ValueError, match=r"draft_model: .*b has another vocabulary: token 17 is 'x' there and 't17' in the model"
    ):
        check_same_vocabulary(ours, 1000, theirs, 1000)


def test_special_tokens_count(tmp_path: Path) -> None:
    ours = write_tokenizer(tmp_path / "a", TOKENS, {1000: "<s>"})
    theirs = write_tokenizer(tmp_path / "b", TOKENS, {1000: "<|im_start|>"})
    with pytest.raises(ValueError, match="token 1000 is"):
        check_same_vocabulary(ours, 1001, theirs, 1001)


def test_a_vocabulary_of_another_size(tmp_path: Path) -> None:
    ours, theirs = write_tokenizer(tmp_path / "a", TOKENS), write_tokenizer(tmp_path / "b", TOKENS[:600])
    with pytest.raises(ValueError, match="600 tokens, the model has 1000"):
        check_same_vocabulary(ours, 1000, theirs, 600)


def test_without_tokenizers_the_rows_decide(tmp_path: Path) -> None:
    check_same_vocabulary(str(tmp_path), 96, str(tmp_path), 96)
    with pytest.raises(ValueError, match="vocabulary of 97 tokens, the model has 96"):
        check_same_vocabulary(str(tmp_path), 96, str(tmp_path), 97)


def test_a_gguf_file_and_a_directory_are_compared(tmp_path: Path) -> None:
    names = TOKENS[:96]
    file = tiny.write_gguf(tiny.model(tiny.config("Llama")), tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32, tokens=names)
    assert read_tokens(file) == dict(enumerate(names))
    check_same_vocabulary(str(file), 96, write_tokenizer(tmp_path / "a", names), 96)
    with pytest.raises(ValueError, match="another vocabulary"):
        check_same_vocabulary(str(file), 96, write_tokenizer(tmp_path / "b", names[::-1]), 96)
