"""Every random branch of a program, with its probability: the exact law of what it answers.

A program under test takes its randomness from a `Branches` object instead of a generator: it chooses among weighted
outcomes, or compares uniform numbers that know nothing but the interval the comparisons so far have left them. `law` runs it
once for every sequence of outcomes. Nothing here knows what a verifier does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

NEGLIGIBLE = 1e-15  # outcomes less likely than this are rounding


class Branches:
    """The random choices of one run: the first ones as scripted, then always the first possible one."""

    def __init__(self, script: Sequence[int] = ()) -> None:
        self._script = script
        self.taken: list[int] = []
        self.alternatives: list[list[int]] = []  # per choice behind the script: the outcomes not taken
        self.probability = 1.0

    def choose(self, weights: Sequence[float]) -> int:
        """Index i with probability weights[i] / sum(weights)."""
        total = sum(weights)
        possible = [i for i, weight in enumerate(weights) if weight > NEGLIGIBLE * total]
        step = len(self.taken)
        outcome = self._script[step] if step < len(self._script) else possible[0]
        if step >= len(self._script):
            self.alternatives.append(possible[1:])
        self.taken.append(outcome)
        self.probability *= weights[outcome] / total
        return outcome

    def uniform(self) -> Uniform:
        return Uniform(self)


class Uniform:
    """A number u in [0, 1) that is only ever compared: each comparison that it leaves open is a branch.

    `scale * u` compares like the product, so a rule may be written as in the papers: `u * q < p`.
    """

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._low, self._high = 0.0, 1.0

    def __lt__(self, threshold: float) -> bool:
        if threshold <= self._low + NEGLIGIBLE:
            return False
        if threshold >= self._high - NEGLIGIBLE:
            return True
        below = self._branches.choose([threshold - self._low, self._high - threshold]) == 0
        self._low, self._high = (self._low, threshold) if below else (threshold, self._high)
        return below

    def __ge__(self, threshold: float) -> bool:
        return not self < threshold

    def __mul__(self, scale: float) -> _Scaled:
        return _Scaled(self, scale)

    __rmul__ = __mul__


class _Scaled:
    def __init__(self, uniform: Uniform, scale: float) -> None:
        self._uniform, self._scale = uniform, scale

    def __lt__(self, threshold: float) -> bool:
        if self._scale == 0:
            return threshold > 0
        return self._uniform < threshold / self._scale


def law(run: Callable[[Branches], T]) -> dict[T, float]:
    """The exact law of run's answer."""
    found: dict[T, float] = {}
    scripts: list[list[int]] = [[]]
    while scripts:
        script = scripts.pop()
        branches = Branches(script)
        answer = run(branches)
        found[answer] = found.get(answer, 0.0) + branches.probability
        for i, others in enumerate(branches.alternatives):
            before = branches.taken[: len(script) + i]
            scripts += [[*before, other] for other in others]
    return found


def total_variation(one: dict[T, float], other: dict[T, float]) -> float:
    """Half the sum of absolute differences."""
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys()) / 2
