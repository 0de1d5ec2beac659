"""A consumer that retires makes way without losing work, and tells its supervisor."""

import threading

import pytest

from firefly_jobs import Consumer
from firefly_jobs.control import Link
from firefly_jobs.models import ConsumerModel, TaskModel
from tests.conformance import tasks
from tests.conformance.support import consuming, run_burst, running, schedule
from tests.support.waiting import eventually

pytestmark = pytest.mark.django_db(transaction=True)


class Told(Link):
    """A link that keeps what it is told."""

    def __init__(self):
        self.consumers: list[int] = []
        self.reasons: list[str] = []

    def registered(self, consumer):
        self.consumers.append(consumer)

    def retiring(self, reason):
        self.reasons.append(reason)


def statuses(rows):
    return list(
        TaskModel.objects.filter(pk__in=[row.pk for row in rows])
        .order_by("pk")
        .values_list("status", flat=True)
    )


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_retiring_gives_back_what_waits_and_lets_running_calls_end_without_a_limit(kind):
    started, may_end = threading.Event(), threading.Event()

    def slow():
        started.set()
        assert may_end.wait(20)

    async def aslow():
        slow()

    for _ in range(50):
        tasks.nothing.schedule()
    calling = schedule(slow if kind == "sync" else aslow)
    later = [tasks.nothing.schedule() for _ in range(5)]
    told = Told()
    consumer = Consumer(shutdown_timeout=0, link=told)
    with running(consumer) as exit_code:
        assert started.wait(20)
        if kind == "async":
            # The lane goes on beside the coroutine, so let it run dry.
            eventually(lambda: _assert(statuses(later) == ["completed"] * 5))

        consumer.retire("a test")

        eventually(lambda: _assert(told.reasons == ["a test"]))
        expected = ["completed" if kind == "async" else "created"] * 5
        eventually(lambda: _assert(statuses(later) == expected))
        more = tasks.nothing.schedule()
        may_end.set()
        assert exit_code.result(timeout_seconds=20) == 0
    assert statuses([calling]) == ["completed"]
    assert statuses([more]) == ["created"]
    assert not TaskModel.objects.exclude(rescues=0, retry_attempts=0).exists()
    assert not ConsumerModel.objects.exists()


def _assert(fact):
    assert fact


def test_retiring_after_max_tasks_is_told_once():
    for _ in range(5):
        tasks.nothing.schedule()
    told = Told()

    run_burst(max_tasks=3, link=told)

    assert told.reasons == ["max-tasks"]
    assert TaskModel.objects.filter(status="completed").count() == 3
    assert TaskModel.objects.filter(status="created").count() == 2


def test_burst_that_finds_nothing_due_does_not_retire():
    told = Told()

    run_burst(max_tasks=3, link=told)

    assert told.reasons == []
    assert len(told.consumers) == 1


def test_consumer_that_registers_anew_tells_its_new_id(jobs):
    jobs(LEASE_SECONDS=0.3)
    told = Told()
    with consuming(link=told):
        first = eventually(ConsumerModel.objects.get)
        former = first.pk
        first.delete()

        second = eventually(ConsumerModel.objects.get)
        eventually(lambda: _assert(told.consumers == [former, second.pk]))
