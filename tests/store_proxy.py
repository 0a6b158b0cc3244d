"""A proxy before a server of S3, which misbehaves as a test asks: one request at a time is told to a judge.

The judge sees method, path and headers of each request, numbered from 1, and says what becomes of it: :data:`PASS`; a
status with a code of S3 (``(503, "SlowDown")``) or a body; :data:`HANG`, until the client gives up, before it is asked
for the body; :data:`LOSE`, which passes it on and loses the answer; or a callable, which is called and whose result
counts.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

PASS, HANG, LOSE = "pass", "hang", "lose"

Verdict = Any
_NOT_PASSED_ON = {"connection", "transfer-encoding", "expect"}


@dataclass(frozen=True)
class Request:
    """What the judge sees."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""


Judge = Callable[[Request], Verdict]


@dataclass
class Proxy:
    """A server that stands before another."""

    endpoint: str
    judge: Judge = lambda _: PASS
    seen: int = 0
    drops: frozenset[str] = frozenset()
    """Headers that are not passed on."""

    def reset(self, judge: Judge = lambda _: PASS) -> None:
        """Count anew, with another judge."""
        self.judge, self.seen = judge, 0


@contextmanager
def proxy_before(endpoint: str) -> Iterator[Proxy]:
    """A proxy in threads of this process."""
    target, turn, ended = urlsplit(endpoint), threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_expect_100(self) -> bool:
            return True  # the judge is asked before

        def handle_request(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            with turn:
                proxy.seen += 1
                verdict = proxy.judge(Request(proxy.seen, self.command, self.path, headers))
            while callable(verdict):
                verdict = verdict()
            if verdict == HANG:
                ended.wait()
                return
            if "100-continue" in headers.get("expect", ""):
                self.send_response_only(100)
                self.end_headers()
            body = self._body()
            if isinstance(verdict, tuple):
                body = verdict[1] if isinstance(verdict[1], bytes) else _error(*verdict[1:])
                self._answer(verdict[0], {"Content-Type": "application/xml"}, body)
            else:
                passed = {k: v for k, v in headers.items() if k not in _NOT_PASSED_ON and k not in proxy.drops}
                connection = http.client.HTTPConnection(target.hostname or "", target.port)
                connection.request(self.command, self.path, body, passed)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if verdict == LOSE:
                    self.close_connection = True
                else:
                    self._answer(answer.status, dict(answer.getheaders()), content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            with suppress(OSError):  # the client may be gone
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in (*_NOT_PASSED_ON, "content-length"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that was killed

    server = Server(("127.0.0.1", 0), Handler)
    proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _error(code: str, message: str = "as the test asks", extra: str = "") -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message>{extra}</Error>".encode()
