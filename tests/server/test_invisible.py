"""How many tokens a step brings is what speculation changes. Nothing a client can see may depend on it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import ApiFactory, events
from tests.server.test_completions import join

TEXT = "Naïve 🙂🙃 café: one two STOP three four — 漢字 and a long rest of the line\n\nEnd."
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "to the end": {"max_tokens": 200},
    "cut": {"max_tokens": 7},
    "cut inside a character": {"max_tokens": 4},
    "stop": {"stop": "STOP"},
    "stop inside a token": {"stop": ["ree f"]},
    "stop in an emoji's neighbourhood": {"stop": ["🙃"]},
    "stop that never comes": {"stop": ["two STOP two", "rest of the lime"]},
    "two stops": {"stop": ["four", "STOP three"]},
    "stop shown": {"stop": "STOP", "include_stop_str_in_output": True},
    "stop and minimum": {"stop": ["one"], "min_tokens": 12},
    "stop at the limit": {"stop": "café", "max_tokens": 9},
    "samples": {"n": 3, "stop": ["four"]},
    "prediction": {"prediction": {"type": "content", "content": "Naïve 🙂🙃 tea"}, "stop": "two"},
}


def plain(body: dict[str, Any]) -> dict[str, Any]:
    """Without what names the answer."""
    return {name: value for name, value in body.items() if name not in ("id", "created")}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
async def test_steps_of_any_size_give_one_answer(make_api: ApiFactory, fields: dict[str, Any]) -> None:
    whole, streamed, listed = [], [], []
    for tokens_per_step in (1, 2, 3, 4, 5, 100):
        api = make_api(TEXT, TEXT[::-1], tokens_per_step=tokens_per_step)
        options = {"max_tokens": 200, "return_token_ids": True, **fields}
        body = (await api.chat(logprobs=True, top_logprobs=2, **options)).json()
        body["usage"]["completion_tokens_details"] = None  # the engine's, and the scripted one counts by step
        whole.append(plain(body))
        lists = (await api.complete(logprobs=2, echo=True, **options)).json()
        listed.append(lists["choices"])
        chunks = events(await api.complete(logprobs=2, echo=True, stream=True, **options))
        streamed.append([join(chunks, i) for i in range(fields.get("n", 1))])
    assert all(one == whole[0] for one in whole)
    assert all(one == listed[0] for one in listed)
    assert all(one == streamed[0] for one in streamed)
    names = ("text", "finish_reason", "logprobs")
    assert streamed[0] == [{name: choice[name] for name in names} for choice in listed[0]]


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
async def test_asking_for_logprobs_changes_no_text(make_api: ApiFactory, fields: dict[str, Any]) -> None:
    for tokens_per_step in (1, 3):
        api = make_api(TEXT, TEXT[::-1], tokens_per_step=tokens_per_step)
        without = (await api.chat(**{"max_tokens": 200, **fields})).json()
        with_them = (await api.chat(**{"max_tokens": 200, "logprobs": True, **fields})).json()
        for one, other in zip(without["choices"], with_them["choices"], strict=True):
            assert one["message"] == other["message"]
            assert one["finish_reason"] == other["finish_reason"]
        count = without["usage"]["completion_tokens"]
        assert count == with_them["usage"]["completion_tokens"]
        assert count == sum(len(choice["logprobs"]["content"]) for choice in with_them["choices"])
