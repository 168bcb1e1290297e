"""The target law: what a request's parameters make of the model's logits, at every node of its draft tree.

In this order, each evaluated with the node's own history (the output so far and the draft tokens from the root to the node):

 1. logit_bias          added to the logits
 2. allowed_token_ids   every other token is masked
 3. bad_words           the last token of a word is masked where the node's output ends with the rest of it
 4. min_tokens          what would end the sequence (EOS unless ignore_eos, stop_token_ids) is masked while too little is out
 5. repetition_penalty, then frequency_penalty and presence_penalty (engine/penalties.py)
 6. temperature         divides; 0 means greedy: the best token, and 7 to 9 cannot matter
 7. top_k   8. top_p   9. min_p (engine/truncation.py)

The law is drawn from by a verifier. Rows of draft nodes that it cannot reach, because their own path is ruled out by 7 to 9,
may be left untruncated. A row on which nothing is allowed is all -inf: verifiers report it as unusable, as they
do a row that held NaN.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.device_rules import has_kernels, truncate_rows
from engine.penalties import Penalties
from engine.request import SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest
from engine.truncation import truncate

MASKED = float("-inf")


class TargetLaw:
    """Turns logits into scores: softmax(scores[i]) is the law of the token after node i; greedy rows are judged by argmax."""

    def __init__(self, vocab_size: int, eos_ids: frozenset[int], device: torch.device | str) -> None:
        self.vocab_size, self.eos_ids, self.device = vocab_size, eos_ids, torch.device(device)
        self._laws: dict[int, SequenceLaw | None] = {}  # of the sequences of the last step: nothing to forget

    def __call__(self, logits: Tensor, seqs: Seq[Sequence], forest: DraftForest) -> Tensor:
        """Scores [M, V] of logits [M, V] in node order; tree b of the forest belongs to seqs[b].

        Where no row needs anything the logits themselves come back, in their own type; else a float32 copy, in which the rows
        of plain sequences hold their logits.
        """
        laws = {seq.seq_id: self._law(seq) for seq in seqs}
        self._laws = laws
        if not any(laws.values()):
            return logits
        scores = logits.to(torch.float32, copy=True)
        together = has_kernels(scores.device)
        for b, law in enumerate(laws.values()):
            if law is not None:
                law.apply(scores[forest.nodes(b)], forest, b, truncates=not together)
        if together:
            truncate_rows(scores, [seq.params for seq in seqs], [forest.size(b) for b in range(forest.num_trees)])
        return scores

    def _law(self, seq: Sequence) -> SequenceLaw | None:
        known = self._laws.get(seq.seq_id)
        if known is not None and known.seq is seq:
            return known
        return None if is_plain(seq.params) else SequenceLaw(seq, self.eos_ids, self.device)


def is_plain(p: SamplingParams) -> bool:
    """True when the scores are the logits: greedy or temperature 1, and nothing else asked for."""
    return (
        (p.greedy or (p.temperature == 1 and not _truncates(p)))
        and not p.logit_bias
        and p.allowed_token_ids is None
        and not p.bad_words
        and not p.min_tokens
        and not _penalises(p)
    )


def _truncates(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.top_p < 1 or p.min_p > 0


def _penalises(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


class SequenceLaw:
    """The law of one sequence: its parameters as index tensors, and the token counts that its penalties need."""

    def __init__(self, seq: Sequence, eos_ids: frozenset[int], device: torch.device) -> None:
        p = seq.params
        self.seq = seq
        self._bias_ids = _ids(p.logit_bias, device)
        self._bias = torch.tensor(list(p.logit_bias.values()), dtype=torch.float32, device=device)
        self._allowed = None if p.allowed_token_ids is None else _ids(p.allowed_token_ids, device)
        self._bad_tokens = _ids({word[0] for word in p.bad_words if len(word) == 1}, device)
        self._bad_words: dict[int, list[tuple[list[int], int]]] = {}  # by the last token of the rest: the rest, the last token
        for *rest, last in p.bad_words:
            if rest:
                self._bad_words.setdefault(rest[-1], []).append((rest, last))
        self._longest = max((len(word) - 1 for word in p.bad_words), default=0)
        self._ends = _ids(set(p.stop_token_ids) | (frozenset() if p.ignore_eos else eos_ids), device)
        self._penalties = Penalties(seq) if _penalises(p) else None

    def apply(self, rows: Tensor, forest: DraftForest, tree: int, truncates: bool = True) -> None:
        """Shape float32 rows [n, V] in place, one row per node of the tree; 7 to 9 only where it `truncates`."""
        p = self.seq.params
        if len(self._bias_ids):
            rows[:, self._bias_ids] += self._bias
        if self._allowed is not None:
            kept = rows[:, self._allowed]
            rows.fill_(MASKED)
            rows[:, self._allowed] = kept
        paths = node_paths(forest, tree) if self._bad_words or self._penalties is not None else []
        self._mask_bad_words(rows, paths)
        self._mask_ends(rows, forest, tree)
        if self._penalties is not None:
            self._penalties.apply(rows, self.seq, paths)
        if not p.greedy:
            if p.temperature != 1:
                rows.div_(p.temperature)
            if truncates and _truncates(p):
                self._truncate(rows, forest, tree)

    def _mask_bad_words(self, rows: Tensor, paths: list[list[int]]) -> None:
        if len(self._bad_tokens):
            rows[:, self._bad_tokens] = MASKED
        if not self._bad_words:
            return
        output = self.seq.tokens[max(self.seq.num_prompt, self.seq.num_tokens - self._longest) :]
        for i, path in enumerate(paths):
            history = output + path
            for rest, last in self._bad_words.get(history[-1], ()) if history else ():
                if history[-len(rest) :] == rest:
                    rows[i, last] = MASKED

    def _mask_ends(self, rows: Tensor, forest: DraftForest, tree: int) -> None:
        missing = self.seq.params.min_tokens - self.seq.num_output
        if missing <= 0 or not len(self._ends):
            return
        early = torch.from_numpy(forest.depth[forest.nodes(tree)] < missing).nonzero().to(rows.device)
        rows[early, self._ends] = MASKED

    def _truncate(self, rows: Tensor, forest: DraftForest, tree: int) -> None:
        p = self.seq.params
        if rows.device.type != "cpu":
            truncate(rows, p.top_k, p.top_p, p.min_p)
            return
        # 100 us a row: not for nodes behind a token that their parent's row has just ruled out.
        part = forest.nodes(tree)
        tokens, parents = forest.token[part].tolist(), forest.parent[part].tolist()
        values = rows.numpy()
        reachable: list[bool] = []
        for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            reachable.append(i == 0 or (reachable[parent] and bool(values[parent, token] > MASKED)))
            if reachable[i]:
                truncate(rows[i : i + 1], p.top_k, p.top_p, p.min_p)


def node_paths(forest: DraftForest, tree: int) -> list[list[int]]:
    """The draft tokens from the root to each node of the tree, the node's own included; the root's path is empty."""
    part = forest.nodes(tree)
    paths: list[list[int]] = [[]]
    for token, parent in zip(forest.token[part].tolist()[1:], forest.parent[part].tolist()[1:], strict=True):
        paths.append([*paths[parent], token])
    return paths


def _ids(ids: object, device: torch.device) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=device)  # type: ignore[call-overload]  # any iterable of ints
