"""OpenVINO GenAI's continuous batching on the peers' workloads, inside its own environment: `python -m bench.openvino_run DIR`.

Prints one JSON object as bench.generate does. Nothing lies between the clock and the pipeline: prompts are tokens already,
no text is made while the clock runs, no HTTP. That favours it by what a server costs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.arithmetic import Answer
from bench.load import Run
from bench.prompts import Prompt
from bench.summary import Numbers, summarise
from bench.workloads import Workload, named, warm_up

CACHE_GB = 2


@dataclass(slots=True, eq=False)
class Stream:
    """One request in flight."""

    handle: Any
    answer: Answer
    ids: list[int] = field(default_factory=list)

    def read(self) -> bool:
        """Take what is new; True when it was the last."""
        if not self.handle.can_read():
            return False
        now = time.monotonic()
        output = next(iter(self.handle.read().values()))
        if output.generated_ids:
            self.ids += output.generated_ids
            self.answer.times.append(now)
        if output.finish_reason.name == "NONE":
            return False
        self.answer.end, self.answer.tokens, self.answer.finish_reason = now, len(self.ids), output.finish_reason.name.lower()
        return True


class Pipeline:
    def __init__(self, model: Path, slots: int, lookup: int) -> None:
        genai = importlib.import_module("openvino_genai")  # only the environment that this runs in has it
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.enable_prefix_caching, scheduler.cache_size = slots, True, CACHE_GB
        self.lookup = lookup
        self.pipeline = genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", {"prompt_lookup": True} if lookup else {})
        self.tokenizer = self.pipeline.get_tokenizer()
        self._number = 0

    def encode(self, prompt: Prompt) -> Any:
        text = self.tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False).input_ids

    def config(self, workload: Workload) -> Any:
        config = self.pipeline.get_config()
        config.max_new_tokens, config.ignore_eos, config.do_sample = workload.max_tokens, workload.ignore_eos, False
        if self.lookup:
            config.num_assistant_tokens, config.max_ngram_size = self.lookup, 3
        return config

    def ask(self, prompts: Sequence[Prompt], workload: Workload) -> Run:
        """All prompts, at most `concurrency` of them at a time."""
        waiting = [(prompt, self.encode(prompt)) for prompt in reversed(prompts)]
        config = self.config(workload)
        done: list[Stream] = []
        active: list[Stream] = []
        begun = time.monotonic()
        while waiting or active:
            while waiting and len(active) < workload.concurrency:
                active.append(self._start(*waiting.pop(), config))
            self.pipeline.step()
            ended = [stream for stream in active if stream.read()]
            done += ended
            active = [stream for stream in active if stream not in ended]
        wall = time.monotonic() - begun
        for stream in done:
            stream.answer.text = self.tokenizer.decode(stream.ids)
        return Run([stream.answer for stream in done], wall, 0.0)

    def _start(self, prompt: Prompt, ids: Any, config: Any) -> Stream:
        self._number += 1
        answer = Answer(prompt.id, prompt.category, time.monotonic(), prompt_tokens=ids.shape[1])
        return Stream(self.pipeline.add_request(self._number, ids, config), answer)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.openvino_run", description=__doc__)
    parser.add_argument("model", type=Path, help="directory of openvino_model.xml")
    parser.add_argument("--workload", action="append", required=True, help="in this order, in one pipeline")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--lookup", type=int, default=0, help="tokens of prompt lookup; 0: none")
    parser.add_argument("--part", type=float, default=1.0, help="share of the requests")
    options = parser.parse_args()
    started = time.monotonic()
    pipeline = Pipeline(options.model, options.slots, options.lookup)
    loaded = time.monotonic() - started
    workloads = [named(name).shortened(options.part) for name in options.workload]
    first = warm_up(max(workload.concurrency for workload in workloads))
    pipeline.ask(first.prompts(), first)
    numbers: dict[str, Numbers] = {}
    texts: dict[str, str] = {}
    for workload in workloads:
        run = pipeline.ask(workload.prompts(), workload)
        numbers[workload.name] = summarise(run)
        if workload.concurrency == 1:
            texts |= {f"{workload.name}/{answer.prompt_id}": answer.text for answer in run.answers}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"start_seconds": loaded, "peak_mb": peak, "workloads": numbers, "texts": texts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
