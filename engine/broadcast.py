"""What rank 0 tells the other ranks, and how each side keeps to it. Small, MessagePack, never a tensor or a pickle.

A step takes two of them: the plan with the forest that it made of the drafts, and the verdict. (Between them, where a draft made
NaN: that the step is to be fed again without it.) From these every rank keeps the same sequences, block tables and cached keys
and values; a digest that comes along every so many steps proves it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import msgspec
import numpy as np

from engine.parallel import Group
from engine.plan import StepPlan
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

CHECK_STEPS = 64  # between two checks that all ranks have the same tables; every step under `check_integrity`


class DivergedError(RuntimeError):
    """This rank's sequences are not rank 0's."""


class Trees(msgspec.Struct, array_like=True):
    """A DraftForest as far as the target sees it."""

    token: list[int]
    parent: list[int]
    depth: list[int]
    start: list[int]

    @classmethod
    def of(cls, forest: DraftForest) -> Trees:
        return cls(forest.token.tolist(), forest.parent.tolist(), forest.depth.tolist(), forest.start.tolist())

    def forest(self) -> DraftForest:
        token, parent, depth, start = (np.array(row, np.int32) for row in (self.token, self.parent, self.depth, self.start))
        return DraftForest(token, parent, depth, start)


class Step(msgspec.Struct, tag="step", array_like=True):
    plan: StepPlan
    trees: Trees
    digest: int | None = None  # of rank 0's sequences once the plan is applied; compared where it is sent


class Again(msgspec.Struct, tag="again", array_like=True):
    """Feed the step once more, these trees of the forest cut down to their roots."""

    trees: list[int]


class Ruling(msgspec.Struct, tag="ruling", array_like=True):
    """The verdict on the trees of the step before."""

    nodes: list[list[int]]
    tokens: list[list[int]]
    corrupted: list[int]  # rows of the plan whose sequences' blocks are to be zeroed, judged or not

    def verdict(self) -> Verdict:
        return Verdict(self.nodes, self.tokens)


class Study(msgspec.Struct, tag="study", array_like=True):
    """Feed `tokens` side by side behind `first`, for rank 0 to read the logits (engine/study.py)."""

    first: int
    tokens: list[int]


class Drop(msgspec.Struct, tag="drop", array_like=True):
    """Forget these sequences: they were a probe's."""

    seq_ids: list[int]


class Stop(msgspec.Struct, tag="stop", array_like=True):
    """The end of a rank's work."""


Told = Step | Again | Ruling | Study | Drop | Stop
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Told)


def tell(group: Group, message: Told) -> None:
    """From rank 0 to all others, where there are any; the others tell nobody."""
    if group.size > 1 and group.rank == 0:
        group.tell(_ENCODER.encode(message))


def hear(group: Group) -> Told:
    """What rank 0 says next."""
    return _DECODER.decode(group.hear())


def digest(seqs: Iterable[Sequence]) -> int:
    """Of block tables, lengths and last tokens."""
    rows = sorted((seq.seq_id, seq.num_computed, seq.num_tokens, seq.tokens[-1], seq.block_ids) for seq in seqs)
    return zlib.crc32(_ENCODER.encode(rows))


def check(told: Step, seqs: Iterable[Sequence]) -> None:
    """Raises DivergedError when rank 0 sent its digest and this rank's is another."""
    if told.digest is not None and digest(seqs) != told.digest:
        raise DivergedError(f"this rank's sequences differ from rank 0's at step {told.plan.step}")
