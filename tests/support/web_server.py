"""A web server of the tests' own, on 127.0.0.1, that does what it is asked to by the path."""

import gzip
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WebServer:
    """A running server.

    Attributes:
        url: Its address, without a slash at the end.
        port: Its port.
        requests: What was asked: method, path, headers with names in lower case, and body.
        gate: Requests for ``/wait`` are answered once it is set.
    """

    def __init__(self, port: int, scheme: str) -> None:
        self.port = port
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.gate = threading.Event()


@contextmanager
def web_server(tls: ssl.SSLContext | None = None) -> Iterator[WebServer]:
    """Serve until the block ends; with ``tls``, over TLS."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            served.requests.append((self.command, self.path, headers, body))
            status, kind, content = self.content()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            if self.path.startswith("/encoded/"):
                self.send_header("Content-Encoding", self.path.rpartition("/")[2])
            if status in {301, 302}:
                self.send_header("Location", f"http://127.0.0.1:{served.port}/json")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer  # noqa: N815 - what the base class looks for

        def content(self) -> tuple[int, str, bytes]:
            path = self.path.partition("?")[0]
            if path == "/wait":
                served.gate.wait(10)
            if path.startswith("/status/"):
                return int(path.rpartition("/")[2]), "text/plain", b"secret"
            if path.startswith("/bytes/"):
                return 200, "text/plain", b"x" * int(path.rpartition("/")[2])
            return {
                "/json": (200, "application/problem+json; charset=utf-8", b'{"a": [1, null]}'),
                "/broken": (200, "application/json", b"{secret"),
                "/latin": (200, "text/plain; charset=latin-1", "é".encode("latin-1")),
                "/encoded/gzip": (200, "text/plain", gzip.compress(b"secret")),
                "/empty": (204, "application/json", b""),
            }.get(path, (200, "text/html", b"hello"))

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's word
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    served = WebServer(server.server_address[1], "https" if tls else "http")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        served.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
