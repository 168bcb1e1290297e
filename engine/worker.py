"""What a rank does in a step: draft, forward, target law, verify, commit. It decides nothing about time or arrival.

Of several ranks (engine/parallel.py) all hold a part of the model and all sequences, and rank 0 alone drafts and judges: it tells
the others its forest and its verdict (engine/broadcast.py), which they follow (engine/follower.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch

from engine import cost_store, deterministic, device_rules, registry
from engine.block_table import BlockTable
from engine.broadcast import CHECK_STEPS, Again, Drop, Ruling, Step, Trees, digest, tell
from engine.config import EngineConfig
from engine.corruption import NOT_FINITE, NOTHING_ALLOWED, is_usable, row_sums, unsound
from engine.draft_runner import DraftRunner, make_runner
from engine.drafting import Drafting
from engine.logprobs import token_logprobs
from engine.memory import MemoryPlan, out_of_memory, plan_memory
from engine.messages import EngineInfo
from engine.models.batch import ForwardBatch
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.factory import held, load_model
from engine.models.loader import load_config
from engine.models.runner import Model, PagedModel, WarmsUp
from engine.models.sharding import Sharding
from engine.parallel import ALONE, Group
from engine.peaks import top
from engine.plan import Row, RowResult, StepPlan, StepResult, StepTimes
from engine.protocols import CatchesUp, Choice, Load, Observed, Policy
from engine.row_result import row_result
from engine.sequence import Sequence
from engine.study import Study
from engine.successors import Successors
from engine.target_law import TargetLaw
from engine.tree import DraftForest, Verdict
from engine.verification import Verification
from engine.workspace import graph_bytes, record_graphs, run_largest

logger = logging.getLogger("outrider.engine")

PROMPT_LOGPROB_ROWS = 128  # prompt rows whose logits are held at once: 128 * 150k * 4 B = 77 MB


class Worker:
    """One rank: its part of the model and of the KV cache, the drafter and the verifier, and a mirror of every running sequence.

    Raises ValueError or OSError with a message fit for the command line when the model cannot be loaded.
    """

    def __init__(self, config: EngineConfig, group: Group = ALONE, device: torch.device | None = None) -> None:
        """`group` has been joined; `device` is this rank's own (`device_of`)."""
        started = time.perf_counter()
        self.config, self.group = config, group
        self.device = device_of(config) if device is None else device
        if config.num_threads is not None:
            torch.set_num_threads(max(1, config.num_threads // group.size))
        torch.set_grad_enabled(False)
        self.model_config = self._load_config()
        # The shape of what lies on this rank.
        shape = Sharding.of(self.model_config, group.rank, group.size).config if group.size > 1 else self.model_config
        dtype = _dtype(config.dtype, self.model_config.dtype)
        eos_ids = frozenset(self.model_config.eos_token_ids)
        if config.deterministic:
            deterministic.check(config, shape, dtype, self.device)
        draft_model = self._draft_model(dtype)
        self.successors = self._successors(dtype)
        offers = registry.drafter_offers(config, self.model_config.vocab_size, eos_ids, draft_model, self.successors)
        drafters = [registry.make_drafter(name, offers) for name in config.drafters]
        self.verification = Verification(config, drafters)
        with out_of_memory(self.device, "the weights"):
            model = self._load_model(dtype)
        fixed_split = deterministic.fix_order(config, shape, model) if config.deterministic else 0
        depth_seconds: dict[str, float] = {}
        if draft_model is not None:
            with out_of_memory(self.device, "the draft model's weights"):
                draft_model.load()
        weight_bytes = model.weight_bytes + (draft_model.weight_bytes if draft_model else 0)
        draft_bytes = draft_model.bytes_per_block if draft_model else 0
        largest = partial(run_largest, config, model, shape, dtype, self.device, fixed_split)
        models = [(model, shape, fixed_split)] + ([(draft_model.model, draft_model.shape, 0)] if draft_model else [])
        graphs = partial(graph_bytes, config, models, dtype, self.device, drafters)
        self.memory = self._agreed(plan_memory(config, shape, weight_bytes, dtype, self.device, draft_bytes, largest, graphs))
        if self.device.type == "cuda":
            logger.info("memory: %s", self.memory)
        blocks, backend = self.memory.num_blocks, config.attention_backend
        with out_of_memory(self.device, "the KV cache"):
            self.runner = make_runner(model, shape, blocks, config.block_size, dtype, self.device, backend, fixed_split)
        self.kv = self.runner.kv
        if draft_model is not None:
            draft_model.open(self.memory.num_blocks)
            record_graphs(config, draft_model.shape, draft_model.runner, self.memory, ())
            depth_seconds = {d.name: draft_model.time_depth() for d in drafters if isinstance(d, CatchesUp)}
        self._study = Study(self.runner, shape, self.successors, group) if self.successors is not None else None
        self.eos_ids = eos_ids
        self.target_law = TargetLaw(shape.vocab_size, self.eos_ids, self.device)
        if device_rules.has_kernels(self.device):
            self._warm_up([model for model, _, _ in models])
        with out_of_memory(self.device, "the captured graphs (--enforce-eager does without)"):
            record_graphs(config, shape, self.runner, self.memory, drafters)
        self.policy: Policy = registry.make_policy("fixed")
        self.drafting = Drafting(drafters, shape.vocab_size)
        self.seqs: dict[int, Sequence] = {}
        self._undrafted: set[int] = set()  # a draft of theirs made NaN, and another one might in every step
        self.info = EngineInfo(
            model=config.model,
            architecture=shape.architecture,
            vocab_size=shape.vocab_size,
            max_model_len=self.memory.max_model_len,
            dtype=str(dtype).removeprefix("torch."),
            device=str(self.device),
            backend=self.runner.backend,
            drafters=[d.name for d in drafters],
            verifier=self.verification.default.name,
            verifiers=self.verification.names,
            lossless=self.verification.default.lossless,
            policy=config.policy,
            budget=config.budget,
            weight_bytes=group.total(self.memory.weight_bytes),
            kv_bytes=group.total(self.memory.kv_bytes),
            num_blocks=self.memory.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            load_seconds=time.perf_counter() - started,
            depth_seconds=depth_seconds,
            eos_ids=sorted(self.eos_ids),
            max_budget=config.max_budget if config.policy == "goodput" else config.budget,
            prediction_drafters=[d.name for d in drafters if getattr(d, "reports_prediction", False)],
            quantization=held(self.model_config, model),
        )

    def _warm_up(self, models: Seq[Model | PagedModel]) -> None:
        """Compile what any step may need: none has to wait for a compiler."""
        nodes = 1 + max(self.config.budget, self.config.max_budget)
        device_rules.warm_up(self.model_config.vocab_size, self.device, nodes)
        for model in models:
            if isinstance(model, Decoder):
                model.warm_up()
        if isinstance(self.runner.attention, WarmsUp):
            self.runner.attention.warm_up(self.kv.layers[0])
        self.kv.warm_up(min(nodes * self.config.max_num_seqs, self.config.max_num_batched_tokens))

    def _load_config(self) -> ModelConfig:
        return load_config(self.config.model)

    def _load_model(self, dtype: torch.dtype) -> Model | PagedModel:
        return load_model(self.config, self.model_config, dtype, self.device, self.group)

    def _agreed(self, plan: MemoryPlan) -> MemoryPlan:
        """Block ids mean the same on every rank: none has more blocks than the one with the least room."""
        if self.group.size == 1:
            return plan
        blocks, longest = self.group.least(plan.num_blocks), self.group.least(plan.max_model_len)
        kv_bytes = plan.kv_bytes // plan.num_blocks * blocks
        return replace(plan, num_blocks=blocks, kv_bytes=kv_bytes, max_model_len=longest)

    def _draft_model(self, dtype: torch.dtype) -> DraftRunner | None:
        """The second model, not loaded yet. Raises ValueError when it is given and nobody asks for one."""
        config = self.config
        if config.draft_model is None:
            return None
        if not registry.wants_draft_model(config.drafters):
            raise ValueError(f"draft_model: {config.draft_model} is given, but none of the drafters uses it: add draft_model")
        return DraftRunner(config, self.model_config, dtype, self.device)

    def _successors(self, dtype: torch.dtype) -> Successors | None:
        """The target's bigrams, as far as they are known, where a drafter begins with them."""
        config = self.config
        if not registry.wants_successors(config.drafters):
            return None
        file = cost_store.successors_path(config, str(dtype)) if config.profile else None
        return Successors(self.model_config.vocab_size, file)

    @torch.inference_mode()
    def study(self) -> bool:
        """Some milliseconds of reading the target's bigrams; False when nothing is left to read. Only while nobody is served."""
        return self._study is not None and self._study.step()

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Run one plan. A row that goes wrong on its own (NaN) comes back with `error`; the others go on."""
        clock = [time.perf_counter()]
        seqs = self.apply(plan)
        judged, trees = judged_rows(plan, seqs)
        tree_seqs = [seqs[i] for i in judged]
        load = self._load(plan, seqs, tree_seqs)
        budgets = [0 if row.seq_id in self._undrafted else row.budget for row in (plan.rows[i] for i in judged)]
        forest = self.drafting.draft(tree_seqs, budgets, self.policy, load)
        draft_seconds = self.drafting.take_seconds()
        load = replace(load, draft_seconds=sum(draft_seconds.values()))
        choice = self.policy.trim(forest, tree_seqs, load)
        for tree, seq in enumerate(tree_seqs):
            if choice.reasons[tree] == "no_match" and seq.seq_id in self.drafting.stale:
                choice.reasons[tree] = "stale"
        forest = choice.forest
        self._tell_step(plan, forest)
        clock.append(time.perf_counter())

        while True:
            batch, hidden, layers, logits = self.feed(plan, seqs, forest, trees)
            sums = row_sums(hidden, batch)  # read when the verdict has waited for the device anyway
            clock[2:] = [time.perf_counter()]

            scores = self.target_law(logits, tree_seqs, forest)
            clock.append(time.perf_counter())
            signals = self._signals(logits, layers, scores, batch.num_tokens)  # first: the verdict finds its best tokens in these
            verdict = self.verification.verify(forest, scores, tree_seqs)
            corrupted = unsound(sums, batch)
            doubtful = [trees[i] for i in corrupted if trees[i] >= 0 and forest.size(trees[i]) > 1]
            if not doubtful:
                break
            # A zero weight times a draft's NaN is NaN: the draft may be all that is wrong, and may not show in the answer.
            tell(self.group, Again(doubtful))
            choice.dropped = [n + (forest.size(b) - 1 if b in doubtful else 0) for b, n in enumerate(choice.dropped)]
            self.drafting.fell_back("not_finite")
            self._undrafted |= {tree_seqs[b].seq_id for b in doubtful}
            forest = choice.forest = self.undraft(plan, seqs, judged, forest, doubtful)
        for i in corrupted:
            if trees[i] >= 0:
                verdict.void(trees[i])
        mute = [i for i, tokens in zip(judged, verdict.tokens, strict=True) if not tokens and i not in corrupted]
        invalid = [i for i in mute if is_usable(logits[int(forest.start[trees[i]])])]  # the model had something to say
        corrupted += [i for i in mute if i not in invalid]
        tell(self.group, Ruling(verdict.nodes, verdict.tokens, corrupted))
        clock.append(time.perf_counter())

        self.policy.learn(tree_seqs, forest, verdict)
        self.settle(plan, seqs, judged, forest, verdict, corrupted)
        self.drafting.observe(tree_seqs, forest, verdict, signals)
        self.drafting.read([seq for seq, tree in zip(seqs, trees, strict=True) if tree < 0])
        results = self._results(plan, seqs, trees, choice, verdict, logits)
        for i in corrupted:
            results[i].error = NOT_FINITE
        for i in invalid:
            results[i].error, results[i].invalid = NOTHING_ALLOWED, True
        self._prompt_logprobs(plan, seqs, batch, hidden, results)
        self.advance(seqs, plan.rows, [result.token_ids for result in results])
        clock.append(time.perf_counter())
        times = StepTimes(*(after - before for before, after in pairwise(clock)))
        return StepResult(
            results, times, batch.num_tokens, self.drafting.take_fallbacks(), draft_seconds, choice.tokens, choice.seconds
        )

    def guide(self, policy: Policy) -> None:
        """From now on this policy decides which drafts the target sees."""
        self.policy = policy

    def close(self) -> None:
        self.seqs.clear()
        if self.successors is not None:
            self.successors.save()

    def drop(self, seq_ids: list[int]) -> None:
        """Forget sequences that no plan will remove."""
        tell(self.group, Drop(seq_ids))
        self._undrafted.difference_update(seq_ids)
        for seq_id in seq_ids:
            self.seqs.pop(seq_id, None)

    def _tell_step(self, plan: StepPlan, forest: DraftForest) -> None:
        if self.group.size == 1:
            return
        checked = self.config.check_integrity or plan.step % CHECK_STEPS == 0
        tell(self.group, Step(plan, Trees.of(forest), digest(self.seqs.values()) if checked else None))

    def apply(self, plan: StepPlan) -> list[Sequence]:
        """Bring the mirror up to the plan; returns the plan's sequences in row order."""
        self._undrafted.difference_update(plan.removed)
        for seq_id in plan.removed:
            if self.seqs.pop(seq_id, None) is not None:
                self.drafting.forget(seq_id)
                self.policy.forget(seq_id)
        for seq_id in plan.preempted:
            if (seq := self.seqs.get(seq_id)) is not None:
                seq.block_ids, seq.num_computed = [], 0
        for new in plan.new:
            self.seqs[new.seq_id] = Sequence(new.seq_id, new.request, new.sample_index, self.eos_ids)
        seqs = [self.seqs[row.seq_id] for row in plan.rows]
        for seq, row in zip(seqs, plan.rows, strict=True):
            if row.reset:
                seq.block_ids = BlockTable(row.block_ids)
            else:
                seq.block_ids.extend(row.block_ids)
            seq.num_computed = row.num_computed
        return seqs

    def feed(
        self, plan: StepPlan, seqs: list[Sequence], forest: DraftForest, trees: list[int]
    ) -> tuple[ForwardBatch, torch.Tensor, dict[int, torch.Tensor], torch.Tensor]:
        """The target's forward: the batch, its last hidden states, those of the layers asked for, every node's logits."""
        block_size, scratch = self.config.block_size, self.runner.scratch_slot
        batch = ForwardBatch.build(seqs, plan.rows, forest, trees, block_size, self.device, scratch)
        hidden, layers = self.runner.forward(batch, self.drafting.needs.hidden_layers)
        return batch, hidden, layers, self.runner.node_logits(hidden, batch)

    def undraft(
        self, plan: StepPlan, seqs: list[Sequence], judged: list[int], forest: DraftForest, doubtful: list[int]
    ) -> DraftForest:
        """The forest with these trees cut down to their roots, to be fed once more: all that their rows stored is zeroed."""
        slots = []
        for tree in doubtful:
            seq, row = seqs[judged[tree]], plan.rows[judged[tree]]
            last = row.num_computed + row.num_new + forest.size(tree) - 1
            slots += [self.kv.slot(seq, position) for position in range(row.num_computed, last)]
        self.kv.clear_slots(slots)
        return forest.without_drafts(doubtful)

    def settle(
        self,
        plan: StepPlan,
        seqs: list[Sequence],
        judged: list[int],
        forest: DraftForest,
        verdict: Verdict,
        corrupted: list[int],
    ) -> None:
        """Make the cache what the verdict says. What corrupted sequences (indices of rows) wrote is zeroed.

        Nothing that is not finite outlives a step, so that whatever a block holds can be masked by a zero weight.
        """
        roots = [plan.rows[i].num_computed + plan.rows[i].num_new - 1 for i in judged]
        self.kv.commit([seqs[i] for i in judged], roots, forest, verdict)
        for i in corrupted:
            self._clear(seqs[i])

    def _load(self, plan: StepPlan, seqs: list[Sequence], judged: list[Sequence]) -> Load:
        return Load(
            prefill_tokens=sum(row.num_new for row in plan.rows) - len(judged),
            free_blocks=0,  # the budgets have them already
            block_size=self.config.block_size,
            context_tokens=sum(row.num_computed for row in plan.rows),
            sequences=len(seqs),
            trims=self.verification.anticipates(judged),
        )

    def _signals(self, logits: torch.Tensor, layers: dict[int, torch.Tensor], scores: torch.Tensor, num_rows: int) -> Observed:
        needs = self.drafting.needs
        observed = Observed(hidden={layer: rows[:num_rows] for layer, rows in layers.items()})
        if needs.top_k:
            observed.top_ids, observed.top_logits = top(logits, needs.top_k)
        if needs.probabilities:
            observed.probabilities = torch.softmax(scores.float(), -1)
        return observed

    def _results(
        self, plan: StepPlan, seqs: list[Sequence], trees: list[int], choice: Choice, verdict: Verdict, logits: torch.Tensor
    ) -> list[RowResult]:
        results = []
        forest = choice.forest
        for seq, row, tree in zip(seqs, plan.rows, trees, strict=True):
            if tree < 0:
                results.append(RowResult(row.seq_id, []))
                continue
            tokens = verdict.tokens[tree]
            result = row_result(row.seq_id, choice, verdict, tree)
            if tokens and seq.params.logprobs is not None:
                first = int(forest.start[tree])
                rows = logits[[first, *(first + node for node in verdict.nodes[tree])]]
                result.logprobs = token_logprobs(rows, tokens, seq.params.logprobs)
            results.append(result)
        return results

    def _clear(self, seq: Sequence) -> None:
        """Zero what a corrupted sequence wrote; blocks it shares were computed by somebody healthy and are still read."""
        shared = {block for other in self.seqs.values() if other is not seq for block in other.block_ids}
        self.kv.clear([block for block in seq.block_ids if block not in shared])

    def prompt_rows(
        self, plan: StepPlan, seqs: list[Sequence], batch: ForwardBatch
    ) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        """The fed prompt rows whose logits are asked for, some at a time; not those of a prompt that is computed again.

        Index of the sequence, their positions begin ... end - 1, and which rows of the batch they are.
        """
        for i, (seq, row, first) in enumerate(zip(seqs, plan.rows, batch.first_rows, strict=True)):
            last = min(row.num_computed + row.num_new, seq.num_prompt - 1)  # the row of the last prompt token predicts output
            if seq.params.prompt_logprobs is None or seq.num_output:  # they went out with its first tokens
                continue
            for begin in range(row.num_computed, last, PROMPT_LOGPROB_ROWS):
                end = min(begin + PROMPT_LOGPROB_ROWS, last)
                start = first - row.num_computed
                yield i, begin, end, torch.arange(start + begin, start + end, device=self.device)

    def _prompt_logprobs(
        self, plan: StepPlan, seqs: list[Sequence], batch: ForwardBatch, hidden: torch.Tensor, results: list[RowResult]
    ) -> None:
        """Logprobs of the prompt tokens that follow the fed prompt rows, for the requests that ask for them."""
        for i, begin, end, rows in self.prompt_rows(plan, seqs, batch):
            found = token_logprobs(
                self.runner.logits(hidden, rows), seqs[i].tokens[begin + 1 : end + 1], seqs[i].params.prompt_logprobs or 0
            )
            results[i].prompt_logprobs = [*(results[i].prompt_logprobs or []), *found]

    def advance(self, seqs: list[Sequence], rows: list[Row], token_ids: Seq[list[int]]) -> None:
        """Bring the mirror to where the scheduler will be; token_ids [rows], empty for a row that was not judged."""
        for seq, row, tokens in zip(seqs, rows, token_ids, strict=True):
            seq.num_computed = row.num_computed + row.num_new + max(len(tokens) - 1, 0)
            seq.commit(tokens)


def judged_rows(plan: StepPlan, seqs: list[Sequence]) -> tuple[list[int], list[int]]:
    """The rows that reach their sequence's last token, and for every row the index of its tree, -1 where there is none."""
    judged = [i for i, (seq, row) in enumerate(zip(seqs, plan.rows, strict=True)) if row.num_new == seq.num_uncomputed]
    trees = [-1] * len(seqs)
    for tree, i in enumerate(judged):
        trees[i] = tree
    return judged, trees


def device_of(config: EngineConfig, local_rank: int = 0) -> torch.device:
    """Where a rank runs; local_rank: which one of its machine. Raises ValueError for a GPU that is not there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if config.tensor_parallel_size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"device: {name} is one GPU, and tensor_parallel_size is {config.tensor_parallel_size}: say cuda")
        name = f"cuda:{local_rank}"
    if name.startswith("cuda") and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: there is no {name} on this machine ({torch.cuda.device_count()} GPUs)")
    return torch.device(name)


def _dtype(wanted: str, stored: str) -> torch.dtype:
    """`auto` keeps the checkpoint's own 16-bit type, and makes bfloat16 of everything else."""
    name = wanted if wanted != "auto" else (stored if stored in ("bfloat16", "float16") else "bfloat16")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
