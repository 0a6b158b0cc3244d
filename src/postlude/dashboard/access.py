"""Who may see the page and who may change a run by it: tokens, and where a request may come from.

- A token is random, and made anew with each start, unless the environment has one. It comes once, in the address that
  is opened, and moves from there into a cookie that no script reads; :class:`Door` takes it out before anything else
  sees the request. It is compared in constant time, and known as a secret (:mod:`postlude.secrecy`): no log has it.
- A browser says by which name it reached the server (``Host``) and which page asks (``Origin``). Both must be ours:
  else a name that was bent to this address, or another page in the same browser, could use the cookie.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from postlude.errors import UserError
from postlude.secrecy import learn

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

AMEND_VARIABLE, READ_VARIABLE = "POSTLUDE_DASHBOARD_TOKEN", "POSTLUDE_DASHBOARD_READ_TOKEN"
LEAST_CHARACTERS = 20
"""Of a token that somebody chose."""
MAY_AMEND = "postlude.may_amend"
"""Under which key of its scope a request says whether it may change a run."""
HEALTH = "/healthz"
"""Asked by probes: it builds no page and needs no token."""

_HEADERS = {
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # The front end compiles templates and styles in the browser. Nothing is fetched from or sent to another host.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'",
}


@dataclass(frozen=True)
class Tokens:
    """What lets in: to change runs, or only to look."""

    amend: str = field(repr=False)
    read: str = field(repr=False)

    @classmethod
    def make(cls) -> Tokens:
        """Those of the environment, else random ones. UserError for one that is easily guessed."""
        chosen = []
        for variable in (AMEND_VARIABLE, READ_VARIABLE):
            token = os.environ.get(variable) or secrets.token_urlsafe(24)
            if len(token) < LEAST_CHARACTERS:
                raise UserError(
                    f"{variable} has {len(token)} characters, and a token needs {LEAST_CHARACTERS}: unset it for a "
                    "random one, or make one with `openssl rand -hex 16`."
                )
            learn(token, "token")
            chosen.append(token)
        if chosen[0] == chosen[1]:
            raise UserError(f"{READ_VARIABLE} must not be the token of {AMEND_VARIABLE}: who only looks would amend.")
        return cls(*chosen)

    def may_amend(self, token: str) -> bool | None:
        """Whether who has it may change runs; None for one that is not ours."""
        given = token.encode()
        amends = secrets.compare_digest(given, self.amend.encode())
        reads = secrets.compare_digest(given, self.read.encode())
        return amends if amends or reads else None


@dataclass(frozen=True)
class Place:
    """Where the server listens, and by which names browsers reach it."""

    host: str
    port: int
    is_encrypted: bool = False
    proxy: str | None = None
    """The address in front of a proxy, as browsers have it."""

    @classmethod
    def check(cls, host: str, port: int, is_encrypted: bool, proxy: str | None) -> Place:
        """UserError for an address that others reach without encryption, or a proxy's that is none."""
        if proxy is not None:
            parts = urlsplit(proxy)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
                raise UserError(
                    f"--behind-proxy takes the address that browsers open, such as https://runs.example.org, not "
                    f"'{proxy}'. The page stands at its root."
                )
            proxy = f"{parts.scheme}://{parts.netloc}".lower()
        elif not is_encrypted and not is_loopback(host):
            raise UserError(
                f"Other machines reach '{host}', and without encryption they could read the token. Give --tls-cert and "
                "--tls-key, or --behind-proxy with the address of a proxy that encrypts. Or leave --host away and use "
                f"a tunnel: ssh -L {port}:127.0.0.1:{port} MACHINE."
            )
        return cls(host, port, is_encrypted, proxy)

    @property
    def address(self) -> str:
        """What a person opens."""
        if self.proxy:
            return self.proxy
        host = socket.gethostname() if _is_wildcard(self.host) else self.host
        return f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def is_secure(self) -> bool:
        """Whether browsers reach it encrypted."""
        return self.address.startswith("https:")

    def knows_host(self, host: str) -> bool:
        """Whether a browser that names this host meant to come here."""
        return any(host.lower() == urlsplit(address).netloc for address in self._addresses(host))

    def knows_origin(self, origin: str, host: str) -> bool:
        """Whether a page of this origin is one of ours, seen from who named this host."""
        return origin.lower() in self._addresses(host)

    @property
    def _scheme(self) -> str:
        return "https" if self.is_encrypted else "http"

    def _addresses(self, host: str) -> Iterable[str]:
        """The addresses that are ours; where all of the machine's are, the number that was named as well: a name can be
        bent to this machine, a number cannot."""
        names = {self.host}
        if is_loopback(self.host):
            names |= {"localhost", "127.0.0.1", "[::1]"}
        elif _is_wildcard(self.host):
            named = urlsplit(f"//{host}").hostname or ""
            names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
            names |= {f"[{named}]" if ":" in named else named} if _is_number(named) else set()
        own = {f"{self._scheme}://{name.lower()}" for name in names}
        default = ":443" if self.is_encrypted else ":80"
        own = {f"{address}:{self.port}" for address in own} | (own if f":{self.port}" == default else set())
        return own | {self.proxy} if self.proxy else own


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host == "localhost" or (_is_number(host) and ip_address(host.strip("[]")).is_loopback)


