"""Who runs in the next step, and what became of the last one.

There is no prefill and no decode phase: every running sequence has tokens whose KV is not computed yet and catches up.
Sequences with one such token (the root of their draft tree) go first, so that nobody's stream stands still while a long
prompt is read; what the step's token budget has left goes to prompts in the order (priority, arrival), and to drafts.
A sequence gets the blocks of all its committed tokens when it is admitted, so that a prompt that was begun can be
finished; it grows block by block from there. When blocks run out, drafts go first, and then the running sequence that
is last in the order: its blocks are freed and its tokens computed again later (preemption by recompute).

Sources: Orca (OSDI 2022) for scheduling by iteration, Sarathi-Serve (arXiv 2403.02310) for chunked prefill beside decoding.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Collection

from engine.blocks import BlockPool, HashChain
from engine.entry import NO_REFUSAL, Entry, Group, Refusal
from engine.messages import TokenDelta
from engine.plan import NewSequence, Row, RowResult, StepPlan, StepResult
from engine.protocols import Load, Policy, Reason
from engine.request import Request
from engine.sequence import Sequence
from engine.sharing import share_out
from engine.stats import StatsRecorder
from engine.usage import add_verdict


def _order(entry: Entry) -> tuple[int, int, int]:
    return entry.key


def _limited(entry: Entry, budget: int) -> int:
    """The budget, cut to what the request wants and can use; `entry.limit` says by what."""
    speculation = entry.seq.request.speculation
    # The bonus token is one of the remaining ones. As prompt + max_tokens fit the model, so do all draft positions.
    limits: list[tuple[int, Reason]] = [(entry.remaining - 1, "max_tokens")]
    if speculation.max_nodes is not None:
        limits.append((speculation.max_nodes, "max_nodes"))
    if speculation.off:
        limits.append((0, "off"))
    entry.limit = ""
    for most, reason in limits:
        if most < budget or reason == "off":
            budget, entry.limit = max(most, 0), reason
    return budget


class Scheduler:
    """Plans steps and applies their results. Owns the sequences and the block tables; knows no tensors."""

    def __init__(
        self,
        pool: BlockPool,
        policy: Policy,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_ids: frozenset[int] = frozenset(),
        recorder: StatsRecorder | None = None,
        prediction_drafters: frozenset[str] = frozenset(),
    ) -> None:
        """`prediction_drafters`: whose tokens the usage reports as predicted.

        Raises ValueError for a limit that would let nothing run.
        """
        if min(max_num_seqs, max_num_batched_tokens, max_model_len) < 1:
            raise ValueError("max_num_seqs, max_num_batched_tokens and max_model_len must be at least 1")
        self.pool = pool
        self.policy = policy
        self.recorder = recorder or StatsRecorder()
        self.max_running = min(max_num_seqs, max_num_batched_tokens)  # a step has a token for each
        self.max_tokens_per_step = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_ids = eos_ids
        self.prediction_drafters = prediction_drafters
        self.running: list[Entry] = []  # both in the order (priority, arrival, sample index)
        self.waiting: list[Entry] = []
        self._groups: dict[str, Group] = {}
        self._by_seq: dict[int, Entry] = {}
        self._num_unborn = 0
        self._removed: list[int] = []
        self._preempted: list[int] = []
        self._refusals = [NO_REFUSAL, NO_REFUSAL]  # the last ones, as things are and if others had given way
        self._arrivals = 0
        self._next_seq_id = 0
        self._step = 0
        self._drafts_asked = 0  # what the policy wanted in the last step
        self._drafts_granted = 0
        self._draft_use = 1.0  # share of the granted nodes that drafters filled, moving average

    # ---- arrivals and departures

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError when it can never fit or its id is in use."""
        length = len(request.prompt_ids) + request.params.max_tokens
        room = min(self.max_model_len, self.pool.num_blocks * self.pool.block_size)
        if length > room:
            raise ValueError(
                f"max_tokens: {len(request.prompt_ids)} prompt tokens and {request.params.max_tokens} more are {length}, "
                f"but a sequence can have {room}"
            )
        if not request.prompt_ids or request.params.max_tokens < 1 or request.n < 1:
            raise ValueError("a request needs at least one prompt token, one token to generate and one sample")
        if request.request_id in self._groups:
            raise ValueError(f"request_id: {request.request_id!r} is already running")
        shared = (len(request.prompt_ids) - 1) // self.pool.block_size * self.pool.block_size
        # Prompt logprobs need every row of the prompt, so those siblings have nothing to wait for.
        shares = request.n > 1 and self.pool.enable_prefix_caching and request.params.prompt_logprobs is None
        chain = HashChain(request.cache_salt, self.pool.block_size)
        group = Group(request, self._arrivals, shared if shares else 0, chain)
        self._arrivals += 1
        self._groups[request.request_id] = group
        self._num_unborn += request.n
        self._queue_next_sibling(group)

    def abort(self, request_id: str) -> None:
        """Drop a request in whatever state it is; its blocks are free on return. Unknown ids are ignored."""
        group = self._groups.get(request_id)
        if group is None:
            return
        self._num_unborn -= group.num_unborn
        group.next_index = group.request.n
        for entry in tuple(group.live):
            self._remove(entry)

    def has_work(self) -> bool:
        return bool(self._groups)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, siblings that do not exist yet included."""
        return len(self.waiting) + self._num_unborn

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens of prompts and of preempted sequences that no step has computed; a prefix cache may know some of them."""
        catching_up = (entry.seq.num_uncomputed for entry in self.running if entry.seq.num_uncomputed > 1)
        return sum(entry.seq.num_tokens for entry in self.waiting) + sum(catching_up)

    def check_integrity(self) -> None:
        """Raises IntegrityError when block tables and pool disagree."""
        self.pool.check_integrity(entry.seq for entry in self.running)

    def _queue_next_sibling(self, group: Group) -> None:
        if not group.num_unborn or (group.hold and group.next_index):
            return
        seq = Sequence(self._next_seq_id, group.request, group.next_index, self.eos_ids)
        chain = group.chain.fork(seq.num_prompt // self.pool.block_size) if group.next_index else group.chain
        self._next_seq_id += 1
        self._num_unborn -= 1
        group.next_index += 1
        entry = Entry(seq, group, chain)
        group.live.append(entry)
        self._by_seq[seq.seq_id] = entry
        insort(self.waiting, entry, key=_order)

    def _release_siblings(self, group: Group) -> None:
        """The first sibling has computed what the others share (or never will): let them come."""
        if group.hold:
            group.hold = False
            self._queue_next_sibling(group)

    def _remove(self, entry: Entry) -> None:
        """A sequence has ended: give back all it holds."""
        group, seq = entry.group, entry.seq
        if entry.running:
            self.running.remove(entry)
            self.pool.free(seq.block_ids)
            entry.running = False
        else:
            self.waiting.remove(entry)
        if entry.known:
            self._removed.append(seq.seq_id)
        del self._by_seq[seq.seq_id]
        group.live.remove(entry)
        self._release_siblings(group)
        if not group.live and not group.num_unborn:
            del self._groups[group.request.request_id]

    # ---- the next step

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to do."""
        decoding = self._grow_decoding()
        self._make_way()  # after they have grown, or they would grow into the room that was made
        roots = [(entry, 1) for entry in decoding if entry.running]
        left = self.max_tokens_per_step - len(roots)
        limit = left - self._draft_reserve(left) if roots else left
        chunks = self._take_chunks(limit)
        scheduled = roots + chunks
        if not scheduled:
            return None
        num_prefill = sum(count for _, count in chunks)
        budgets = self._budgets(scheduled, left - num_prefill, num_prefill)
        new = [self._introduce(entry) for entry, _ in chunks if not entry.known]
        rows = [self._row(entry, count, budget) for (entry, count), budget in zip(scheduled, budgets, strict=True)]
        removed, self._removed = self._removed, []
        preempted, self._preempted = self._preempted, []
        self._step += 1
        return StepPlan(self._step, new, rows, removed, preempted)

    def _grow_decoding(self) -> list[Entry]:
        """The sequences whose only uncomputed token is their root, each with a block for it."""
        # In the order, so a victim is never one that has its row already.
        return [
            entry for entry in tuple(self.running) if entry.running and entry.seq.num_uncomputed == 1 and self._can_grow(entry)
        ]

    def _can_grow(self, entry: Entry) -> bool:
        """See that the sequence has blocks for its committed tokens; False when it had to give way itself."""
        seq, pool = entry.seq, self.pool
        need = pool.blocks_for(len(seq.tokens)) - len(seq.block_ids)
        if need <= 0:
            return True
        while need > pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is entry:
                return False
        seq.block_ids.extend(pool.allocate(need))
        return True

    def _draft_reserve(self, left: int) -> int:
        """Tokens kept for drafts when prompts would take them all: about what was used last, at most half."""
        # A tenth even when drafters had nothing for long: without room they could never show that they have again.
        return min(left // 2, int(self._drafts_asked * max(self._draft_use, 0.1)))

    def _take_chunks(self, limit: int) -> list[tuple[Entry, int]]:
        """Prompt chunks of `limit` tokens in all, first come first served; admits who waits while there is room."""
        chunks: list[tuple[Entry, int]] = []
        reading = deque(entry for entry in self.running if entry.seq.num_uncomputed > 1)
        while limit:
            entry = self._admit_first(reading[0] if reading else None)
            if entry is None:
                if not reading:
                    break
                entry = reading.popleft()
            chunks.append((entry, min(limit, entry.seq.num_uncomputed)))
            limit -= chunks[-1][1]
        return chunks

    def _admit_first(self, before: Entry | None) -> Entry | None:
        """Admit the first who waits if there is room and its turn is `before` that one's, which runs already."""
        if not self.waiting or (before is not None and before.key < self.waiting[0].key):
            return None
        entry = self.waiting[0]
        matched = self._find_room(entry)
        if matched is None:
            return None  # nobody overtakes the first in the order, so everyone's turn comes
        self._admit(entry, matched)
        return entry

    def _find_room(self, entry: Entry, without: Collection[Entry] = ()) -> list[int] | None:
        """The cached blocks this waiting sequence would start from, or None while there is no room for all its tokens.

        `without`: running sequences that would have given way by then.
        """
        running = len(self.running) - len(without)
        if running >= self.max_running or self._refused_still(entry, bool(without)):
            return None
        pool, seq = self.pool, entry.seq
        matched = pool.match(seq.tokens, entry.chain) if entry.prompt_logprobs is None else []
        usable = pool.num_usable(matched, [other.seq.block_ids for other in without])
        # One block stays back for each running sequence to grow into, or the newcomer would soon be thrown out again.
        missing = pool.blocks_for(seq.num_tokens) + running - usable
        if missing <= 0:
            return matched
        self._refusals[bool(without)] = Refusal(seq.seq_id, len(matched), pool.num_given_back - len(self.running) + missing)
        return None

    def _refused_still(self, entry: Entry, after_others: bool) -> bool:
        """Whether this sequence was refused and nothing that counts has changed, so that its prefix need not be looked up.

        Room comes from blocks that are given back, from sequences that end (each had one block kept back), and
        from a longer cached prefix. All else only takes room.
        """
        refusal, pool = self._refusals[after_others], self.pool
        return (
            refusal.seq_id == entry.seq.seq_id
            and pool.num_given_back - len(self.running) < refusal.until
            and not pool.knows_more(entry.seq.tokens, entry.chain, refusal.num_matched)
        )

    def _admit(self, entry: Entry, matched: list[int]) -> None:
        """Waiting -> running, with the blocks of all committed tokens."""
        seq, pool = entry.seq, self.pool
        pool.share(matched)
        seq.block_ids = matched + pool.allocate(pool.blocks_for(seq.num_tokens) - len(matched))
        seq.num_computed = len(matched) * pool.block_size
        entry.chain.num_published = len(matched)
        entry.running = True
        self.waiting.remove(entry)
        insort(self.running, entry, key=_order)
        if entry.known:  # it comes back after a preemption: no new lookup to count
            return
        entry.usage.first_scheduled_time = time.monotonic()
        entry.usage.cached_tokens = seq.num_computed
        if seq.sample_index == 0:
            self.recorder.totals.prompt_tokens += seq.num_prompt
        if pool.enable_prefix_caching and entry.prompt_logprobs is None:
            self.recorder.prefix_lookup(seq.num_prompt, seq.num_computed)
        self._queue_next_sibling(entry.group)

    def _make_way(self) -> None:
        """Preempt for the first who waits, but only those whose priority is worse, and only if that gives it room."""
        if not self.waiting or not self.running or self.running[-1].key[0] <= self.waiting[0].key[0]:
            return
        head = self.waiting[0]
        if sum(entry.seq.num_uncomputed for entry in self.running if entry.key < head.key) >= self.max_tokens_per_step:
            return  # those before it have the whole step
        worse = [entry for entry in self.running if entry.key[0] > head.key[0]]
        if self._find_room(head) is not None or self._find_room(head, worse) is None:
            return
        for victim in reversed(worse):
            self._preempt(victim)
            if self._find_room(head) is not None:
                return

    def _preempt(self, entry: Entry) -> None:
        """Running -> waiting in its old place; what was published of it may still be there when it comes back."""
        self.running.remove(entry)
        self.pool.free(entry.seq.block_ids)
        entry.seq.block_ids = []
        entry.seq.num_computed = 0
        entry.num_sent = 0
        entry.running = False
        self._preempted.append(entry.seq.seq_id)
        entry.usage.preemptions += 1
        self.recorder.totals.preemptions += 1
        if entry.prompt_logprobs is not None:
            entry.prompt_logprobs = [None]
        insort(self.waiting, entry, key=_order)

    def _budgets(self, scheduled: list[tuple[Entry, int]], left: int, num_prefill: int) -> list[int]:
        """Draft nodes of each row: what the policy wants, cut to what the row, the step and the pool have room for."""
        judged = [i for i, (entry, count) in enumerate(scheduled) if count == entry.seq.num_uncomputed]
        entries = [scheduled[i][0] for i in judged]
        asked = self.policy.budgets([entry.seq for entry in entries], self._load(scheduled, num_prefill))
        wants = [_limited(entry, budget) for entry, budget in zip(entries, asked, strict=True)]
        self._drafts_asked = sum(wants)
        budgets = [0] * len(scheduled)
        for i, entry, want, grant in zip(judged, entries, wants, share_out(wants, left, first=self._step), strict=True):
            if grant:
                budgets[i] = self._reserve_drafts(entry.seq, grant)
            if budgets[i] < want:
                entry.limit = "blocks"
        self._drafts_granted = sum(budgets)
        return budgets

    def _load(self, scheduled: list[tuple[Entry, int]], num_prefill: int) -> Load:
        context = sum(entry.seq.num_computed for entry, _ in scheduled)
        return Load(num_prefill, self.pool.num_free, self.pool.block_size, context, len(scheduled))

    def _reserve_drafts(self, seq: Sequence, wanted: int) -> int:
        """Blocks for up to `wanted` draft nodes behind the committed tokens; returns for how many there are."""
        pool = self.pool
        need = pool.blocks_for(seq.num_tokens + wanted) - len(seq.block_ids)
        if need > 0:
            # A guess never takes the block that another sequence's next token will need.
            seq.block_ids.extend(pool.allocate(max(0, min(need, pool.num_free - len(self.running)))))
        return min(wanted, len(seq.block_ids) * pool.block_size - seq.num_tokens)

    def _introduce(self, entry: Entry) -> NewSequence:
        entry.known = True
        return NewSequence(entry.seq.seq_id, entry.seq.request, entry.seq.sample_index)

    def _row(self, entry: Entry, num_new: int, budget: int) -> Row:
        seq, sent = entry.seq, entry.num_sent
        entry.num_sent = len(seq.block_ids)
        return Row(seq.seq_id, seq.num_computed, num_new, budget, seq.block_ids[sent:], sent == 0)

    # ---- the last step

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Apply what a step gained; returns what its clients are to be told.

        Raises RuntimeError when the result does not answer the plan.
        """
        if len(result.rows) != len(plan.rows):
            raise RuntimeError(f"step {plan.step}: {len(plan.rows)} rows planned, {len(result.rows)} answered")
        deltas = []
        for row, gained in zip(plan.rows, result.rows, strict=True):
            entry = self._by_seq.get(row.seq_id)
            if entry is not None:  # else aborted while the step ran
                delta = self._apply(entry, row, gained)
                if delta is not None:
                    deltas.append(delta)
        if self._drafts_granted:
            shown = sum(gained.num_draft for gained in result.rows)
            self._draft_use += 0.2 * (shown / self._drafts_granted - self._draft_use)
        return deltas

    def _apply(self, entry: Entry, row: Row, gained: RowResult) -> TokenDelta | None:
        seq, tokens = entry.seq, gained.token_ids
        if gained.error is not None and gained.seq_id == row.seq_id:
            return self._fail(entry, gained.error, gained.invalid)
        reached_root = row.num_new == seq.num_uncomputed
        if gained.seq_id != row.seq_id or bool(tokens) != reached_root or gained.num_accepted > row.budget:
            raise RuntimeError(f"sequence {seq.seq_id}: {gained} does not answer {row}")
        if entry.prompt_logprobs is not None and gained.prompt_logprobs:
            entry.prompt_logprobs.extend(gained.prompt_logprobs)
        seq.num_computed += row.num_new + gained.num_accepted
        delta = self._extend(entry, gained, row.budget) if tokens else None
        self.pool.publish(seq, entry.chain)
        if seq.num_computed >= entry.group.num_shared:
            self._release_siblings(entry.group)
        if seq.finished:
            self._remove(entry)
        return delta

    def _extend(self, entry: Entry, gained: RowResult, budget: int) -> TokenDelta:
        """Commit a verdict."""
        seq, usage, tokens = entry.seq, entry.usage, gained.token_ids
        kept = seq.commit(tokens)
        accepted = min(kept, gained.num_accepted)
        if entry.limit and not gained.num_dropped and gained.num_draft >= budget:
            gained.reason = entry.limit  # it used all it had
        self.recorder.verdict(gained, kept, accepted)
        add_verdict(usage, gained, accepted, self.prediction_drafters)
        delta = TokenDelta(
            request_id=seq.request.request_id,
            index=seq.sample_index,
            token_ids=tokens[:kept],
            logprobs=None if gained.logprobs is None else gained.logprobs[:kept],
            prompt_logprobs=entry.prompt_logprobs,
        )
        entry.prompt_logprobs = None
        if seq.finished:
            self.recorder.finished(seq)
            delta.finish_reason, delta.stop_token_id = seq.finish_reason, seq.stop_token_id
        if seq.finished or seq.request.report_usage:
            delta.usage = usage
        return delta

    def _fail(self, entry: Entry, error: str, invalid: bool) -> TokenDelta:
        """End one sequence with an error. Nobody shall start from what it computed, if it is not the request that is wrong."""
        seq = entry.seq
        if not invalid:
            self.recorder.totals.corrupted_requests += 1
            self.pool.unpublish(seq.block_ids)
        seq.finish_reason = "error"
        self._remove(entry)
        return TokenDelta(
            request_id=seq.request.request_id,
            index=seq.sample_index,
            finish_reason="error",
            error=error,
            invalid=invalid,
            usage=entry.usage,
        )
