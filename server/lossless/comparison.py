"""Two answers to one request: whether they are the same, and if not, whether arithmetic or speculation is to blame.

Where two answers part, both were computed from the same tokens, so their logprobs there can be compared. A numerical tie is
a place where the two best tokens lay so close together that rounding decided. For that the logits of the second answer must
themselves prefer its token; a rule that changes answers (a lossy verifier, a bug) picks a token that they do not prefer.

Greedy: the margin is the first answer's logprob of its own token less that of the other one. Seeded: both answers used the
same noise, so how far the gap between the two tokens moved from one answer to the other, divided by the temperature, is the
most that the margin can have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.messages import SequenceUsage, TokenLogprobs

ROUNDING = 1e-5  # of logprobs around -10 in float32
Kind = Literal["tie", "different"]


@dataclass(slots=True)
class Answer:
    """One whole answer. `logprobs` runs parallel to `ids`."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    usage: SequenceUsage = field(default_factory=SequenceUsage)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two answers part. Ids are None behind an answer's end, numbers where the logprobs do not tell."""

    position: int
    plain_id: int | None
    other_id: int | None
    kind: Kind
    top2_margin: float | None = None  # between the plain answer's two likeliest tokens, natural log
    margin: float | None = None  # between the two tokens, in units of logit / temperature; seeded: the most it can be
    moved: float | None = None  # how far the gap between the two tokens differed between the answers, natural log


def compare(plain: Answer, other: Answer, temperature: float, tie: float) -> Difference | None:
    """The first difference; None when there is none. A margin below `tie` may be a numerical tie. `temperature` 0 is greedy."""
    same = _common(plain.ids, other.ids)
    if same == len(plain.ids) == len(other.ids) and plain.finish_reason == other.finish_reason:
        return None
    if same >= min(len(plain.ids), len(other.ids)):  # one ended where the other went on, or for another reason
        return Difference(same, _at(plain.ids, same), _at(other.ids, same), "different")
    one, two = plain.ids[same], other.ids[same]
    before, after = _gap(plain, same, one, two), _gap(other, same, one, two)
    moved = None if before is None or after is None else before - after
    margin = _margin(before, moved, temperature)
    top = plain.logprobs[same].top if same < len(plain.logprobs) else []
    top2 = top[0][1] - top[1][1] if len(top) > 1 else None
    close = margin is not None and -ROUNDING <= margin < tie and (after is None or _prefers(after, margin, temperature))
    return Difference(same, one, two, "tie" if close else "different", top2, margin, moved)


def _margin(before: float | None, moved: float | None, temperature: float) -> float | None:
    if temperature == 0:
        return before
    return None if moved is None else moved / temperature


def _prefers(after: float, margin: float, temperature: float) -> bool:
    """Whether the second answer's own logits may have led to its token: greedy, it is the likelier one; seeded, it gained."""
    return after <= ROUNDING if temperature == 0 else margin > 0


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _at(ids: Sequence[int], position: int) -> int | None:
    return ids[position] if position < len(ids) else None


def _gap(answer: Answer, position: int, one: int, two: int) -> float | None:
    """logprob(one) - logprob(two) at a position of this answer; None when it does not tell both."""
    if position >= len(answer.logprobs):
        return None
    entry = answer.logprobs[position]
    known = {**dict(entry.top), answer.ids[position]: entry.logprob}
    return known[one] - known[two] if one in known and two in known else None
