"""Random draft forests for the verifying kernels' tests, and the columns that a kernel takes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.protocols import Siblings
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

KINDS = [Siblings.POINT, Siblings.IID, Siblings.DISTINCT, Siblings.GREEDY]  # in the order of kernels.reject's numbers


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
