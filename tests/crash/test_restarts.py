"""The database server restarts under a busy consumer: nothing is lost, nobody is needed."""

from collections import Counter

import pytest
from django.db import connections, transaction

from firefly_jobs.models import ConsumerModel, TaskModel
from tests.crash import tasks
from tests.crash.conftest import (
    LEASE_SECONDS,
    Kinds,
    consumer_id,
    describe_rows,
    effects,
    nothing_was_spent,
    rows_ended,
    schedule,
    statuses,
    stops_in_order,
    time_passes,
)
from tests.support.databases import private_alias
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

ALIAS = "private"
WAITING: Kinds = {
    "before-its-first-query": tasks.wait_then_write,
    "after-its-first-query": tasks.write_then_wait,
    "coroutine-before-its-first-query": tasks.await_then_write,
    "coroutine-after-its-first-query": tasks.write_then_await,
}


@pytest.fixture(scope="module")
def private_database(_private_server):
    """Return the URL of a database that this module has to itself."""
    return _private_server.create_database()


@pytest.fixture
def server(private_server, private_database, consume):
    """Return the private server, its database empty and open under ``ALIAS``."""
    with private_alias(private_database, alias=ALIAS):
        yield private_server
        forget_connection()
        for model in (TaskModel, ConsumerModel, Effect):
            model.objects.using(ALIAS).all().delete()


@pytest.fixture
def consume_there(server, consume, private_database):
    """Return a function that starts a consumer on the private server."""

    def start(*arguments, **options):
        return consume(*arguments, database_url=private_database, **options)

    return start


def forget_connection():
    connections[ALIAS].close()


def there(task):
    return task.using(database=ALIAS, max_retries=0)


@pytest.mark.parametrize("immediate", [False, True], ids=["orderly", "immediate"])
def test_restart_under_a_busy_consumer_loses_nothing_and_it_goes_on_by_itself(
    server, consume_there, calls, immediate
):
    written = []
    for position in range(40):
        schedule(there(tasks.write_slowly), f"sync-{position}", 0.02)
        schedule(there(tasks.awrite), f"async-{position}")
        schedule(there(tasks.count), str(calls), f"idle-{position}")
        written += [f"sync-{position}", f"async-{position}"]
    consumer = consume_there()

    def is_busy() -> None:
        assert effects(using=ALIAS).total() >= 10

    eventually(is_busy)
    server.restart(immediate=immediate)
    forget_connection()

    rows_ended(using=ALIAS, timeout_seconds=40.0)
    assert effects(using=ALIAS) == Counter(written)
    assert set(calls.count()) == {f"idle-{position}" for position in range(40)}
    assert not TaskModel.objects.using(ALIAS).exclude(retry_attempts=0).exists()
    schedule(there(tasks.write), "afterwards")
    rows_ended(using=ALIAS)
    stops_in_order(consumer)
    assert not ConsumerModel.objects.using(ALIAS).exists()


@pytest.mark.parametrize("immediate", [False, True], ids=["orderly", "immediate"])
def test_restart_in_the_middle_of_calls_runs_them_again_effects_once(
    server, consume_there, gate, calls, immediate
):
    # One sync call at a time, so each has a consumer of its own.
    consumers = []
    for kind, task in WAITING.items():
        schedule(there(task.using(queue=kind)), str(calls), kind, str(gate))
        consumers.append(consume_there("--queue", kind))

    def all_are_waiting() -> None:
        assert set(calls.count()) == set(WAITING)

    eventually(all_are_waiting, timeout_seconds=20.0)
    server.restart(immediate=immediate)
    forget_connection()
    gate.open()

    rows_ended(using=ALIAS, timeout_seconds=40.0)
    assert effects(using=ALIAS) == dict.fromkeys(WAITING, 1)
    assert not TaskModel.objects.using(ALIAS).exclude(retry_attempts=0).exists()
    for consumer in consumers:
        stops_in_order(consumer)


def test_restart_in_the_middle_of_a_call_that_touches_nothing_does_not_repeat_it(
    server, consume_there, gate, calls
):
    schedule(there(tasks.wait), str(calls), "sync", str(gate))
    schedule(there(tasks.await_), str(calls), "async", str(gate))
    consumer = consume_there()

    def both_are_waiting() -> None:
        assert set(calls.count()) == {"sync", "async"}

    eventually(both_are_waiting)
    server.restart(immediate=True)
    forget_connection()
    gate.open()

    rows_ended(using=ALIAS, timeout_seconds=40.0)
    assert calls.count() == {"sync": 1, "async": 1}
    nothing_was_spent(using=ALIAS)
    stops_in_order(consumer)


@pytest.mark.mysql
def test_lock_time_out_that_rolls_everything_back_is_seen_though_it_is_caught(
    server, consume_there
):
    """On a server with ``innodb_rollback_on_timeout`` the effects before it are gone."""
    with transaction.atomic(using=ALIAS):
        locked = Effect.objects.using(ALIAS).create(task_key="locked", value=0)
    row = schedule(there(tasks.write_and_catch_a_lock_time_out), "key", locked.pk)
    with transaction.atomic(using=ALIAS):
        Effect.objects.using(ALIAS).select_for_update().get(pk=locked.pk)
        consumer = consume_there()
        rows_ended(using=ALIAS, status="failed")

    row.refresh_from_db()
    assert "TransactionDoomedError" in row.error
    assert effects(using=ALIAS) == {"locked": 1}
    stops_in_order(consumer)


def test_consumer_that_starts_before_its_server_waits_for_it(server, consume_there):
    row = schedule(there(tasks.write), "key")
    server.stop()
    consumer = consume_there()
    consumer.wait_for_line("Waiting for database")

    server.start()

    forget_connection()
    rows_ended(using=ALIAS)
    assert effects(using=ALIAS) == {"key": 1}
    assert TaskModel.objects.using(ALIAS).get(pk=row.pk).consumer == consumer_id(consumer)
    stops_in_order(consumer)


def test_server_that_is_stopped_for_twice_the_lease_lets_nobody_be_rescued(
    server, consume_there, gate, calls
):
    schedule(there(tasks.wait), str(calls), "key", str(gate))
    consumers = [consume_there() for _ in range(2)]
    ids = {consumer_id(consumer) for consumer in consumers}
    gate.wait_until_reached()

    server.stop()
    time_passes(2 * LEASE_SECONDS)
    server.start()
    forget_connection()

    def all_are_back() -> None:
        rows = ConsumerModel.objects.using(ALIAS).filter(suspected_at__isnull=True)
        assert set(rows.values_list("pk", flat=True)) == ids, describe_rows(using=ALIAS)

    eventually(all_are_back)
    time_passes(2 * LEASE_SECONDS)
    gate.open()
    rows_ended(using=ALIAS)
    assert statuses(using=ALIAS) == {"completed": 1}
    assert calls.count() == {"key": 1}
    nothing_was_spent(using=ALIAS)
    for consumer in consumers:
        assert "Rescued" not in consumer.output
        stops_in_order(consumer)
