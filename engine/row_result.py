"""What became of one tree, in plain numbers."""

from __future__ import annotations

from engine.plan import RowResult
from engine.protocols import Choice
from engine.tree import DraftForest, Verdict


def row_result(seq_id: int, choice: Choice, verdict: Verdict, tree: int) -> RowResult:
    """The row of a judged sequence, logprobs apart."""
    forest, tokens, nodes = choice.forest, verdict.tokens[tree], verdict.nodes[tree]
    result = RowResult(
        seq_id,
        tokens,
        num_draft=forest.size(tree) - 1,
        drafter=forest.drafter[tree],
        num_dropped=choice.dropped[tree],
        reason=choice.reasons[tree],
        seconds_saved=_seconds_saved(choice, len(tokens)),
    )
    if result.num_draft:
        result.depth = int(forest.depth[forest.nodes(tree)].max())
        result.drafted_by, result.accepted_by = _by_drafter(forest, tree, nodes)
    return result


def _by_drafter(forest: DraftForest, tree: int, nodes: list[int]) -> tuple[dict[str, int], dict[str, int]]:
    """Draft nodes by drafter, and those of them that stood."""
    part = forest.nodes(tree)
    names = [forest.drafter[tree]] * (part.stop - part.start) if forest.node_drafter is None else forest.node_drafter[part]
    drafted: dict[str, int] = {}
    for name in names[1:]:
        drafted[name] = drafted.get(name, 0) + 1
    accepted: dict[str, int] = {}
    for node in nodes:
        accepted[names[node]] = accepted.get(names[node], 0) + 1
    return drafted, accepted


def _seconds_saved(choice: Choice, num_tokens: int) -> float:
    """The steps of plain decoding that this one stands for, less what it took longer; both divided among the sequences."""
    if not num_tokens or not choice.decode_seconds:
        return 0.0
    extra = choice.seconds - choice.plain_seconds
    return ((num_tokens - 1) * choice.decode_seconds - extra) / choice.forest.num_trees
