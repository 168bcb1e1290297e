"""Any JSON at all, with a taste for our own field names: never a 5xx, and the next good request is served."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.validate import check_request
from server.openai.schema import ChatRequest, CompletionRequest
from server.openai.tokenize import DetokenizeRequest, TokenizeRequest
from tests.server.conftest import MODEL, Api, error

ROUTES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
GOOD: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hi"}],
    "prompt": "Hi",
    "tokens": [1, 2],
    "stream": True,
    "stream_options": {"include_usage": True},
    "prediction": {"type": "content", "content": "x"},
    "logit_bias": {"5": 1},
    "speculation": {"drafter": "ngram", "max_nodes": 3, "verifier": "coin"},
    "include_speculation": True,
}
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 20, 128, 511, 512, 49151, 49152, 1 << 31, 1 << 63, 1 << 64])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path, model = draw(st.sampled_from(list(ROUTES.items())))
    fields = list(model.model_fields)
    body = {name: GOOD[name] for name in ("model", "messages", "prompt", "tokens") if name in fields}
    if path == "/tokenize":
        del body[draw(st.sampled_from(["messages", "prompt"]))]
    for name in draw(st.lists(st.sampled_from(fields), max_size=4)):
        body[name] = draw(JSON | NUMBERS | st.just(GOOD.get(name)))
    for name in draw(st.lists(st.text(min_size=1, max_size=8), max_size=1)):
        body[name] = draw(JSON)
    return path, body


def well_formed(response: httpx.Response) -> None:
    if response.status_code != 200:
        assert response.status_code in (400, 404), response.text
        error(response, response.status_code)
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert "error" not in response.json()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=bodies())
async def test_any_body(api: Api, case: tuple[str, dict[str, Any]]) -> None:
    path, body = case
    response = await api.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    well_formed(response)
    assert api.app.state.frontend.admission.in_flight == 0
    for request in api.engine.requests:
        check_request(request, api.engine.info)  # what passes the front end, the engine takes
    api.engine.requests.clear()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200), path=st.sampled_from(list(ROUTES)))
async def test_any_bytes(api: Api, raw: bytes, path: str) -> None:
    well_formed(await api.http.post(path, content=raw, headers={"content-type": "application/json"}))
    assert (await api.chat(max_tokens=1)).status_code == 200
