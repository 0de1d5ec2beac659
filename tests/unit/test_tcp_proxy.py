import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import eventually


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EchoConnection)
        self.received: list[bytes] = []
        self.resets = 0


class EchoConnection(socketserver.StreamRequestHandler):
    """Answers every line, so that a request may arrive in pieces."""

    server: EchoServer

    def handle(self) -> None:
        try:
            for line in self.rfile:
                question = line.rstrip(b"\n")
                self.server.received.append(question)
                self.wfile.write(b"echo " + question)
        except ConnectionError:
            self.server.resets += 1


@pytest.fixture
def echo_server() -> Iterator[EchoServer]:
    with EchoServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo_server: EchoServer) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", echo_server.server_address[1]) as proxy:
        yield proxy


def connect(proxy: TcpProxy) -> closing[socket.socket]:
    return closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=5))


def ask(client: socket.socket, question: bytes) -> bytes:
    client.sendall(question + b"\n")
    return client.recv(1024)


def test_answers_pass_through(proxy):
    with connect(proxy) as first, connect(proxy) as second:
        assert ask(first, b"one") == b"echo one"
        assert ask(second, b"two") == b"echo two"
        assert ask(first, b"three") == b"echo three"


def test_connection_closed_by_the_client_is_closed_on_the_server_side_too(proxy, echo_server):
    with connect(proxy) as client:
        ask(client, b"one")

    def is_closed() -> None:
        assert proxy.connection_count == 0

    eventually(is_closed)
    assert echo_server.resets == 0


def test_cut_resets_open_connections_and_lets_new_ones_in(proxy, echo_server):
    with connect(proxy) as client:
        ask(client, b"one")
        proxy.cut()

        with pytest.raises(ConnectionError):
            client.recv(1024)

    def server_was_reset() -> None:
        assert echo_server.resets == 1

    eventually(server_was_reset)
    with connect(proxy) as client:
        assert ask(client, b"two") == b"echo two"


def test_lost_answer_leaves_the_request_done(proxy, echo_server):
    rule = proxy.lose_answer(after_match=rb"COM+IT")
    with connect(proxy) as client:
        assert ask(client, b"UPDATE") == b"echo UPDATE"
        client.sendall(b"COM")
        client.sendall(b"MIT\n")

        with pytest.raises(ConnectionError):
            client.recv(1024)

    assert rule.fired.wait(5)
    assert echo_server.received == [b"UPDATE", b"COMMIT"]
    with connect(proxy) as client:
        assert ask(client, b"COMMIT") == b"echo COMMIT"


def test_held_answer_is_delivered_after_its_release(proxy):
    rule = proxy.hold_answers(after_match=b"one")
    with connect(proxy) as client, connect(proxy) as other:
        client.sendall(b"one\n")
        assert rule.fired.wait(5)
        assert ask(other, b"two") == b"echo two"
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1024)

        client.settimeout(5)
        rule.release()
        assert client.recv(1024) == b"echo one"


def test_refused_connections_are_reset_until_accepted_again(proxy):
    with connect(proxy) as old:
        ask(old, b"one")
        proxy.refuse()
        # The reset may arrive before connect() has returned, or after.
        with pytest.raises(ConnectionError), connect(proxy) as client:
            client.recv(1024)
        assert ask(old, b"two") == b"echo two"

    proxy.accept()
    with connect(proxy) as client:
        assert ask(client, b"three") == b"echo three"


def test_frozen_proxy_delivers_after_the_thaw(proxy, echo_server):
    with connect(proxy) as client:
        ask(client, b"one")
        proxy.freeze()
        client.sendall(b"two\n")
        proxy.thaw()
        assert client.recv(1024) == b"echo two"


def test_close_ends_clients_whose_answer_is_held(echo_server):
    with TcpProxy("127.0.0.1", echo_server.server_address[1]) as proxy:
        client = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
        rule = proxy.hold_answers(after_match=b"one")
        client.sendall(b"one\n")
        assert rule.fired.wait(5)

    with closing(client), pytest.raises(ConnectionError):
        client.recv(1024)
