"""The announcer's thread, without a server; what others hear is in ``conformance``."""

import threading
from unittest import mock

from firefly_jobs import databases, wakeup
from tests.support.threads import Concurrent
from tests.support.waiting import eventually


class Recorder:
    """A database that is told names and keeps them."""

    def __init__(self):
        self.sent = []

    def notify(self, connection, notices):
        self.sent.append([notice.text for notice in notices])


def test_what_is_announced_while_a_flush_closes_the_connection_is_sent():
    database = Recorder()
    is_closing, may_close = threading.Event(), threading.Event()

    def close(connection):
        is_closing.set()
        assert may_close.wait(10)

    with (
        mock.patch.object(databases, "of", return_value=database),
        mock.patch.object(wakeup._Announcer, "_close", lambda _, connection: close(connection)),
    ):
        announcer = wakeup._Announcer("default")
        announcer.add({"first"})
        eventually(lambda: sent_are(database, [["first"]]))
        flush = Concurrent(announcer.flush, 10.0)
        assert is_closing.wait(10)
        announcer.add({"second"})
        may_close.set()
        flush.result()

        assert database.sent == [["first"], ["second"]]
        announcer.add({"second"})
        eventually(lambda: sent_are(database, [["first"], ["second"], ["second"]]))
        announcer.flush(10.0)


def sent_are(database, expected):
    assert database.sent == expected
