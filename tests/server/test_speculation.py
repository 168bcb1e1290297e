"""`speculation` and `include_speculation`: what a request may choose, and what it is told."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine.messages import SequenceUsage
from engine.request import Speculation
from server.openai.report import speculation_report
from tests.server.conftest import Api, ApiFactory, error, events
from tests.server.official import check

USAGE = {"include_usage": True}
LOSSY_HEADER = "x-outrider-lossless"


def metrics(body: dict[str, Any]) -> dict[str, Any]:
    return body["metrics"]["speculative_decoding"]


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        (None, Speculation()),
        ({}, Speculation()),
        ("off", Speculation(off=True)),
        ({"max_nodes": 0}, Speculation(off=True)),
        ({"max_nodes": 0, "drafter": "ngram"}, Speculation(off=True)),
        ({"drafter": "ngram"}, Speculation(drafters=["ngram"])),
        ({"drafter": ["ngram", "prediction", "ngram"]}, Speculation(drafters=["ngram", "prediction"])),
        ({"max_nodes": 32}, Speculation(max_nodes=32)),
        ({"verifier": "coin"}, Speculation(verifier="coin")),
        ({"verifier": "match", "max_nodes": 3, "drafter": None}, Speculation(verifier="match", max_nodes=3)),
    ],
)
async def test_what_a_request_chooses_reaches_the_engine(api: Api, field: Any, asked: Speculation) -> None:
    for send in (api.chat, api.complete):
        response = await send(speculation=field)
        assert response.status_code == 200, response.text
        assert api.request().speculation == asked


async def test_every_prompt_of_a_request_gets_the_choice(api: Api) -> None:
    await api.complete(prompt=["a", "b"], speculation="off")
    assert [request.speculation.off for request in api.engine.requests] == [True, True]


@pytest.mark.parametrize(
    ("field", "code", "param"),
    [
        ("on", "invalid_value", "speculation"),
        ("OFF", "invalid_value", "speculation"),
        (True, "invalid_value", "speculation"),
        (0, "invalid_value", "speculation"),
        (["off"], "invalid_value", "speculation"),
        ({"drafters": ["ngram"]}, "unknown_parameter", "speculation.drafters"),
        ({"off": True}, "unknown_parameter", "speculation.off"),
        ({f"k{i}": i for i in range(100)}, "unknown_parameter", "speculation.k0"),
        ({"drafter": "suffix"}, "invalid_value", "speculation.drafter"),
        ({"drafter": ["ngram", "suffix"]}, "invalid_value", "speculation.drafter"),
        ({"drafter": []}, "invalid_value", "speculation.drafter"),
        ({"drafter": ""}, "invalid_value", "speculation.drafter[0]"),
        ({"drafter": ["ngram"] * 17}, "invalid_value", "speculation.drafter"),
        ({"drafter": 5}, "invalid_type", "speculation.drafter"),
        ({"drafter": [5]}, "invalid_type", "speculation.drafter[0]"),
        ({"max_nodes": 33}, "invalid_value", "speculation.max_nodes"),
        ({"max_nodes": -1}, "invalid_value", "speculation.max_nodes"),
        ({"max_nodes": 1.0}, "invalid_type", "speculation.max_nodes"),
        ({"max_nodes": "3"}, "invalid_type", "speculation.max_nodes"),
        ({"max_nodes": True}, "invalid_type", "speculation.max_nodes"),
        ({"max_nodes": 10**400}, None, "speculation.max_nodes"),
        ({"verifier": "typical"}, "invalid_value", "speculation.verifier"),
        ({"verifier": ["match"]}, "invalid_type", "speculation.verifier"),
        ({"max_nodes": 0, "verifier": "typical"}, "invalid_value", "speculation.verifier"),
    ],
)
async def test_what_a_request_may_not_choose_is_named(api: Api, field: Any, code: str | None, param: str) -> None:
    for send in (api.chat, api.complete):
        error(await send(speculation=field), 400, code, param)
    assert api.engine.requests == []


async def test_a_refusal_lists_what_there_is_and_not_what_was_asked(api: Api) -> None:
    message = error(await api.chat(speculation={"drafter": "x" * 60}), 400)["message"]
    assert "prediction, ngram" in message
    assert "xxx" not in message


async def test_a_server_with_a_lossy_verifier_may_be_asked_for_it_by_name(api: Api) -> None:
    assert api.engine.info is not None
    api.engine.info.verifier, api.engine.info.lossless = "typical", False
    assert (await api.chat(speculation={"verifier": "typical"})).status_code == 200
    assert (await api.chat(speculation={"verifier": "coin"})).status_code == 200
    error(await api.chat(speculation={"verifier": "lenient"}), 400, param="speculation.verifier")


@pytest.mark.parametrize("flag", ["yes", 1, {}])
async def test_include_speculation_is_a_switch(api: Api, flag: Any) -> None:
    error(await api.chat(include_speculation=flag), 400, "invalid_type", "include_speculation")


async def test_the_report_of_a_body(make_api: ApiFactory) -> None:
    """Seven tokens and the end in steps of three: 3 + 3 + 2, each with one node more drafted than stood."""
    api = make_api("one two three four five six seven", tokens_per_step=3)
    for send in (api.chat, api.complete):
        body = (await send(include_speculation=True)).json()
        assert body["usage"]["completion_tokens"] == 8
        assert metrics(body) == {
            "mean_acceptance_length": round(8 / 3, 6),
            "draft_acceptance_rate": round(5 / 8, 6),
            "acceptance_histogram": [0, 1, 2],
            "num_spec_steps": 3,
            "num_accepted_draft_tokens": 5,
            "num_draft_tokens": 8,
            "num_spec_tokens": 32,
            "num_accepted_tokens_per_pos": [3, 2],
            "drafters": {"ngram": {"num_draft_tokens": 8, "num_accepted_draft_tokens": 5}},
            "budget_reasons": {"cost": 3},
            "estimated_seconds_saved": 1.25,
            "verifier": "match",
            "lossless": True,
        }


async def test_choices_are_added_up(make_api: ApiFactory) -> None:
    api = make_api("one two three four five six seven", tokens_per_step=4)
    one = metrics((await api.complete(include_speculation=True)).json())
    many = metrics((await api.complete(include_speculation=True, prompt=["a", "b"], n=3)).json())
    for name in ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens"):
        assert many[name] == 6 * one[name] > 0
    for name in ("num_accepted_tokens_per_pos", "acceptance_histogram"):
        assert many[name] == [6 * count for count in one[name]]
    assert many["budget_reasons"] == {"cost": 6 * one["num_spec_steps"]}
    assert many["mean_acceptance_length"] == one["mean_acceptance_length"]


async def test_off_is_reported_as_plain_decoding(make_api: ApiFactory) -> None:
    api = make_api("one two three")
    report = metrics((await api.chat(speculation="off", include_speculation=True)).json())
    assert (report["num_spec_tokens"], report["num_draft_tokens"], report["drafters"]) == (0, 0, {})
    assert (report["mean_acceptance_length"], report["draft_acceptance_rate"]) == (1.0, 0.0)
    assert report["acceptance_histogram"] == [report["num_spec_steps"]]
    report = metrics((await api.chat(speculation={"max_nodes": 4, "verifier": "coin"}, include_speculation=True)).json())
    assert (report["num_spec_tokens"], report["verifier"]) == (4, "coin")


async def test_a_stop_string_has_a_report_too(make_api: ApiFactory) -> None:
    api = make_api("one two three four five six", tokens_per_step=2)
    report = metrics((await api.chat(stop="three", include_speculation=True)).json())
    assert report["num_spec_steps"] == 2


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_ends_with_the_report(make_api: ApiFactory, n: int) -> None:
    api = make_api("one two three", "one", tokens_per_step=2)
    for send in (api.chat, api.complete):
        whole = metrics((await send(include_speculation=True, n=n)).json())
        for options in ({}, {"stream_options": USAGE}):
            chunks = events(await send(include_speculation=True, n=n, stream=True, **options))
            assert metrics(chunks[-1]) == whole
            assert not any("metrics" in chunk for chunk in chunks[:-1])
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] > 0


async def test_the_report_is_all_that_is_added(make_api: ApiFactory) -> None:
    api = make_api("one two three", tokens_per_step=2)

    def checked(body: dict[str, Any], kind: Any) -> bool:
        found = body.pop("metrics", None) is not None
        check(body, kind)
        return found

    assert checked((await api.chat(include_speculation=True)).json(), ChatCompletion)
    assert checked((await api.complete(include_speculation=True)).json(), Completion)
    for options in ({}, {"stream_options": USAGE}):
        chunks = events(await api.chat(include_speculation=True, stream=True, **options))
        assert [checked(chunk, ChatCompletionChunk) for chunk in chunks] == [*[False] * (len(chunks) - 1), True]
    for options in ({}, {"include_speculation": False}, {"include_speculation": None}):
        response = await api.chat(**options)
        assert "metrics" not in response.json()
        assert LOSSY_HEADER not in response.headers


async def test_a_lossy_server_says_so_in_every_answer(api: Api) -> None:
    """Unasked, in the body and in a header, streaming or not; and says when an answer is exact all the same."""
    assert api.engine.info is not None
    api.engine.info.verifier, api.engine.info.lossless = "typical", False
    for send in (api.chat, api.complete):
        for speculation, lossless in [
            (None, False),
            ({"verifier": "match"}, True),
            ({"verifier": "typical"}, False),
            ("off", True),
        ]:
            response = await send(speculation=speculation)
            assert response.json()["metrics"] == {"speculative_decoding": {"lossless": lossless}}
            assert response.headers[LOSSY_HEADER] == str(lossless).lower()
            assert ("lossy" in response.json()["system_fingerprint"]) is not lossless
            stream = await send(speculation=speculation, stream=True)
            assert stream.headers[LOSSY_HEADER] == str(lossless).lower()
            assert metrics(events(stream)[-1])["lossless"] is lossless
        assert metrics((await send(include_speculation=True)).json())["lossless"] is False


def test_a_report_of_nothing() -> None:
    for usages in ([], [SequenceUsage()]):
        report = speculation_report(usages, num_spec_tokens=8, verifier="match", lossless=True)
        assert (report["mean_acceptance_length"], report["draft_acceptance_rate"]) == (0.0, 0.0)
        assert (report["acceptance_histogram"], report["num_accepted_tokens_per_pos"]) == ([0], [])


def test_a_report_adds_drafters_by_name() -> None:
    one = SequenceUsage(steps=4, drafted_tokens=9, accepted_tokens=3, accepted_per_position=[2, 1], drafted_by={"a": 5, "b": 4})
    one.accepted_by, one.budget_reasons = {"a": 3}, {"cost": 3, "room": 1}
    other = SequenceUsage(steps=1, drafted_tokens=2, accepted_tokens=2, accepted_per_position=[1, 1], drafted_by={"b": 2})
    other.accepted_by, other.budget_reasons = {"b": 2}, {"room": 1}
    report = speculation_report([one, other], num_spec_tokens=8, verifier="match", lossless=True)
    assert report["drafters"] == {
        "a": {"num_draft_tokens": 5, "num_accepted_draft_tokens": 3},
        "b": {"num_draft_tokens": 6, "num_accepted_draft_tokens": 2},
    }
    assert report["budget_reasons"] == {"cost": 3, "room": 2}
    assert report["acceptance_histogram"] == [2, 1, 2]
