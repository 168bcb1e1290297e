"""A draft tree that grows by forwards of a draft model: which nodes it has, what they are worth, which of them were fed.

Best first: a node's worth is the product of the confidences on its path, and only a node whose children could still be among
the best `budget` nodes is fed. (As EAGLE-2, arXiv 2406.16858, and OPT-Tree, arXiv 2406.17276, value nodes; their trees are
widened by whole levels.)
"""

from __future__ import annotations


class DraftTree:
    """Node 0 is the root. Node i: token[i], parent[i], depth[i], path[i] (its worth), confidence[i]."""

    __slots__ = ("confidence", "depth", "expanded", "order", "parent", "path", "place", "token")

    def __init__(self, root: int) -> None:
        self.token, self.parent, self.depth = [root], [-1], [0]
        self.path, self.confidence = [1.0], [1.0]
        self.expanded: set[int] = set()  # nodes that have all the children they get
        self.order: list[int] = []  # nodes in the order in which they were fed, the root not counted
        self.place: dict[int, int] = {}  # node -> its place in `order`: it is stored that many slots behind the first

    def add(self, parent: int, token: int, confidence: float) -> None:
        self.token.append(token)
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.path.append(self.path[parent] * confidence)
        self.confidence.append(confidence)

    def child(self, node: int, token: int) -> int | None:
        """The first child that carries the token."""
        for i in range(node + 1, len(self.token)):
            if self.parent[i] == node and self.token[i] == token:
                return i
        return None

    def has_children(self, node: int) -> bool:
        return node in self.parent[node + 1 :]

    def tokens_to(self, node: int) -> list[int]:
        """From the root's child down to the node; empty for the root."""
        tokens: list[int] = []
        while node > 0:
            tokens.append(self.token[node])
            node = self.parent[node]
        return tokens[::-1]

    def frontier(self, budget: int, width: int, least: float) -> list[int]:
        """At most `width` nodes worth feeding: at least `least`, and more than the budget-th best there is."""
        paths = sorted(self.path[1:], reverse=True)
        bar = paths[budget - 1] if len(paths) >= budget else -1.0
        room = min(width, budget - 1 - len(self.order))
        open_ = [i for i in range(1, len(self.token)) if i not in self.expanded and self.path[i] > bar and self.path[i] >= least]
        return sorted(sorted(open_, key=lambda i: (-self.path[i], i))[: max(room, 0)])

    def best(self, budget: int) -> list[int]:
        """The root and the best `budget` nodes, ascending; never a node without its parent, which is worth no less."""
        ranked = sorted(range(1, len(self.token)), key=lambda i: (-self.path[i], i))
        return [0, *sorted(ranked[:budget])]

    def feed(self, nodes: list[int]) -> tuple[int, list[int], list[int]]:
        """Take `nodes` into the order of feeding; (length of the trunk, tree to be fed, its parents).

        The trunk are the first fed nodes that form a chain from the root and lie above everything fed behind them: a context
        that needs no mask. Its last node (the root for an empty one) is the root of the tree to be fed, which holds what is
        not trunk, in order.
        """
        for node in nodes:
            self.place[node] = len(self.order)
            self.order.append(node)
        trunk = 0
        while trunk < len(self.order) and self._above_all(trunk):
            trunk += 1
        inside = [self.order[trunk - 1] if trunk else 0, *self.order[trunk:]]
        local = {node: i for i, node in enumerate(inside)}
        return trunk, inside, [-1, *(local[self.parent[node]] for node in inside[1:])]

    def _above_all(self, place: int) -> bool:
        """Whether the node fed at `place` continues the chain before it and everything fed later lies below it."""
        node = self.order[place]
        if self.parent[node] != (self.order[place - 1] if place else 0):
            return False
        return all(self._below(later, node) for later in self.order[place + 1 :])

    def _below(self, node: int, above: int) -> bool:
        while node > above:
            node = self.parent[node]
        return node == above
