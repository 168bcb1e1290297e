"""Which verifier judges which tree: the configured one, or the one that the request chose among those that keep it exact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq

import torch

from engine import registry
from engine.config import EngineConfig
from engine.protocols import Drafter, Verifier
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

PLAIN = EngineConfig(model="").verifier  # the default one: the target's own token


class Verification:
    """The verifiers of one server.

    Raises ValueError when the configured verifier is unknown, would change the answers with one of the drafters, or is not
    lossless and the configuration does not say in so many words that it may be (`EngineConfig.lossy`).
    """

    def __init__(self, config: EngineConfig, drafters: Seq[Drafter]) -> None:
        kinds = {drafter.name: drafter.siblings for drafter in drafters}
        self.default = registry.make_verifier(config.verifier, {"siblings": kinds})
        if not self.default.lossless and not config.lossy:
            raise ValueError(
                f"verifier {config.verifier!r} is not lossless: it changes the answers. "
                "It runs only where the configuration says `lossy` as well"
            )
        registry.check_pairing(drafters, self.default)
        self.plain = registry.make_verifier(PLAIN, {"siblings": kinds})
        every = {name: registry.make_verifier(name, {"siblings": kinds}) for name in registry.VERIFIERS}
        self.offered = {
            name: self.default if name == self.default.name else verifier
            for name, verifier in every.items()
            if verifier.lossless and set(kinds.values()) <= verifier.accepts
        }

    @property
    def names(self) -> list[str]:
        """What a request may choose: lossless, and exact for every configured drafter."""
        return sorted(self.offered)

    def of(self, seq: Sequence) -> Verifier:
        """The verifier of a sequence's request; the configured one where it chose none that is offered."""
        speculation = seq.request.speculation
        if speculation.off:  # plain decoding, also where the configured verifier would not take the target's own token
            return self.plain
        return self.offered.get(speculation.verifier or "", self.default)

    def anticipates(self, seqs: Seq[Sequence]) -> bool:
        """May sampled nodes of these sequences' trees be dropped by somebody who has looked at their tokens?"""
        return all(self.of(seq).anticipates for seq in seqs)

    def verify(self, forest: DraftForest, scores: torch.Tensor, seqs: Seq[Sequence]) -> Verdict:
        """The verdict on every tree, each by its own request's verifier; scores [M, V] in node order."""
        trees: defaultdict[str, list[int]] = defaultdict(list)
        for b, seq in enumerate(seqs):
            trees[self.of(seq).name].append(b)
        if len(trees) <= 1:
            return (self.of(seqs[0]) if seqs else self.default).verify(forest, scores, seqs)
        nodes: dict[int, list[int]] = {}
        tokens: dict[int, list[int]] = {}
        for own in trees.values():
            rows = [row for b in own for row in range(int(forest.start[b]), int(forest.start[b + 1]))]
            found = self.of(seqs[own[0]]).verify(forest.select(own), scores[rows], [seqs[b] for b in own])
            nodes.update(zip(own, found.nodes, strict=True))
            tokens.update(zip(own, found.tokens, strict=True))
        return Verdict([nodes[b] for b in range(len(seqs))], [tokens[b] for b in range(len(seqs))])
