"""The most that any exact verifier can accept at one node: the optimal transport's value, from laws alone.

By duality, with H over sets of tokens (Hu et al., "Towards Optimal Multi-draft Speculative Decoding", arXiv 2502.18779):

    best = 1 + min over H of [P(H) - Q(H)],   P(H) the target's mass in H, Q(H) = Pr(all children lie in H)

and for the ways of choosing children below the minimum is at a prefix of the tokens in ascending order of p / q, so one
sort and one cumulative sum find it. It is a yardstick (what is my verifier short of, how many children are worth it), not a
verifier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.protocols import Siblings

# The integral over the time of the first arrival outside H, in steps of its logarithm: accurate to about 1e-8.
LOG_TIME = torch.linspace(-30.0, 18.0, 481, dtype=torch.float64)
CHUNK = 1 << 22  # numbers held at once


def best_acceptance(p: Tensor, q: Tensor, n: int, siblings: Siblings) -> float:
    """The optimal acceptance of n children of a node with target law p [V] and draft law q [V].

    IID: n independent draws from q; DISTINCT: n draws without replacement (all possible tokens where there are fewer);
    GREEDY: the n - 1 likeliest of q and one of the rest; POINT, COUPLED: the n likeliest of q. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"a node has at least one child, not {n}")
    p, q = p.double() / p.double().sum(), q.double() / q.double().sum()
    if siblings in (Siblings.POINT, Siblings.COUPLED):
        return float(p[q.topk(min(n, len(q))).indices].sum())
    sure = 0.0
    if siblings is Siblings.GREEDY:
        top = q.topk(min(n - 1, len(q))).indices
        sure = float(p[top].sum())
        rest = q.clone()
        rest[top] = 0
        if float(rest.sum()) == 0:
            return sure
        p = p.clone()
        p[top] = 0
        return sure + float(torch.minimum(p, rest / rest.sum()).sum())
    possible = q > 0
    if siblings is Siblings.DISTINCT and n >= int(possible.sum()):
        return float(p[possible].sum())
    p, q = p[possible], q[possible]  # an impossible token is in no optimal H: it adds to P(H) alone
    order = (p / q).argsort()
    p, q = p[order], q[order]
    inside = q.cumsum(0).clamp(max=1)
    contained = inside**n if siblings is Siblings.IID else _all_inside(q, n)
    return min(1.0, 1 + float((p.cumsum(0) - contained).min()))


def _all_inside(q: Tensor, n: int) -> Tensor:
    """Pr(the first n of an exponential race with rates q lie among the first m), for every m: [V].

    = 1 - sum over k < n of the integral over t of (1 - q(H)) exp(-t) e_k(exp(q_i t) - 1; i in H), e_k the elementary
    symmetric polynomials: the first arrival outside H comes at t, when k of H have arrived. In logarithms, since both
    factors leave the range of a float.
    """
    outside = (1 - q.cumsum(0)).clamp(min=0)
    total = torch.zeros_like(q)
    step = float(LOG_TIME[1] - LOG_TIME[0])
    for x in LOG_TIME.split(max(1, CHUNK // len(q))):
        t = x.exp().unsqueeze(1)
        rate = q * t
        odds = rate + torch.log(-torch.expm1(-rate))  # log(exp(rate) - 1)
        polynomial = (-t).expand(len(x), len(q))  # log of exp(-t) e_0
        for k in range(n):
            total += (polynomial + x.unsqueeze(1)).exp().sum(0) * step
            if k < n - 1:
                shifted = torch.cat([(polynomial[:, :1] if k == 0 else torch.full_like(t, -torch.inf)), polynomial[:, :-1]], 1)
                polynomial = torch.logcumsumexp(odds + shifted, 1)
    return (1 - outside * total).clamp(min=0, max=1)
