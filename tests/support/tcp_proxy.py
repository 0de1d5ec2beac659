"""A TCP proxy on loopback that loses things the way networks do.

It stands between a client and a database server and knows nothing of their
protocols.  What the client has sent since the server last spoke is one
*request*; a rule names a request by a pattern and decides what becomes of its
answer.  The server always gets the request: what is lost is the knowledge that
it was done.
"""

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

CHUNK_BYTES = 65_536
REQUEST_BYTES_MAX = 4 * 1024 * 1024


class Rule:
    """What happens to the answer of the next request in which ``pattern`` is found.

    Attributes:
        fired: Set once the server has answered such a request.
    """

    def __init__(self, pattern: bytes, *, is_lost: bool) -> None:
        self.fired = threading.Event()
        self.is_lost = is_lost
        self._expression = re.compile(pattern, re.DOTALL)
        self._released = threading.Event()

    def release(self) -> None:
        """Deliver the answer that is held."""
        self._released.set()

    def matches(self, request: bytes) -> bool:
        """Return whether the rule is about ``request``."""
        return self._expression.search(request) is not None

    def wait_until_released(self) -> None:
        """Block until :meth:`release`."""
        self._released.wait()


class TcpProxy:
    """Forward connections from ``127.0.0.1:port`` to a server until told otherwise.

    Args:
        server_host: Where the server is.
        server_port: Its port.

    Attributes:
        port: Where clients connect.
    """

    def __init__(self, server_host: str, server_port: int) -> None:
        self._server = (server_host, server_port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._rules: list[Rule] = []
        self._waiting: list[Rule] = []
        self._is_refusing = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._accept_connections, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def connection_count(self) -> int:
        """How many connections are open."""
        with self._lock:
            return len(self._links)

    def cut(self) -> None:
        """Reset every open connection, on both sides.  New ones are accepted."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.reset()

    def refuse(self) -> None:
        """Reset every new connection at once, as long as :meth:`accept` is not called."""
        self._is_refusing = True

    def accept(self) -> None:
        """Accept new connections again."""
        self._is_refusing = False

    def freeze(self) -> None:
        """Deliver nothing in either direction and close nothing, like a cable that is pulled."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Deliver what was frozen, and what follows."""
        self._flowing.set()

    def lose_answer(self, *, after_match: bytes) -> Rule:
        """Lose the server's answer to the next request that matches, and reset that connection.

        Args:
            after_match: A regular expression over what the client sends, for example ``b"COMMIT"``.
        """
        return self._add(Rule(after_match, is_lost=True))

    def hold_answers(self, *, after_match: bytes) -> Rule:
        """Hold the server's answer to the next request that matches, until ``release()``.

        Args:
            after_match: A regular expression over what the client sends.
        """
        return self._add(Rule(after_match, is_lost=False))

    def close(self) -> None:
        """Reset every connection and stop listening."""
        self._is_refusing = True
        # Closing alone would leave the thread waiting in accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5.0)
        self._listener.close()
        self.cut()
        self.thaw()
        with self._lock:
            rules = list(self._rules)
        for rule in rules:
            rule.release()

    def _add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
            self._waiting.append(rule)
        return rule

    def _take_rule(self, request: bytes) -> Rule | None:
        with self._lock:
            for rule in self._waiting:
                if rule.matches(request):
                    self._waiting.remove(rule)
                    return rule
        return None

    def _accept_connections(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = None if self._is_refusing else socket.create_connection(self._server)
            except OSError:
                server = None
            if server is None:
                _reset(client)
                continue
            link = _Link(self, client, server)
            with self._lock:
                self._links.add(link)
            link.start()

    def _forget(self, link: "_Link") -> None:
        with self._lock:
            self._links.discard(link)


class _Link:
    """One client's connection and the connection to the server that belongs to it."""

    def __init__(self, proxy: TcpProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._request = b""
        self._rule: Rule | None = None
        self._lock = threading.Lock()
        self._is_open = True

    def start(self) -> None:
        for pump in (self._pump_requests, self._pump_answers):
            threading.Thread(target=pump, daemon=True).start()

    def reset(self) -> None:
        self._end(_reset)

    def _end(self, end: Callable[[socket.socket], None]) -> None:
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
        self._proxy._forget(self)
        end(self._client)
        end(self._server)

    def _pump_requests(self) -> None:
        try:
            while data := self._client.recv(CHUNK_BYTES):
                self._request = (self._request + data)[-REQUEST_BYTES_MAX:]
                self._rule = self._rule or self._proxy._take_rule(self._request)
                self._proxy._flowing.wait()
                self._server.sendall(data)
            self._end(_finish)
        except OSError:
            self.reset()

    def _pump_answers(self) -> None:
        try:
            while data := self._server.recv(CHUNK_BYTES):
                self._request = b""
                rule, self._rule = self._rule, None
                if rule is not None:
                    rule.fired.set()
                    if rule.is_lost:
                        break
                    rule.wait_until_released()
                self._proxy._flowing.wait()
                self._client.sendall(data)
            else:
                self._end(_finish)
        except OSError:
            pass
        self.reset()


def _finish(connection: socket.socket) -> None:
    """Close with FIN, as the other side did."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN, which ends a blocked ``recv`` in another thread too."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    connection.close()
