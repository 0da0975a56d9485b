"""An HTTP proxy in front of an S3 server that breaks chosen requests in chosen ways."""

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("503", "reset", "cut_request", "lost_answer", "cut_answer", "slow_answer")
"""Answered with this status; connection reset before the request is forwarded; half of its body is
forwarded, then both connections are reset; all of it is forwarded and the answer thrown away; the
answer ends in the middle of its body; the body of the answer comes late."""
DEAF = "deaf"
"""One more: the connection stands, but of the body not a byte is taken."""
BROKEN = struct.pack("ii", 1, 0)
"""SO_LINGER: close with a reset."""


@dataclass
class Rule:
    """Break requests whose method and path match: after `skip` of them every `every`-th, until
    `times` were broken."""

    fault: str
    method: str = ".*"
    path: str = ".*"
    times: int = 1
    every: int = 1
    skip: int = 0
    matched: int = 0
    hits: int = 0

    def breaks(self, method: str, path: str) -> bool:
        """Whether this request is one of them; counts it."""
        if not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        place = self.matched - self.skip
        chosen = place >= 0 and place % self.every == 0 and self.hits < self.times
        self.matched += 1
        self.hits += chosen
        return chosen


@dataclass
class Proxy:
    """Where it listens, what it breaks, what it saw."""

    endpoint: str
    upstream: str
    """Host and port of the server behind."""
    rules: list[Rule] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    delay: float = 5.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, method: str, path: str) -> str:
        """The fault for a request, or "" for none."""
        with self.lock:
            self.seen.append((method, path))
            broken = [rule.fault for rule in self.rules if rule.breaks(method, path)]
        return broken[0] if broken else ""

    def set(self, *rules: Rule) -> None:
        """Other rules from here on, and an empty log."""
        with self.lock:
            self.rules, self.seen = list(rules), []

    @property
    def hits(self) -> int:
        """Requests broken so far."""
        return sum(rule.hits for rule in self.rules)


@contextmanager
def proxy_to(endpoint: str) -> Iterator[Proxy]:
    """A proxy in front of `endpoint`, on a port of its own."""
    server = _Server(("127.0.0.1", 0), _Handler)
    proxy = Proxy(f"http://127.0.0.1:{server.server_port}", endpoint.removeprefix("http://"))
    server.proxy = proxy
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: Proxy

    def handle_error(self, *_: object) -> None:
        """Connections break here by design."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms for the headers' receipt

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        assert isinstance(self.server, _Server)
        proxy = self.server.proxy
        fault = proxy.take(self.command, self.path)
        if fault == DEAF:
            time.sleep(proxy.delay * 5)
        if fault in ("reset", DEAF):
            self.reset()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault.isdigit():
            self.answer(int(fault), [], b"")
            return
        upstream = http.client.HTTPConnection(proxy.upstream, timeout=60)
        try:
            self.forward(upstream, body, proxy, fault)
        except OSError:  # the client, or the server, went away
            self.close_connection = True
        finally:
            upstream.close()

    def forward(
        self, upstream: http.client.HTTPConnection, body: bytes, proxy: Proxy, fault: str
    ) -> None:
        upstream.putrequest(self.command, self.path, True, True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):  # the proxy's own business
                upstream.putheader(name, value)
        upstream.endheaders()
        if fault == "cut_request":
            upstream.send(body[: len(body) // 2])
            upstream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, BROKEN)
            self.reset()
            return
        upstream.send(body)
        response = upstream.getresponse()
        content = response.read()
        if fault == "lost_answer":
            self.reset()
            return
        half = len(content) // 2
        cut, pause = fault == "cut_answer", proxy.delay if fault == "slow_answer" else 0
        self.answer(response.status, response.getheaders(), content, cut and half, pause)
        if cut:
            self.reset()

    def answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        cut: int = 0,
        pause: float = 0,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        stated = dict((n.lower(), v) for n, v in headers).get("content-length")
        length = stated if self.command == "HEAD" and stated else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.flush()
        time.sleep(pause if content and self.command != "HEAD" else 0)
        self.wfile.write(content[:cut] if cut else content)
        self.wfile.flush()

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, BROKEN)
        self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any