def _is_wildcard(host: str) -> bool:
    return _is_number(host) and ip_address(host.strip("[]")).is_unspecified


def _is_number(host: str) -> bool:
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


class Door:
    """Stands before the application: nothing comes to it, by HTTP or by websocket, that may not."""

    def __init__(self, application: Application, tokens: Tokens, place: Place) -> None:
        self.app, self._tokens, self._place = application, tokens, place
        self._cookie = f"postlude-{place.port}"
        """Browsers do not tell ports apart, so that two servers on one machine need two names."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == HEALTH:
            await _answer(send, 200, "ok\n")
        elif (refusal := self._refusal(scope)) is not None:
            await _refuse(scope, receive, send, 403, refusal)
        else:
            await self._admit(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        """Why a request from there is not answered."""
        hosts, origins = _header(scope, b"host"), _header(scope, b"origin")
        try:
            is_ours = len(hosts) == 1 and self._place.knows_host(hosts[0])
        except ValueError:  # it is no host at all
            is_ours = False
        if not is_ours:
            return f"This server does not answer to that name. Open {self._place.address}."
        needs_origin = scope["type"] == "websocket"
        if (needs_origin and not origins) or not all(self._place.knows_origin(each, hosts[0]) for each in origins):
            return "A page of another origin asks."
        return None

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token" and scope["type"] == "http"]
        token = given[0] if given else self._carried(scope)
        may_amend = None if token is None else self._tokens.may_amend(token)
        if token is None or may_amend is None:
            known = "The token is not, or is no longer, this server's." if token else "A token is needed."
            text = f"{known} Open the address that `postlude dashboard` printed when it was started."
            await _refuse(scope, receive, send, 401, text)
        elif given:
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            target = "/" + scope["path"].lstrip("/\\") + (f"?{rest}" if rest else "")  # never another host
            await _answer(send, 303, "", {"location": target, "set-cookie": self._set_cookie(token)})
        else:
            await self._pass_on({**scope, MAY_AMEND: may_amend}, receive, _with_headers(send))

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in. What is raised because the browser has gone meanwhile is no fault."""
        has_left = False

        async def noticing() -> MutableMapping[str, Any]:
            nonlocal has_left
            message = await receive()
            has_left |= message["type"] == "http.disconnect"
            return message

        try:
            await self.app(scope, noticing, send)
        except RuntimeError:
            if not has_left:
                raise

    def _carried(self, scope: Scope) -> str | None:
        """The token that a browser keeps, or a script gives."""
        for text in _header(scope, b"authorization"):
            scheme, _, token = text.partition(" ")
            if scheme.lower() == "bearer":
                return token.strip()
        for text in _header(scope, b"cookie"):
            try:
                if self._cookie in (cookies := SimpleCookie(text)):
                    return cookies[self._cookie].value
            except CookieError:
                continue
        return None

    def _set_cookie(self, token: str) -> str:
        # Lax, not Strict: else a link in a message would lead to a page without the cookie. No address changes a run.
        secure = "; Secure" if self._place.is_secure else ""
        return f"{self._cookie}={token}; Path=/; HttpOnly; SameSite=Lax{secure}"


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _with_headers(send: Send) -> Send:
    """The same, with what browsers are told of every page."""

    async def send_with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return send_with_headers


async def _answer(send: Send, status: int, text: str, headers: MutableMapping[str, str] | None = None) -> None:
    body = text.encode()
    shown = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(body)), "cache-control": "no-store"}
    lines = [(name.encode(), value.encode("latin-1")) for name, value in {**shown, **(headers or {})}.items()]
    await _with_headers(send)({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": text[:100]})
    else:
        await _answer(send, status, text + "\n")
