"""transformers' `generate` on the peers' workloads, in a process of its own: `python -m bench.generate DIR`.

Prints one JSON object: the numbers of each workload as bench.summary names them. bf16, greedy, all cores. One stream is
asked as the servers are; "8 in a batch" pads eight mixed prompts on the left, as `generate` does for batches.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from bench.arithmetic import Answer
from bench.load import Run
from bench.prompts import Prompt
from bench.summary import Numbers, summarise
from bench.workloads import Workload, named, warm_up


class Stamps(BaseStreamer):
    """The arrival of every new token; the prompt, which comes first, is left out."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self.times.append(time.monotonic())
        self._prompt = False

    def end(self) -> None:
        pass


class Generator:
    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()

    def ask(self, prompts: list[Prompt], workload: Workload) -> list[Answer]:
        """All prompts in one batch, timed together."""
        inputs: Any = self.tokenizer.apply_chat_template(
            [prompt.messages for prompt in prompts],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        stamps = Stamps()
        least = workload.max_tokens if workload.ignore_eos else 0
        start = time.monotonic()
        with torch.inference_mode():
            output = self.model.generate(
                **inputs, max_new_tokens=workload.max_tokens, min_new_tokens=least, do_sample=False, streamer=stamps
            )
        length = inputs["input_ids"].shape[1]
        answers = []
        for prompt, mask, ids in zip(prompts, inputs["attention_mask"], output[:, length:], strict=True):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            answer = Answer(
                prompt.id, prompt.category, start, stamps.times[-1], stamps.times, len(ids), int(mask.sum()), text=text
            )
            answers.append(answer)
        return answers

    def measure(self, workload: Workload) -> Numbers:
        prompts = workload.prompts()
        groups = [prompts] if workload.concurrency > 1 else [[prompt] for prompt in prompts]
        started = time.monotonic()
        answers = [answer for group in groups for answer in self.ask(group, workload)]
        return summarise(Run(answers, time.monotonic() - started, 0.0))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.generate", description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("--workload", action="append", required=True, help="in this order")
    parser.add_argument("--part", type=float, default=1.0, help="share of the requests")
    options = parser.parse_args()
    started = time.monotonic()
    generator = Generator(options.model)
    loaded = time.monotonic() - started
    generator.measure(warm_up(1))
    numbers = {name: generator.measure(named(name).shortened(options.part)) for name in options.workload}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"start_seconds": loaded, "peak_mb": peak, "workloads": numbers}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
