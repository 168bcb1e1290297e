"""API keys: default deny, whole keys, probes apart."""

from __future__ import annotations

import pytest

from server import auth
from tests.server.conftest import Api, ApiFactory, error

KEYS = ["sk-first", "sk-zweiter-schlüssel"]
CLOSED = [
    "/v1/models",
    "/v1/models/fake",
    "/version",
    "/metrics",
    "/openapi.json",
    "/nothing",
    "/",
    "/healthz",
    "/health/x",
    "//health",
]


@pytest.fixture
def locked(make_api: ApiFactory) -> Api:
    return make_api(api_key=KEYS)


def bearer(key: str) -> dict[str, bytes]:
    return {"authorization": f"Bearer {key}".encode()}


@pytest.mark.parametrize("path", CLOSED)
async def test_every_route_is_closed(locked: Api, path: str) -> None:
    response = await locked.http.get(path)
    error(response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
async def test_no_body_is_read_without_a_key(locked: Api, path: str) -> None:
    error(await locked.http.post(path, content=b"no json"), 401, "invalid_api_key")


@pytest.mark.parametrize("path", ["/live", "/ready", "/health"])
async def test_probes_need_no_key(locked: Api, path: str) -> None:
    assert (await locked.http.get(path)).status_code == 200


@pytest.mark.parametrize("key", KEYS)
async def test_each_key_opens(locked: Api, key: str) -> None:
    assert (await locked.http.get("/v1/models", headers=bearer(key))).status_code == 200
    assert (await locked.http.get("/metrics", headers={"authorization": f"bearer  {key} ".encode()})).status_code == 200
    error(await locked.http.get("/nothing", headers=bearer(key)), 404)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        "sk-first",
        "Basic sk-first",
        "Bearer sk-firs",
        "Bearer sk-firstt",
        "Bearer SK-FIRST",
        "Bearer ü",
        "Bearer sk-first,sk-first",
        "Bearer sk-first sk-first",
        "Bearer sk-zweiter-schlussel",
        "Bearer " + "x" * 10_000,
    ],
)
async def test_nothing_else_does(locked: Api, value: str) -> None:
    error(await locked.http.get("/v1/models", headers={"authorization": value.encode()}), 401, "invalid_api_key")


async def test_every_key_is_compared_in_constant_time(locked: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever key matches, all are compared, and by the function that does not stop at the first difference."""
    compared: list[bytes] = []
    real = auth.hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return real(one, other)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    for key in (KEYS[0], "wrong"):
        compared.clear()
        await locked.http.get("/v1/models", headers=bearer(key))
        assert compared == [key.encode() for key in KEYS]


async def test_without_keys_all_is_open(api: Api) -> None:
    assert (await api.http.get("/v1/models")).status_code == 200
