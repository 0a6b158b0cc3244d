"""Nothing comes past the door that may not: by HTTP or websocket, by name, origin or token."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import Any

import pytest

from postlude.dashboard.access import AMEND_VARIABLE, HEALTH, MAY_AMEND, Door, Place, Tokens
from postlude.errors import UserError
from postlude.secrecy import without_secrets

TOKENS = Tokens("a" * 32, "r" * 32)
LOCAL = Place("127.0.0.1", 8080)
HOST, ORIGIN = "127.0.0.1:8080", "http://127.0.0.1:8080"


class Inside:
    """What stands behind the door, and notes what came to it."""

    def __init__(self) -> None:
        self.scopes: list[Mapping[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"inside"})


def ask(
    path: str = "/", kind: str = "http", place: Place = LOCAL, query: str = "", **headers: str
) -> tuple[list[dict[str, Any]], Inside]:
    """What is answered to a request, and what of it came inside."""
    inside, answers = Inside(), []

    async def receive() -> dict[str, Any]:
        return {"type": f"{kind}.connect" if kind == "websocket" else "http.request"}

    async def send(message: Any) -> None:
        answers.append(message)

    lines = [(name.encode(), value.encode()) for name, value in {"host": HOST, **headers}.items() if value]
    scope = {"type": kind, "path": path, "query_string": query.encode(), "headers": lines, "method": "GET"}
    asyncio.run(Door(inside, TOKENS, place)(scope, receive, send))
    return answers, inside


def cookie(token: str) -> str:
    return f"other=1; postlude-8080={token}"


@pytest.mark.parametrize(("token", "amends"), [(TOKENS.amend, True), (TOKENS.read, False)])
def test_the_token_of_the_address_moves_into_a_cookie_and_says_what_one_may(token: str, amends: bool) -> None:
    answers, inside = ask("/", query=f"run=a%2Fb&token={token}")
    headers = dict(answers[0]["headers"])
    assert (answers[0]["status"], headers[b"location"], inside.scopes) == (303, b"/?run=a%2Fb", [])
    assert headers[b"set-cookie"].decode() == f"postlude-8080={token}; Path=/; HttpOnly; SameSite=Lax"
    assert headers[b"referrer-policy"] == b"no-referrer"
    answers, inside = ask("/", query="run=a", cookie=cookie(token))
    assert answers[0]["status"] == 200
    assert [scope[MAY_AMEND] for scope in inside.scopes] == [amends]
    assert ask("/", authorization=f"Bearer {token}")[1].scopes[0][MAY_AMEND] is amends


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "///evil.example/x"])
def test_an_address_with_a_token_leads_to_no_other_host(path: str) -> None:
    headers = dict(ask(path, query=f"token={TOKENS.read}")[0][0]["headers"])
    location = headers[b"location"].decode()
    assert location.startswith("/")
    assert location[1] not in "/\\"


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"cookie": "postlude-8080=" + "x" * 32},
        {"cookie": f"postlude-8081={TOKENS.amend}"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {TOKENS.amend}"},
        {"cookie": f"postlude-8080={TOKENS.amend[:-1]}"},
    ],
)
def test_without_a_token_of_ours_nothing_comes_in(kind: str, headers: dict[str, str]) -> None:
    answers, inside = ask(kind=kind, origin=ORIGIN, **headers)
    assert inside.scopes == []
    assert answers[0].get("status", answers[0].get("code")) in (401, 1008)


def test_a_websocket_takes_no_token_from_its_address() -> None:
    answers, inside = ask(kind="websocket", query=f"token={TOKENS.amend}", origin=ORIGIN)
    assert ([answer["type"] for answer in answers], inside.scopes) == (["websocket.close"], [])


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8080"},
        {"host": "127.0.0.1"},
        {"host": "127.0.0.1:8081"},
        {"host": "127.0.0.1:8080@evil.example"},
        {"host": "[::"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:8081"},
        {"origin": "https://127.0.0.1:8080"},
        {"origin": "null"},
    ],
)
def test_another_host_or_origin_is_refused_though_the_token_is_right(kind: str, headers: dict[str, str]) -> None:
    answers, inside = ask(kind=kind, **{"cookie": cookie(TOKENS.amend), "origin": ORIGIN, **headers})
    assert inside.scopes == []
    assert answers[0].get("status", answers[0].get("code")) in (403, 1008)


def test_a_websocket_says_its_origin() -> None:
    assert ask(kind="websocket", cookie=cookie(TOKENS.read))[1].scopes == []
    assert len(ask(kind="websocket", cookie=cookie(TOKENS.read), origin=ORIGIN)[1].scopes) == 1
    assert len(ask(cookie=cookie(TOKENS.read))[1].scopes) == 1
    assert len(ask(cookie=cookie(TOKENS.read), host="localhost:8080", origin="http://localhost:8080")[1].scopes) == 1


def test_a_probe_needs_nothing_and_builds_nothing() -> None:
    answers, inside = ask(HEALTH, host="10.0.0.7:8080")
    assert (answers[0]["status"], answers[1]["body"], inside.scopes) == (200, b"ok\n", [])


def test_a_browser_that_has_gone_is_no_fault() -> None:
    async def leaves(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise RuntimeError("No response returned.")

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def there() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    headers = [(b"host", HOST.encode()), (b"cookie", cookie(TOKENS.read).encode())]
    scope = {"type": "http", "path": "/", "query_string": b"", "headers": headers}
    asyncio.run(Door(leaves, TOKENS, LOCAL)(scope, gone, send))
    with pytest.raises(RuntimeError):
        asyncio.run(Door(leaves, TOKENS, LOCAL)(scope, there, send))


def test_other_machines_only_by_encryption_or_a_proxy() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.9"):
        assert Place.check(host, 80, False, None).address.startswith("http://")
    for host in ("0.0.0.0", "192.0.2.1", "machine.example", "::"):
        with pytest.raises(UserError, match="--tls-cert"):
            Place.check(host, 80, False, None)
        assert Place.check(host, 80, True, None).is_secure
    for proxy in ("runs.example.org", "ftp://runs.example.org", "https://", "https://runs.example.org/below"):
        with pytest.raises(UserError, match="--behind-proxy takes"):
            Place.check("0.0.0.0", 80, False, proxy)


def test_behind_a_proxy_its_name_is_ours() -> None:
    place = Place.check("0.0.0.0", 8080, False, "https://Runs.example.org/")
    assert (place.address, place.is_secure) == ("https://runs.example.org", True)
    cookies = {"cookie": cookie(TOKENS.amend)}
    seen = {"host": "runs.example.org", "origin": "https://runs.example.org"}
    assert len(ask(kind="websocket", place=place, **cookies, **seen)[1].scopes) == 1
    for wrong in ({"host": "other.example.org"}, {"origin": "http://runs.example.org"}):
        assert ask(kind="websocket", place=place, **cookies, **{**seen, **wrong})[1].scopes == []
    made = dict(ask(place=place, host="runs.example.org", query=f"token={TOKENS.amend}")[0][0]["headers"])
    assert made[b"set-cookie"].endswith(b"; Secure")


def test_where_all_addresses_are_ours_a_number_is_and_a_name_that_leads_here_is_not() -> None:
    place = Place.check("0.0.0.0", 443, True, None)
    for host, known in (("192.0.2.7", True), ("192.0.2.7:443", True), ("192.0.2.7:8", False), ("bent.example", False)):
        assert place.knows_host(host) is known
        assert place.knows_origin(f"https://{host}", host) is known
    assert not place.knows_origin("https://192.0.2.8", "192.0.2.7")


def test_tokens_are_random_told_nowhere_and_not_short(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Tokens.make(), Tokens.make()
    assert len({one.amend, one.read, other.amend, other.read}) == 4
    assert one.amend not in repr(one)
    assert without_secrets(f"it is {one.amend}, or {one.read}") == "it is <token>, or <token>"
    assert [one.may_amend(token) for token in (one.amend, one.read, other.amend, "", "é")] == [True, False, *[None] * 3]
    monkeypatch.setenv(AMEND_VARIABLE, "short")
    with pytest.raises(UserError, match="5 characters"):
        Tokens.make()
    monkeypatch.setenv(AMEND_VARIABLE, "chosen" * 5)
    assert Tokens.make().amend == "chosen" * 5
    monkeypatch.setenv("POSTLUDE_DASHBOARD_READ_TOKEN", "chosen" * 5)
    with pytest.raises(UserError, match="must not be the token"):
        Tokens.make()


def test_a_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[object] = []
    original = secrets.compare_digest
    monkeypatch.setattr(secrets, "compare_digest", lambda *both: compared.append(both) or original(*both))
    TOKENS.may_amend("x")
    assert len(compared) == 2
