"""`outrider verify-lossless`: what counts as a difference, what as a tie, and what the command says and returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.messages import EngineInfo, SequenceUsage, TokenLogprobs
from engine.request import Request
from server import cli
from server.config import ConfigError
from server.lossless import prompts
from server.lossless.command import Command, parse, verify
from server.lossless.comparison import Answer, Difference, compare
from server.lossless.report import Report
from server.lossless.trial import Case, Settings, Trial
from server.tokenizer import Tokenizer
from tests.server.fakes import FakeEngineClient

A, B, C = 10, 11, 12


def entry(emitted: int, **logprobs: float) -> TokenLogprobs:
    """`entry(A, a=-0.5, b=-1.0)`: the likeliest tokens at one position."""
    ids = {"a": A, "b": B, "c": C}
    top = sorted(((ids[name], logprob) for name, logprob in logprobs.items()), key=lambda pair: -pair[1])
    return TokenLogprobs(dict(top)[emitted], 1 + [i for i, _ in top].index(emitted), top)


def answer(ids: list[int], *entries: TokenLogprobs, finish: str = "length") -> Answer:
    return Answer(ids, list(entries), finish)


def kind(plain: TokenLogprobs, other: TokenLogprobs, temperature: float = 0.0) -> str:
    ids = [next(i for i, logprob in one.top if logprob == one.logprob) for one in (plain, other)]
    found = compare(answer([ids[0]], plain), answer([ids[1]], other), temperature, tie=0.01)
    assert found is not None
    return found.kind


class TestComparison:
    def test_equal_answers_have_no_difference(self) -> None:
        assert compare(answer([A, B]), answer([A, B]), 0.0, 0.01) is None

    def test_the_first_difference_and_its_margins(self) -> None:
        plain = answer([C, A, A], entry(C, c=-0.1), entry(A, a=-0.5, b=-1.25), entry(A, a=-0.1))
        other = answer([C, B, A], entry(C, c=-0.1), entry(B, a=-1.0, b=-0.75), entry(A, a=-0.1))
        assert compare(plain, other, 0.0, 0.01) == Difference(1, A, B, "different", top2_margin=0.75, margin=0.75, moved=1.0)

    def test_one_that_ends_early_is_different(self) -> None:
        for plain, other, ids in [([A, B], [A], (B, None)), ([A], [A, B], (None, B))]:
            found = compare(answer(plain), answer(other), 0.0, 1e9)
            assert found is not None
            assert (found.position, found.plain_id, found.other_id, found.kind) == (1, *ids, "different")

    def test_the_same_tokens_that_end_for_another_reason_are_different(self) -> None:
        found = compare(answer([A], finish="stop"), answer([A], finish="length"), 0.0, 1e9)
        assert found is not None
        assert (found.position, found.kind) == (1, "different")

    def test_greedy_ties(self) -> None:
        assert kind(entry(A, a=-0.700, b=-0.705), entry(B, a=-0.705, b=-0.700)) == "tie"
        assert kind(entry(A, a=-0.7, b=-0.7), entry(B, a=-0.701, b=-0.7)) == "tie"  # equal to the last bit: the lower id wins
        assert kind(entry(A, a=-0.70, b=-0.72), entry(B, a=-0.72, b=-0.70)) == "different"

    def test_a_greedy_token_that_its_own_logits_do_not_prefer_is_no_tie_however_close(self) -> None:
        assert kind(entry(A, a=-0.700, b=-0.705), entry(B, a=-0.700, b=-0.705)) == "different"

    def test_seeded_ties_are_told_by_how_far_the_gap_moved(self) -> None:
        assert kind(entry(A, a=-0.50, b=-2.50), entry(B, a=-0.502, b=-2.498), temperature=0.7) == "tie"
        assert kind(entry(A, a=-0.50, b=-2.50), entry(B, a=-0.55, b=-2.45), temperature=0.7) == "different"
        # The same logits and the same noise give the same token: another one was chosen by another rule.
        assert kind(entry(A, a=-0.5, b=-2.5), entry(B, a=-0.5, b=-2.5), temperature=0.7) == "different"
        assert kind(entry(A, a=-0.5, b=-2.5), entry(B, a=-0.4, b=-2.6), temperature=0.7) == "different"

    def test_without_numbers_there_is_no_tie(self) -> None:
        assert kind(entry(A, a=-0.5), entry(B, b=-0.5)) == "different"
        assert kind(entry(A, a=-0.5), entry(B, b=-0.5), temperature=0.7) == "different"
        assert compare(answer([A]), answer([B]), 0.0, 1e9) == Difference(0, A, B, "different")


def counting(request: Request, index: int) -> list[int]:
    """Greedy and seeded answers differ, prompts differ, and speculation changes nothing."""
    start = request.params.seed * 100 + (50 if request.params.temperature else 0)
    return list(range(start, start + 40))


def wrong_when_speculating(request: Request, index: int) -> list[int]:
    ids = counting(request, index)
    return ids if request.speculation.off else [*ids[:3], 7, *ids[4:]]


@pytest.fixture
def client() -> FakeEngineClient:
    return FakeEngineClient(counting, tokens_per_step=3)


@pytest.fixture
def command() -> Command:
    return replace(parse([]), settings=Settings(max_tokens=9))


async def say(client: FakeEngineClient, tokenizer: Tokenizer, command: Command) -> tuple[int, str]:
    lines: list[str] = []
    code = await verify(client, tokenizer, command, lines.append)  # type: ignore[arg-type]  # all that a trial asks of a client
    return code, "\n".join(lines)


class TestTrial:
    async def cases(self, client: FakeEngineClient, **options: Any) -> list[Case]:
        assert client.info is not None
        trial = Trial(client, client.info, Settings(max_tokens=9, **options), lambda case: None)  # type: ignore[arg-type]
        return await trial.run([[1, 2], [3]])

    async def test_every_prompt_is_asked_greedily_and_seeded_without_and_with(self, client: FakeEngineClient) -> None:
        cases = await self.cases(client, temperature=0.5)
        assert [(case.prompt, case.temperature, case.seed, case.kind) for case in cases] == [
            (0, 0.0, 1, "equal"),
            (0, 0.5, 1, "equal"),
            (1, 0.0, 2, "equal"),
            (1, 0.5, 2, "equal"),
        ]
        assert [list(case.runs) for case in cases] == [["first", "again", "predicted"]] * 4
        assert [request.speculation.off for request in client.requests] == [True, False, False, False] * 4
        assert client.requests[3].prediction_ids == cases[0].plain.ids == list(range(100, 109))

    async def test_plain_answers_share_no_cache_with_the_others(self, client: FakeEngineClient) -> None:
        await self.cases(client)
        plain = {request.cache_salt for request in client.requests if request.speculation.off}
        others = {request.cache_salt for request in client.requests if not request.speculation.off}
        assert (len(plain), len(others), plain & others) == (4, 4, set())

    async def test_several_at_once_are_told_in_order(self, client: FakeEngineClient) -> None:
        cases = await self.cases(client, concurrency=3)
        assert [(case.prompt, case.temperature) for case in cases] == [(0, 0.0), (0, 0.7), (1, 0.0), (1, 0.7)]

    async def test_a_difference_is_found_and_plain_decoding_is_asked_again(self, client: FakeEngineClient) -> None:
        client.script = wrong_when_speculating
        case = (await self.cases(client))[0]
        assert case.kind == "different"
        _, difference = case.runs["first"]
        assert difference is not None
        assert (difference.position, difference.plain_id, difference.other_id) == (3, 103, 7)
        assert case.control is None
        assert [request.speculation.off for request in client.requests][:5] == [True, False, False, False, True]

    async def test_plain_decoding_that_differs_from_itself_is_told(self, client: FakeEngineClient) -> None:
        client.script = lambda request, index: [len(client.requests)] * 20
        assert (await self.cases(client))[0].control is not None

    async def test_verifiers_that_keep_only_the_law_are_compared_greedily(self, client: FakeEngineClient) -> None:
        assert client.info is not None
        client.info.verifier = "coin"
        assert {case.temperature for case in await self.cases(client)} == {0.0}
        client.info.lossless = False  # promises nothing: to be caught
        assert {case.temperature for case in await self.cases(client)} == {0.0, 0.7}


class TestCommand:
    async def test_equal_answers_pass(self, client: FakeEngineClient, tokenizer: Tokenizer, command: Command) -> None:
        code, text = await say(client, tokenizer, command)
        assert code == 0
        assert text.count("equal") == 16 + 1
        assert text.splitlines()[-1] == "PASS: 16 equal, 0 numerical ties, 0 different"

    async def test_a_difference_is_shown(self, client: FakeEngineClient, tokenizer: Tokenizer, command: Command) -> None:
        client.script = wrong_when_speculating
        code, text = await say(client, tokenizer, command)
        assert code == 1
        assert "first difference: prompt 1, greedy, run 'first', token 3" in text
        assert "(103), speculation says" in text
        assert "logprob margin of the top two" in text
        assert text.splitlines()[-1].startswith("DIFFERENT: 0 equal")

    async def test_json(self, client: FakeEngineClient, tokenizer: Tokenizer, command: Command) -> None:
        client.script = wrong_when_speculating
        code, text = await say(client, tokenizer, replace(command, as_json=True))
        document = json.loads(text)  # nothing else was printed
        assert (code, document["verdict"], len(document["cases"])) == (1, "DIFFERENT", 16)
        difference = document["cases"][0]["runs"]["first"]["difference"]
        assert (difference["position"], difference["plain_id"], difference["other_id"]) == (3, 103, 7)
        assert difference["top2_margin"] > 0

    async def test_equal_answers_without_a_draft_prove_nothing(self, tokenizer: Tokenizer, command: Command) -> None:
        class Idle(FakeEngineClient):
            def _count(self, seq: Any, kept: int) -> SequenceUsage:
                return SequenceUsage(steps=1)

        code, text = await say(Idle(counting), tokenizer, command)
        assert code == 2
        assert text.splitlines()[-1].startswith("NOT TESTED")
        assert "nothing was drafted" in text

    async def test_plain_answers_that_were_drafted_prove_nothing(self, tokenizer: Tokenizer, command: Command) -> None:
        class Deaf(FakeEngineClient):
            def _count(self, seq: Any, kept: int) -> SequenceUsage:
                return SequenceUsage(steps=1, drafted_tokens=3)

        code, text = await say(Deaf(counting), tokenizer, command)
        assert (code, "could not be switched off" in text) == (2, True)

    async def test_errors_of_the_engine_are_errors(
        self, client: FakeEngineClient, tokenizer: Tokenizer, command: Command
    ) -> None:
        client.fail_after = 1
        with pytest.raises(ValueError, match="NaN"):
            await say(client, tokenizer, command)
        assert client.info is not None
        client.info.max_model_len = 20
        with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens; the context length is 20"):
            await say(client, tokenizer, command)

    def test_flags(self, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text("one\n\ntwo\nthree\n")
        argv = ["m", "--prompts", str(tmp_path / "p.txt"), "--num", "2", "--max-tokens", "5", "--temperature", "1.5", "--json"]
        command = parse([*argv, "--drafters", "ngram", "--concurrency", "4", "--tie-margin", "0"])
        assert [messages[0]["content"] for messages in command.prompts] == ["one", "two"]
        assert (command.settings, command.as_json) == (Settings(5, 1.5, 0.0, 4), True)
        assert (command.config.model, command.config.drafters, command.config.policy) == ("m", ["ngram"], "fixed")

    def test_the_policy_is_fixed_unless_one_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert parse([]).config.policy == "fixed"
        assert parse(["--policy", "off"]).config.policy == "off"
        monkeypatch.setenv("OUTRIDER_POLICY", "goodput")
        assert parse([]).config.policy == "goodput"

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--numm", "3"], "did you mean --num?"),
            (["--num", "0"], "--num"),
            (["--temperature", "nan"], "--temperature"),
            (["--tie-margin", "inf"], "--tie-margin"),
            (["--port", "5"], "unknown argument --port"),
            (["--budget", "-1"], "--budget"),
        ],
    )
    def test_wrong_flags(self, argv: list[str], words: str) -> None:
        with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
            parse(argv)

    def test_the_command_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        for argv, words in [
            (["--num", "0"], "see outrider verify-lossless --help"),
            (["./nothing"], "no such model: ./nothing"),
            (["--prompts", "/does/not/exist"], "No such file"),
        ]:
            assert cli.main(["verify-lossless", *argv]) == 2
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert words in err
        with pytest.raises(SystemExit):
            cli.main(["verify-lossless", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "--drafters" in text
        assert "Exit code 0" in text
        assert "--port" not in text


class TestPrompts:
    def test_our_own_are_different_prompts(self) -> None:
        texts = [messages[0]["content"] for messages in prompts.own()]
        assert len(set(texts)) == len(texts) == 16

    @pytest.mark.parametrize(
        ("line", "content"),
        [
            ("What is it?", "What is it?"),
            ('{"messages": [{"role": "user", "content": "a"}], "id": 1}', "a"),
            ('{"turns": ["a", "b"], "category": "x"}', "a"),
            ('{"prompt": "a"}', "a"),
            ('{"question": "a", "answer": "b"}', "a"),
        ],
    )
    def test_shapes(self, tmp_path: Path, line: str, content: str) -> None:
        (tmp_path / "p").write_text(line + "\n")
        assert prompts.read(tmp_path / "p") == [[{"role": "user", "content": content}]]

    @pytest.mark.parametrize("line", ['{"text": "a"}', '{"messages": []}', '{"messages": [{"role": 1}]}', '{"turns": []}', "{"])
    def test_a_line_that_is_none_is_named(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "p").write_text("fine\n" + line + "\n")
        with pytest.raises(ValueError, match="line 2"):
            prompts.read(tmp_path / "p")

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "p").write_text("\n\n")
        with pytest.raises(ValueError, match="no prompts"):
            prompts.read(tmp_path / "p")


def test_the_worst_case_decides(tokenizer: Tokenizer, client: FakeEngineClient) -> None:
    def case(*kinds: str | None) -> Case:
        usage = SequenceUsage(steps=2, drafted_tokens=4)
        runs = {
            str(i): (Answer([A], usage=usage), None if name is None else Difference(0, A, B, name))  # type: ignore[arg-type]
            for i, name in enumerate(kinds)
        }
        return Case(0, 0.0, 1, Answer([A]), runs)

    info: EngineInfo | None = client.info
    assert info is not None
    verdict: Callable[..., str] = lambda *cases: Report(info, tokenizer, cases).verdict  # noqa: E731
    assert verdict(case(None, None)) == "PASS"
    assert verdict(case(None, "tie"), case(None)) == "PASS"
    assert verdict(case("tie", "different"), case(None)) == "DIFFERENT"
    assert verdict() == "NOT TESTED"
    assert "1 numerical ties" in Report(info, tokenizer, [case("tie")]).text()
