"""The law by which one draft child was chosen, given its siblings drawn before it: what rejection rules judge it by.

A deterministic child has the one-hot law, whatever the model that proposed it thinks of the token (core.md 0.4, R2).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.protocols import Siblings

EMPTY = 1e-12  # a residual with less mass is rounding: the two laws were equal


@dataclass(frozen=True, slots=True)
class OneHot:
    """The child was bound to be this token."""

    token: int

    def of(self, token: int) -> float:
        return float(token == self.token)

    def below(self, law: Tensor, scale: float = 1.0) -> Tensor:
        rest = law.clone()
        rest[self.token] = (rest[self.token] - scale).clamp(min=0)
        return rest


@dataclass(frozen=True, slots=True)
class Drawn:
    """The child was drawn from `law` [V]."""

    law: Tensor

    def of(self, token: int) -> float:
        return float(self.law[token])

    def below(self, law: Tensor, scale: float = 1.0) -> Tensor:
        """What of `law` [V] lies above the (scaled) law of the child: max(law - scale * own, 0)."""
        return (law - (self.law if scale == 1 else scale * self.law)).clamp(min=0)


ChildLaw = OneHot | Drawn


class SiblingLaws:
    """The laws of a node's children, one after the other, in draw order; q [V] is the node's draft law, None if it has none."""

    def __init__(self, q: Tensor | None) -> None:
        self._q, self._rest = q, q

    def next(self, token: int, kind: Siblings) -> ChildLaw:
        """The law of the next child, which carries `token`."""
        if self._q is None or self._rest is None or kind in (Siblings.POINT, Siblings.COUPLED):
            return OneHot(token)
        if kind is Siblings.IID:
            return Drawn(self._q)
        if kind is Siblings.GREEDY:  # the node's law is that of the last child: none of the others is possible under it
            return Drawn(self._q) if float(self._q[token]) > 0 else OneHot(token)
        law = Drawn(self._rest)
        rest = self._rest.clone()
        rest[token] = 0
        mass = rest.sum()
        self._rest = rest / mass if float(mass) > EMPTY else None  # nothing left to draw: what follows was chosen
        return law


def residual(law: Tensor, child: ChildLaw, scale: float = 1.0) -> Tensor:
    """norm(max(law - scale * child, 0)): what a rejected child leaves; `law` itself where nothing is left."""
    rest = child.below(law, scale)
    mass = rest.sum()
    return rest / mass if float(mass) > EMPTY else law


def carried(worth: float, p: float, q: float) -> float:
    """min(1, worth * p / q): what a path is worth with one more token, whose laws are p and q. No division by zero."""
    value = worth * p
    if value <= 0:
        return 0.0
    return 1.0 if value >= q else value / q
