"""Random draft forests for the verifying kernels' tests, and the columns that a kernel takes of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from engine.protocols import Siblings
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

NAMES = {"point": Siblings.POINT, "iid": Siblings.IID, "distinct": Siblings.DISTINCT, "greedy": Siblings.GREEDY}


def sequences(count: int, greedy: list[bool]) -> list[Sequence]:
    """Sequences that differ in everything a noise address is made of."""
    found = []
    for b in range(count):
        params = SamplingParams(max_tokens=100, seed=2**64 - 7 * b - 1, temperature=0.0 if greedy[b] else 1.0)
        seq = Sequence(b, Request(request_id=f"r{b}", prompt_ids=[1, 2], params=params), sample_index=b % 3)
        seq.tokens += [3] * (2 * b)
        found.append(seq)
    return found


def int32(values: object, device: torch.device) -> Tensor:
    return torch.tensor(np.asarray(values, dtype=np.int32), device=device)


@dataclass
class Columns:
    """A forest and its sequences as the verifying kernels take them."""

    forest: DraftForest
    seqs: list[Sequence]
    device: torch.device

    def __post_init__(self) -> None:
        f = self.forest
        self.start, self.token, self.parent = (int32(column, self.device) for column in (f.start, f.token, f.parent))
        self.tree = np.repeat(np.arange(f.num_trees), np.diff(f.start))
        self.max_nodes, self.max_depth = int(np.diff(f.start).max(initial=1)), int(f.depth.max(initial=0))
        self.seeds = torch.from_numpy(np.array([s.params.seed for s in self.seqs], dtype=np.uint64).view(np.int64)).to(
            self.device
        )
        self.samples = int32([s.sample_index for s in self.seqs], self.device)
        self.positions = int32([s.num_output for s in self.seqs], self.device)

    def match(self) -> tuple[Tensor, ...]:
        tree = torch.from_numpy(self.tree).to(self.device)
        noisy = torch.tensor([not s.params.greedy for s in self.seqs], device=self.device)
        depth = int32(self.forest.depth, self.device)
        per_node = (noisy[tree], self.seeds[tree], self.samples[tree], self.positions[tree] + depth)
        return (*per_node, self.token, self.parent, self.start, self.max_nodes, self.max_depth)  # type: ignore[return-value]


def verdict(nodes: Tensor, tokens: Tensor, counts: Tensor) -> Verdict:
    """The kernels' tables as a verdict; checks their padding."""
    n, t = nodes.cpu(), tokens.cpu()
    found = Verdict([], [])
    for b, count in enumerate(counts.tolist()):
        accepted = max(count - 1, 0)
        assert (n[b, accepted:] == -1).all() and (n[b, :accepted] > 0).all()
        assert (t[b, count:] == -1).all() and (t[b, :count] >= 0).all()
        found.nodes.append(n[b, :accepted].tolist())
        found.tokens.append(t[b, :count].tolist())
    return found


def peaked(rows: int, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """Logits whose likeliest token has about two thirds of the mass."""
    values = rng.normal(size=(rows, vocab)).astype(np.float32)
    values[np.arange(rows), rng.integers(vocab, size=rows)] += np.log(2 * vocab * np.exp(0.5))
    return values


def sampled_forest(kinds: list[str], vocab: int, rng: np.random.Generator) -> tuple[DraftForest, np.ndarray]:
    """Per tree some levels of children that were drawn from a blurred target law in the way named; there are twins among them."""
    token, parent, laws, law_row, names, start, scores = [], [], [], [], [], [0], []
    for kind in kinds:
        own: list[int] = [-1]
        token.append(0)
        names.append("")
        law_row.append(-1)
        scores.append(peaked(1, vocab, rng)[0])
        node = 0
        while node < len(own) < 12:
            row = scores[start[-1] + node]
            q = np.exp(row * 0.5 + rng.normal(size=vocab) * 0.3)
            q /= q.sum()
            children: list[int]
            if kind == "iid":
                children = rng.choice(vocab, 3, p=q).tolist()
            elif kind == "distinct":
                children = rng.choice(vocab, 3, replace=False, p=q).tolist()
            elif kind == "greedy":
                children = [int(q.argmax())]
                q[children] = 0
                q /= q.sum()
                children.append(int(rng.choice(vocab, p=q)))
            else:
                children = [int(row.argmax()), int(rng.integers(vocab))]
            if kind != "point":
                law_row[start[-1] + node] = len(laws)
                laws.append(q)
            for child in children:
                own.append(node)
                token.append(child)
                names.append(kind)
                law_row.append(-1)
                # Nodes with the same path have the same row behind them, as a model would give it.
                twin = next((i for i in range(1, len(own) - 1) if own[i] == node and token[start[-1] + i] == child), None)
                scores.append(peaked(1, vocab, rng)[0] if twin is None else scores[start[-1] + twin])
            node += 1
        parent.append(own)
        start.append(len(token))
    split = [token[a:b] for a, b in pairwise(start)]
    forest = DraftForest.from_parents(list(zip(split, parent, strict=True)), kinds)
    forest.law = torch.tensor(np.array(laws), dtype=torch.float32)
    forest.law_row = np.array(law_row, dtype=np.int32)
    forest.node_drafter = names
    return forest, np.array(scores)
