"""What a trial came to: a verdict, a line per case, the first difference in words, and all of it as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engine.messages import EngineInfo
from server.lossless.comparison import Difference
from server.lossless.trial import Case, seeded_too

if TYPE_CHECKING:
    from server.tokenizer import Tokenizer

PASS, DIFFERENT, NOT_TESTED = "PASS", "DIFFERENT", "NOT TESTED"
EXIT_CODES = {PASS: 0, DIFFERENT: 1, NOT_TESTED: 2}
CONTEXT_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Report:
    """Where nothing was drafted, or plain decoding was not plain, equal answers prove nothing."""

    info: EngineInfo
    tokenizer: Tokenizer
    cases: Sequence[Case]

    @property
    def verdict(self) -> str:
        if any(case.kind == "different" for case in self.cases):
            return DIFFERENT
        return NOT_TESTED if self.void else PASS

    @property
    def void(self) -> str:
        """Why equal answers would prove nothing; empty when they do."""
        if any(case.plain.usage.drafted_tokens for case in self.cases):
            return "speculation could not be switched off"
        return "" if self.drafted else "nothing was drafted"

    @property
    def drafted(self) -> int:
        return sum(answer.usage.drafted_tokens for case in self.cases for answer, _ in case.runs.values())

    @property
    def accepted(self) -> int:
        return sum(answer.usage.accepted_tokens for case in self.cases for answer, _ in case.runs.values())

    def line(self, case: Case) -> str:
        steps = sum(answer.usage.steps for answer, _ in case.runs.values())
        tokens = sum(len(answer.ids) for answer, _ in case.runs.values())
        rate = f"{tokens / steps:.2f} tokens per step" if steps else "no steps counted"
        return f"prompt {case.prompt + 1:3d}  {_way(case):22s} {case.kind:9s} {len(case.plain.ids):4d} tokens, {rate}"

    def text(self) -> str:
        """The summary for people; the lines of the cases come before it."""
        counts = Counter(case.kind for case in self.cases)
        first = next((case for kind in ("different", "tie") for case in self.cases if case.kind == kind), None)
        info = self.info
        lines = [
            f"{info.model}: {info.dtype} on {info.device}",
            f"drafters {','.join(info.drafters)}, verifier {info.verifier}, policy {info.policy}",
            f"{self.drafted} tokens drafted, {self.accepted} of them accepted",
            *([] if seeded_too(info) else [f"seeded answers were not compared: {info.verifier} keeps their law, not the draw"]),
            *(self._first(first) if first is not None else []),
            f"{self.verdict}: {counts['equal']} equal, {counts['tie']} numerical ties, {counts['different']} different"
            + (f" ({self.void})" if self.void else ""),
        ]
        return "\n".join(lines)

    def _first(self, case: Case) -> list[str]:
        name, difference = next((name, found) for name, (_, found) in case.runs.items() if found and found.kind == case.kind)
        before = case.plain.ids[max(difference.position - CONTEXT_TOKENS, 0) : difference.position]
        lines = [
            f"first difference: prompt {case.prompt + 1}, {_way(case)}, run {name!r}, token {difference.position}",
            f"  after {self.tokenizer.decode(before, skip_special_tokens=False)!r}",
            f"  plain decoding says {self._token(difference.plain_id)}, speculation says {self._token(difference.other_id)}",
            f"  logprob margin of the top two {_number(difference.top2_margin)}, of these two {_margin(case, difference)}",
            f"  from one run to the other, the gap between these two moved by {_number(difference.moved)}",
        ]
        if case.control is not None:
            lines.append(
                "  plain decoding asked twice differs from itself as well: this machine's arithmetic is not reproducible"
            )
        return lines

    def _token(self, token_id: int | None) -> str:
        return "nothing" if token_id is None else f"{self.tokenizer.token_text(token_id)!r} ({token_id})"

    def document(self) -> dict[str, Any]:
        """The same as JSON."""
        info = self.info
        return {
            "verdict": self.verdict,
            "model": info.model,
            "dtype": info.dtype,
            "device": info.device,
            "drafters": info.drafters,
            "verifier": info.verifier,
            "lossless": info.lossless,
            "policy": info.policy,
            "seeded_compared": seeded_too(info),
            "num_draft_tokens": self.drafted,
            "num_accepted_tokens": self.accepted,
            "cases": [_case(case) for case in self.cases],
        }


def _way(case: Case) -> str:
    return "greedy" if case.temperature == 0 else f"T={case.temperature:g} seed {case.seed}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _margin(case: Case, difference: Difference) -> str:
    return ("at most " if case.temperature and difference.margin is not None else "") + _number(difference.margin)


def _case(case: Case) -> dict[str, Any]:
    runs = {
        name: {
            "num_tokens": len(answer.ids),
            "steps": answer.usage.steps,
            "num_draft_tokens": answer.usage.drafted_tokens,
            "num_accepted_tokens": answer.usage.accepted_tokens,
            "difference": None if difference is None else asdict(difference),
        }
        for name, (answer, difference) in case.runs.items()
    }
    return {
        "prompt": case.prompt + 1,
        "temperature": case.temperature,
        "seed": case.seed,
        "outcome": case.kind,
        "num_tokens": len(case.plain.ids),
        "plain_differs_from_itself": case.control is not None,
        "runs": runs,
    }
