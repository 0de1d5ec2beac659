"""How the executors of a consumer end."""

import threading
from time import monotonic
from unittest import mock

from firefly_jobs.alone import Alone
from firefly_jobs.executors.threads import SyncLane
from firefly_jobs.holdings import Holdings
from firefly_jobs.slots import Slots


def test_all_stuck_lanes_together_get_the_time_of_one(monkeypatch):
    may_end = threading.Event()
    monkeypatch.setattr(SyncLane, "run", lambda lane: may_end.wait(60))
    holdings = Holdings(may_start=lambda: True, is_low=lambda: None)
    slots = Slots(
        mock.Mock(),
        holdings,
        Alone(lease_seconds=30.0),
        using="default",
        threads=20,
        async_slots=1,
        async_connections=1,
    )
    slots.start()
    began = monotonic()

    slots.stop(timeout_seconds=0.2)

    # One after the other they would take four seconds.
    assert 0.2 <= monotonic() - began < 2.0
    assert slots.has_stuck_calls
    may_end.set()
    slots.stop(timeout_seconds=10.0)
    assert not slots.has_stuck_calls
