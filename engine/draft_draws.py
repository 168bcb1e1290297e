"""Draws from a draft's own law, with addressed noise: for drafters whose tokens are judged by that law (core.md 0.4, R2).

The law that is drawn from here is the law that belongs into `DraftForest.law`: softmax of the draft's logits with its own
temperature and truncation, float32. The noise depends on the sequence's seed, the position of the tree's root and the
parent node, and on nothing that a verdict uses (`noise.draft_stream`).

It is not coupled drafting: that shares the target's noise (`noise.gumbel`, stream TARGET, at the token's own position), is
judged by `match`, and needs no law.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.gumbel_max import Address, gumbel_argmax
from engine.noise import draft_stream, gumbel
from engine.sequence import Sequence


def draft_address(seq: Sequence, node: int, draw: int = 0) -> Address:
    """Where the noise lies that draws children of a node (its index in the tree) of the draft tree rooted at seq's end."""
    return Address(seq.params.seed, seq.sample_index, seq.num_output, draft_stream(node, draw))


def draw_iid(law: Tensor, seqs: Seq[Sequence], nodes: Seq[int], n: int) -> list[list[int]]:
    """Siblings.IID: n tokens per row of law [M, V], each drawn from the row whatever the others are. Row i: node nodes[i]."""
    pairs = list(zip(seqs, nodes, strict=True))
    rows = [i for i in range(len(pairs)) for _ in range(n)]
    tokens = gumbel_argmax(law.log(), rows, [draft_address(seq, node, draw) for seq, node in pairs for draw in range(n)])
    return [tokens[first : first + n] for first in range(0, len(tokens), n)]


def draw_distinct(law: Tensor, seqs: Seq[Sequence], nodes: Seq[int], n: int) -> list[list[int]]:
    """Siblings.DISTINCT: n tokens per row of law [M, V] without replacement, in draw order (Gumbel top-k, arXiv 1903.06059).

    A row with fewer possible tokens gives those. With constant n per depth this is the tree RSD-C (arXiv 2402.14160).
    """
    perturbed = law.log().float() + _noise(seqs, nodes, law)
    values, tokens = perturbed.topk(min(n, law.shape[1]), dim=-1)
    return [row[: sum(possible)] for row, possible in zip(tokens.tolist(), torch.isfinite(values).tolist(), strict=True)]


def draw_greedy(law: Tensor, seqs: Seq[Sequence], nodes: Seq[int], n: int) -> tuple[list[list[int]], Tensor]:
    """Siblings.GREEDY: the n - 1 likeliest tokens per row of law [M, V], then one drawn from the rest (arXiv 2502.18779).

    Returns the children and the law [M, V] of the draw, the rest of the row renormalised: that is the node's law. Where the
    rest is empty its row is zero and no token is drawn.
    """
    top = law.topk(min(n - 1, law.shape[1]), dim=-1).indices
    rest = law.scatter(1, top, 0.0)
    mass = rest.sum(-1, keepdim=True)
    rest = torch.where(mass > 0, rest / mass, torch.zeros_like(rest))
    rows = [i for i, left in enumerate((mass[:, 0] > 0).tolist()) if left]
    drawn = gumbel_argmax(rest.log(), rows, [draft_address(seqs[i], nodes[i]) for i in rows])
    children: list[list[int]] = top.tolist()
    for i, token in zip(rows, drawn, strict=True):
        children[i].append(token)
    return children, rest


@dataclass(frozen=True, slots=True)
class Beam:
    """A level of a stochastic beam: which entry of the level above each entry extends, and by which token.

    Entries are in descending order of the perturbed score: appended to the tree like this, siblings are in draw order.
    """

    parent: list[int]
    token: list[int]
    score: Tensor  # float64 [W]: log-probability of the sequence
    perturbed: Tensor  # float64 [W]: its Gumbel-perturbed score

    @classmethod
    def root(cls) -> Beam:
        return cls([0], [0], torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))

    def extend(self, law: Tensor, seq: Sequence, nodes: Seq[int], width: int) -> Beam:
        """The next level of at most `width` entries; law [W, V] and nodes belong to this level's entries.

        Stochastic beam search (Kool et al., arXiv 1903.06059), as RSD-S draws its tree (arXiv 2402.14160): `width` sequences
        without replacement. A child's noise is a Gumbel variable truncated so that the best child has its parent's value.
        """
        scores = self.score.to(law.device).unsqueeze(1) + law.double().log()
        g = scores + _noise([seq] * len(nodes), nodes, law).double()
        below = self.perturbed.to(law.device).unsqueeze(1)
        u = below - g + torch.log1p(-(g - g.amax(-1, keepdim=True)).exp())
        perturbed = torch.where(torch.isfinite(scores), below - u.relu() - torch.log1p((-u.abs()).exp()), -torch.inf)
        flat = perturbed.flatten()
        values, index = flat.topk(min(width, len(flat)))
        possible = torch.isfinite(values)
        values, index = values[possible].cpu(), index[possible]
        vocab_size = law.shape[1]
        return Beam((index // vocab_size).tolist(), (index % vocab_size).tolist(), scores.flatten()[index].cpu(), values)


def _noise(seqs: Seq[Sequence], nodes: Seq[int], law: Tensor) -> Tensor:
    """float32 [M, V]: the noise of draw 0 of each node."""
    addresses = [draft_address(seq, node) for seq, node in zip(seqs, nodes, strict=True)]
    seeds, samples, positions, streams = zip(*((a.seed, a.sample, a.position, a.stream) for a in addresses), strict=True)
    tokens = torch.arange(law.shape[1], device=law.device).expand(len(addresses), -1)
    return gumbel(seeds, samples, positions, tokens, stream=streams)
