"""Policy `goodput`: guess exactly as far ahead as it raises the committed tokens per second, measured on this machine.

Before drafting it bounds how many nodes a sequence may draft: about twice what was of use to it lately. A drafter whose
asking costs next to nothing is asked; one that costs (a model) is asked only as deep, and for whom, as its record and its
price say that it pays (engine/policies/allocation.py). After drafting the nodes of all sequences compete: the likeliest Q
are kept, for the Q that has the most expected tokens per predicted second. No node at all is one of the choices.

Off is never for ever: what was drafted and not shown is judged by the tokens that were committed, offsets of sequences fade,
and drafters that did not pay are asked again after a rest that doubles.
Prompt chunks in the step count as load: they may leave no room, but they make no guess cheaper. With
`max_itl_ms` no draft makes a step longer than that.

Sources: SmartSpec (arXiv 2406.14066), DSpark (arXiv 2607.05147) for the split into a budget before and a ranking after
drafting, TETRIS (arXiv 2502.15197) for ranking drafted nodes over the batch; core.md A. It is exact because it only
drops nodes where the verifier allows that (`Load.trims`; core.md 0.4, R1 and R3).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import compress, pairwise

import numpy as np
from numpy.typing import NDArray

from engine.plan import StepPlan, StepResult
from engine.policies.allocation import Selection, allocate, decoding_rate, select
from engine.policies.survival import Survival, path_survival
from engine.protocols import Choice, CostModel, Drafter, Load, Policy, Reason
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

Double = NDArray[np.float64]

FIRST_BUDGET, LEAST_BUDGET = 16, 4  # nodes
TO_START = 1.02  # goodput over plain decoding's that starts speculation; going on takes none (hysteresis)
TO_START_DRAFTER = 1.05  # the same for a drafter that costs
LONGEST_CHAIN = 16  # of a drafter that costs
NEGLIGIBLE_SHARE = 0.005  # of a step: what a drafter may take although it never finds anything
WORTH_RATE, LONGEST_REST = 0.05, 4
CURVE_STEPS, CURVE_CONTEXT = 32, 64  # steps and tokens of context for which a cost that was looked up holds
CURVE_NODES = 16  # more than asked for that are looked up with them
ERROR_RATE = 0.02
UNSEEN, MOST_APART = 4, 4  # steps
CUT_SECONDS = 4e-5  # what dropping nodes takes by itself: it must win as much
# Learning takes time as well: every so manyth step teaches the cost model (0.1 ms), what a drafter takes that costs next to
# nothing, and whether asking it pays.
OBSERVED, TIMED, APPRAISED = 8, 64, 4


@dataclass(slots=True)
class _Record:
    """What the policy remembers about a sequence, beside its survival."""

    budget: int = FIRST_BUDGET  # nodes it may draft
    asked: int = 0  # and those it was given in this step
    unseen: int = 0  # steps since a draft of it was shown


@dataclass(slots=True)
class _Worth:
    """Whether asking a drafter pays: seconds won by the nodes that were kept against seconds spent, moving averages."""

    costly: bool  # every depth costs a forward: whether asking pays is decided before (CatchesUp)
    won: float = 0.0
    spent: float = 0.0
    rest: int = 1  # steps of the next rest
    left: int = 0  # steps of this one
    took: float | None = None  # spent in this step; None: not asked
    asked: int = 0
    on: bool = False  # a costly one was asked because it pays

    def settle(self, won: float, negligible: float) -> None:
        """A step in which it was asked is over; a drafter that takes less than `negligible` seconds never rests."""
        took, self.took = self.took or 0.0, None
        if took <= negligible:
            self.won, self.spent, self.rest = 0.0, 0.0, 1
            return
        self.won += WORTH_RATE * (max(won, 0.0) - self.won)
        self.spent += WORTH_RATE * (took - self.spent)
        if won >= took:
            self.rest, self.won = 1, max(self.won, self.spent)
        elif self.won < self.spent and not self.costly:
            self.left, self.rest = self.rest, min(2 * self.rest, LONGEST_REST)


class GoodputPolicy(Policy):
    """Expected tokens / predicted seconds, at its best."""

    name = "goodput"

    def __init__(
        self, cost: CostModel, max_budget: int = 32, max_itl_ms: float | None = None, drafters: Seq[str] = (), **_: object
    ) -> None:
        """`max_budget`: most draft nodes of a sequence in a step. Raises ValueError for limits that make no sense."""
        if max_budget < 0:
            raise ValueError(f"max_budget: must not be negative, got {max_budget}")
        if max_itl_ms is not None and not max_itl_ms > 0:
            raise ValueError(f"max_itl_ms: must be above 0, got {max_itl_ms}")
        self.cost, self.max_budget = cost, max_budget
        self.limit = np.inf if max_itl_ms is None else max_itl_ms / 1000
        self.survival = Survival(drafters)
        self.cost_error = 0.0
        self._records: dict[int, _Record] = {}
        self._worth: dict[str, _Worth] = {}
        self._probed: set[int] = set()  # sequences for which a drafter that costs was asked to learn
        self._plain = 1.0  # seconds of the last step without its drafts
        self._second = 0.0  # seconds that one token was worth in it
        self._speculating = False
        self._cut: DraftForest | None = None  # what was drafted in this step, where not all of it was shown
        self._steps = 0
        self._curves: dict[tuple[int, int, int], list[float]] = {}  # of this step and the few before

    @property
    def calibration_error(self) -> float:  # type: ignore[override]  # read-only here
        return self.survival.calibration_error

    def budgets(self, seqs: Seq[Sequence], load: Load) -> list[int]:
        budgets = []
        for seq in seqs:
            record = self._record(seq)
            # Whose drafts are never worth their place is asked in every second to fourth step only: asking takes time as well.
            rests = (self._steps + seq.seq_id) % min(1 + record.unseen // UNSEEN, MOST_APART)
            record.asked = 0 if rests else min(record.budget, self.max_budget)
            budgets.append(record.asked)
        return budgets

    def allot(self, drafter: Drafter, seqs: Seq[Sequence], budgets: Seq[int], gained: Seq[float | None], load: Load) -> list[int]:
        worth = self._worth.setdefault(drafter.name, _Worth(getattr(drafter, "costly", False)))
        if worth.costly:
            return self._allot_costly(drafter.name, worth, seqs, budgets, gained, load)
        if worth.left:
            worth.left -= 1
            return [0] * len(seqs)
        return list(budgets)

    def depth_price(self, drafter: str, sequences: int) -> float:
        seconds = self.cost.draft_seconds(drafter, sequences, 3) - self.cost.draft_seconds(drafter, sequences, 1)
        return max(seconds / 2, 0.0) / self._plain

    def estimate(self, drafter: str, seqs: Seq[Sequence], forest: DraftForest) -> Double:
        return self.survival.estimate(drafter, [seq.seq_id for seq in seqs], forest)

    def drafted(self, drafter: str, sequences: int, depth: int, seconds: float) -> None:
        worth = self._worth[drafter]
        worth.took, worth.asked = seconds, worth.asked + 1
        if worth.costly or worth.asked % TIMED == 1:  # nobody looks up what a cheap one costs
            self.cost.observe_draft(drafter, sequences, depth, seconds)

    def trim(self, forest: DraftForest, seqs: Seq[Sequence], load: Load) -> Choice:
        roots, drafts = forest.num_trees, forest.num_drafts
        if not roots:
            return Choice(forest, [], [])
        self._steps += 1
        curve = self._curve(roots + load.prefill_tokens, drafts, load.context_tokens, load.sequences)
        plain = decode = curve[0]
        if load.prefill_tokens:
            decode = self._curve(roots, 0, load.context_tokens, roots)[0]
        self._plain, self._second = plain, decode / roots
        verify = [seconds + load.draft_seconds for seconds in curve]
        if drafts:
            choice = self._select(forest, seqs, load, verify)
        else:
            choice = Choice(forest, [0] * roots, [self._nothing(seq) for seq in seqs], float(roots), verify[0])
        choice.plain_seconds, choice.decode_seconds = plain, decode
        self._appraise(choice)
        self._cut = forest if choice.forest is not forest else None
        return choice

    def learn(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict) -> None:
        cut, self._cut = self._cut, None
        self.survival.learn([seq.seq_id for seq in seqs], cut or forest, verdict, cut is not None)

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        prompt = sum(row.num_new for row in plan.rows) - sum(bool(row.token_ids) for row in result.rows)
        context = sum(row.num_computed for row in plan.rows)
        # A prompt token has no logits and costs less than a node: steps full of them would make nodes look cheap.
        if plan.rows and prompt * 4 <= result.num_forward_tokens and (plan.step % OBSERVED == 0 or not self.cost.measured):
            spent = seconds - sum(result.draft_seconds.values())
            self.cost.observe(result.num_forward_tokens, context, len(plan.rows), spent)
        if result.predicted_seconds and seconds > 0:
            error = min(abs(result.predicted_seconds / seconds - 1), 1.0)
            self.cost_error += ERROR_RATE * (error - self.cost_error)

    def forget(self, seq_id: int) -> None:
        self._records.pop(seq_id, None)
        self.survival.forget(seq_id)

    def _record(self, seq: Sequence) -> _Record:
        record = self._records.get(seq.seq_id)
        if record is None:
            record = self._records[seq.seq_id] = _Record()
        return record

    # ---- before drafting: a drafter that costs

    def _allot_costly(
        self, drafter: str, worth: _Worth, seqs: Seq[Sequence], budgets: Seq[int], gained: Seq[float | None], load: Load
    ) -> list[int]:
        """The chain lengths with the best goodput, drafting included; all zero where it does not pay."""
        longest = min(max(budgets), LONGEST_CHAIN)
        chain = self.survival.chain(drafter, [seq.seq_id for seq in seqs], longest)
        # What another drafter has found already is not won again.
        asked = [b for b, budget in enumerate(budgets) if budget and chain[b, :budget].sum() > (gained[b] or 0.0)]
        if not asked:
            return [0] * len(seqs)
        others = len(seqs) - len(asked) + sum(gained[b] or 0.0 for b in set(range(len(seqs))).difference(asked))
        first = len(seqs) + load.prefill_tokens
        verify = self.cost.verify_seconds(np.arange(first, first + len(asked) * longest + 1), load.context_tokens, load.sequences)
        draft = np.array([0.0] + [self.cost.draft_seconds(drafter, len(asked), depth) for depth in range(1, longest + 1)])
        caps = np.array([budgets[b] for b in asked])
        # With prompt chunks in the step time is worth what the last steps made of it (engine/policies/allocation.py).
        rate = 1 / self._second if load.prefill_tokens and self._second else None
        best = allocate(chain[asked], verify, draft, caps, self.limit - load.draft_seconds, others, rate)
        given = [0] * len(seqs)
        if best.depth and best.speedup >= (1.0 if worth.on else TO_START_DRAFTER):
            worth.on = True
            for b, nodes in zip(asked, best.nodes.tolist(), strict=True):
                # Where nodes may still be dropped, everyone drafts as deep as the deepest: it is the depth that costs.
                given[b] = min(budgets[b], best.depth) if nodes and load.trims else nodes
            return given
        worth.on = False
        return self._probe_costly(worth, seqs, asked, given)

    def _probe_costly(self, worth: _Worth, seqs: Seq[Sequence], asked: list[int], given: list[int]) -> list[int]:
        """One node each, for a few, after a rest that doubles while it does not help."""
        if worth.left:
            worth.left -= 1
            return given
        worth.left, worth.rest = 16 * worth.rest, min(2 * worth.rest, 16)
        for b in asked[:4]:
            given[b] = 1
            self._probed.add(seqs[b].seq_id)
        return given

    # ---- after drafting

    def _curve(self, rows: int, drafts: int, context_tokens: int, sequences: int) -> list[float]:
        """Seconds of a step of `rows` and 0, 1, ... `drafts` nodes more; looked up again every few steps."""
        if self._steps % CURVE_STEPS == 0:
            self._curves.clear()
        key = rows, context_tokens // (CURVE_CONTEXT * max(sequences, 1)), sequences
        curve = self._curves.get(key)
        if curve is None or len(curve) <= drafts:
            tokens = np.arange(rows, rows + drafts + CURVE_NODES)
            curve = self._curves[key] = self.cost.verify_seconds(tokens, context_tokens, sequences).tolist()
        return curve[: drafts + 1]

    def _select(self, forest: DraftForest, seqs: Seq[Sequence], load: Load, verify: list[float]) -> Choice:
        """Which nodes are shown. Lists, as most steps have a few nodes and a numpy call costs more than any of them."""
        if forest.estimate is None:
            forest.estimate = np.where(forest.parent < 0, 1.0, 0.5)
        survival = path_survival(forest, forest.estimate)
        trees = list(pairwise(forest.start.tolist()))
        nodes = [node for first, last in trees for node in range(first + 1, last)]
        drafts = [survival[node] for node in nodes]
        margin = 1.0 if self._speculating else TO_START
        rate = None
        if load.prefill_tokens:
            alone = self._curve(forest.num_trees, len(nodes), load.context_tokens, forest.num_trees)
            rate = decoding_rate(np.array(drafts), np.array(alone), forest.num_trees)
        chosen = select(drafts, verify, forest.num_trees, self.limit, margin, rate)
        self._speculating = chosen.count > 0
        kept = [True] * len(survival)
        for node, keep in zip(nodes, chosen.kept, strict=True):
            kept[node] = keep
        offered = [last - first - 1 for first, last in trees]
        shown = [sum(kept[first + 1 : last]) for first, last in trees]
        cut = forest
        if chosen.count and chosen.loss * verify[len(nodes)] <= CUT_SECONDS:
            # Who used what is told by the best choice all the same, or budgets would grow with what costs nothing here.
            self._remember(seqs, offered, shown)
            kept, shown = [True] * len(survival), offered
        elif chosen.count < len(nodes):
            if not load.trims and forest.law_row is not None:
                for tree, (first, last) in enumerate(trees):
                    if forest.is_sampled(tree):
                        kept[first:last] = [True] * (last - first)
                        shown[tree] = offered[tree]
            self._remember(seqs, offered, shown)
            cut = forest.keep(np.array(kept)) if shown != offered else forest
        else:
            self._remember(seqs, offered, shown)
        dropped = [had - used for had, used in zip(offered, shown, strict=True)]
        reasons = self._reasons(seqs, offered, dropped, chosen)
        self._probed.clear()
        return Choice(cut, dropped, reasons, sum(compress(survival, kept)), verify[sum(shown)])

    def _reasons(self, seqs: Seq[Sequence], offered: list[int], dropped: list[int], chosen: Selection) -> list[Reason]:
        cut: Reason = "itl" if chosen.limited else "cost"
        reasons: list[Reason] = []
        for b, (had, lost) in enumerate(zip(offered, dropped, strict=True)):
            if not had:
                reasons.append(self._nothing(seqs[b]))
            else:
                reasons.append("probe" if seqs[b].seq_id in self._probed else cut if lost else "goodput")
        return reasons

    def _nothing(self, seq: Sequence) -> Reason:
        """Why a sequence has no draft at all."""
        rests = any(worth.left for worth in self._worth.values())
        return "cost" if rests or not self._record(seq).asked else "no_match"

    def _remember(self, seqs: Seq[Sequence], offered: list[int], shown: list[int]) -> None:
        """The next budgets: twice as much for those who used theirs up, slowly less for those who did not."""
        for seq, had, used in zip(seqs, offered, shown, strict=True):
            if not had:
                continue
            record = self._record(seq)
            record.unseen = 0 if used else record.unseen + 1
            if used == had >= record.budget:
                record.budget = min(2 * record.budget, self.max_budget)
            elif used < had:
                record.budget = max(LEAST_BUDGET, 2 * used, record.budget - 1)

    def _appraise(self, choice: Choice) -> None:
        """Did asking pay? Each drafter is credited with what its kept nodes are worth, less their share of the longer step."""
        asked = [worth for worth in self._worth.values() if worth.took is not None]
        if self._steps % APPRAISED:
            for worth in asked:
                worth.took = None
            return
        spent = sum(worth.took or 0.0 for worth in asked)
        negligible = NEGLIGIBLE_SHARE * choice.plain_seconds
        won: dict[str, float] = {}
        forest = choice.forest
        if spent > negligible and forest.num_drafts and forest.estimate is not None:
            price = (choice.seconds - choice.plain_seconds - spent) / forest.num_drafts
            second = choice.decode_seconds / forest.num_trees
            starts, owners = forest.start.tolist(), forest.node_drafter
            survival = path_survival(forest, forest.estimate)
            for tree, (first, last) in enumerate(pairwise(starts)):
                for node in range(first + 1, last):
                    name = forest.drafter[tree] if owners is None else owners[node]
                    won[name] = won.get(name, 0.0) + survival[node] * second - price
        for name, worth in self._worth.items():
            if worth.took is not None:
                worth.settle(won.get(name, 0.0), negligible)
