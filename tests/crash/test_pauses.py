"""A consumer that sleeps past its lease changes nothing when it wakes; silence is not death."""

import pytest

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
    stops_in_order,
    time_passes,
)
from tests.support.databases import url_of_test_database
from tests.support.waiting import eventually

BEFORE_THE_FIRST_QUERY: Kinds = {"sync": tasks.wait_then_write, "async": tasks.await_then_write}
AFTER_THE_FIRST_QUERY: Kinds = {"sync": tasks.write_then_wait, "async": tasks.write_then_await}
WRITING: Kinds = {"sync": tasks.write, "async": tasks.awrite}

COUNTING: Kinds = {"sync": tasks.count, "async": tasks.acount}


def wakes_up_as_another(paused, former_id, *, after):
    """Wait until ``paused`` has dropped its call and works again, and return its new id."""
    paused.wait_for_line("LeaseLost", after=after)
    new_id = consumer_id(paused, after=after)
    assert new_id != former_id
    return new_id


def can_run_new_tasks(consumer, own_id, kind):
    """Assert that ``consumer``, the only one left, runs a task."""
    row = schedule(WRITING[kind], "new")

    def has_run() -> None:
        row.refresh_from_db()
        assert (row.status, row.consumer) == ("completed", own_id), describe_rows()

    eventually(has_run)
    assert effects()["new"] == 1
    stops_in_order(consumer)


@pytest.mark.parametrize("kind", WRITING)
def test_consumer_stopped_before_its_call_and_rescued_changes_nothing_and_goes_on(consume, kind):
    row = schedule(WRITING[kind], "key")
    paused = consume(checkpoint="executing:stop")
    paused.wait_until_stopped()
    rescuer = consume()
    rows_ended()
    row.refresh_from_db()
    assert row.consumer == consumer_id(rescuer)
    stops_in_order(rescuer)

    printed = len(paused.lines)
    paused.resume()

    new_id = wakes_up_as_another(paused, consumer_id(paused), after=printed)
    ended = TaskModel.objects.get(pk=row.pk)
    assert (ended.fence, ended.completed) == (row.fence, row.completed)
    assert effects() == {"key": 1}
    can_run_new_tasks(paused, new_id, kind)


@pytest.mark.parametrize("kind", COUNTING)
def test_claim_that_was_rescued_before_its_call_started_is_not_called(consume, calls, kind):
    row = schedule(COUNTING[kind], str(calls), "key")
    paused = consume(checkpoint="claimed:stop")
    paused.wait_until_stopped()
    former_id = consumer_id(paused)
    rescuer = consume()
    rows_ended()
    stops_in_order(rescuer)

    printed = len(paused.lines)
    paused.resume()

    assert consumer_id(paused, after=printed) != former_id
    can_run_new_tasks(paused, consumer_id(paused, after=printed), "sync")
    assert TaskModel.objects.get(pk=row.pk).consumer == consumer_id(rescuer)
    assert calls.count() == {"key": 1}


@pytest.mark.parametrize("kind", WRITING)
def test_consumer_paused_inside_its_call_before_the_first_query_changes_nothing(
    consume, gate, calls, kind
):
    row = schedule(BEFORE_THE_FIRST_QUERY[kind], str(calls), "key", str(gate))
    paused = consume()
    gate.wait_until_reached()
    paused.pause()
    gate.open()
    rescuer = consume()
    rows_ended()
    stops_in_order(rescuer)
    assert calls.count() == {"key": 2}

    printed = len(paused.lines)
    paused.resume()

    new_id = wakes_up_as_another(paused, consumer_id(paused), after=printed)
    ended = TaskModel.objects.get(pk=row.pk)
    assert ended.consumer == consumer_id(rescuer)
    assert ended.rescues == 1
    assert ended.retry_attempts == 0
    assert effects() == {"key": 1}
    can_run_new_tasks(paused, new_id, kind)


@pytest.mark.server
@pytest.mark.parametrize("kind", WRITING)
def test_consumer_paused_with_its_transaction_open_changes_nothing(consume, gate, calls, kind):
    row = schedule(AFTER_THE_FIRST_QUERY[kind], str(calls), "key", str(gate))
    paused = consume()
    gate.wait_until_reached()
    paused.pause()
    gate.open()
    rescuer = consume()
    rows_ended()
    stops_in_order(rescuer)
    assert effects() == {"key": 1}

    printed = len(paused.lines)
    paused.resume()

    new_id = wakes_up_as_another(paused, consumer_id(paused), after=printed)
    assert TaskModel.objects.get(pk=row.pk).consumer == consumer_id(rescuer)
    assert effects() == {"key": 1}
    can_run_new_tasks(paused, new_id, kind)


def test_consumer_paused_while_its_outcome_waits_for_the_settler_changes_nothing(consume, calls):
    row = schedule(tasks.count, str(calls), "key")
    paused = consume(checkpoint="called:stop")
    paused.wait_until_stopped()
    rescuer = consume()
    rows_ended()
    stops_in_order(rescuer)
    completed = TaskModel.objects.get(pk=row.pk).completed

    printed = len(paused.lines)
    paused.resume()

    new_id = wakes_up_as_another(paused, consumer_id(paused), after=printed)
    ended = TaskModel.objects.get(pk=row.pk)
    assert (ended.consumer, ended.completed) == (consumer_id(rescuer), completed)
    can_run_new_tasks(paused, new_id, "sync")


@pytest.mark.sqlite
def test_consumer_paused_between_outcome_and_commit_keeps_its_task(consume):
    """It has locked the file, so nobody can take the task over."""
    other = consume("--queue", "another")
    consumer_id(other)
    row = schedule(tasks.write, "key")
    paused = consume(checkpoint="settling:stop")
    paused.wait_until_stopped()
    time_passes(3 * LEASE_SECONDS)
    assert TaskModel.objects.get(pk=row.pk).status == "running"

    paused.resume()

    rows_ended()
    ended = TaskModel.objects.get(pk=row.pk)
    assert (ended.consumer, ended.fence, ended.rescues) == (consumer_id(paused), 1, 0)
    assert effects() == {"key": 1}
    stops_in_order(other)
    stops_in_order(paused)


@pytest.mark.server
def test_consumer_paused_between_outcome_and_commit_does_not_keep_its_task_for_ever(consume):
    """Its session has locked the row; ending that session is part of the rescue."""
    row = schedule(tasks.write, "key")
    paused = consume(checkpoint="settling:stop")
    paused.wait_until_stopped()
    former_id = consumer_id(paused)
    assert TaskModel.objects.get(pk=row.pk).status == "running"
    other = consume()
    rows_ended()
    assert TaskModel.objects.get(pk=row.pk).consumer == consumer_id(other)
    assert effects() == {"key": 1}
    stops_in_order(other)

    printed = len(paused.lines)
    paused.resume()

    new_id = consumer_id(paused, after=printed)
    assert new_id != former_id
    assert effects() == {"key": 1}
    can_run_new_tasks(paused, new_id, "sync")


def test_rows_claimed_by_a_consumer_that_does_not_know_it_was_rescued_are_run(consume):
    """Its claim was on the way while others took it, holding nothing, for dead."""
    schedule(tasks.write, "key")
    paused = consume(checkpoint="claiming:stop")
    paused.wait_until_stopped()
    former_id = consumer_id(paused)
    rescuer = consume("--queue", "another")

    def is_forgotten() -> None:
        assert not ConsumerModel.objects.filter(pk=former_id).exists()

    eventually(is_forgotten)

    paused.resume()

    rows_ended()
    assert effects() == {"key": 1}
    stops_in_order(rescuer)
    stops_in_order(paused)


@pytest.mark.sqlite
@pytest.mark.parametrize("kind", WRITING)
def test_task_that_holds_the_write_lock_for_twice_the_lease_is_not_rescued(
    consume, gate, calls, kind
):
    worker, other = consume(), consume()
    ids = {consumer_id(worker), consumer_id(other)}
    schedule(AFTER_THE_FIRST_QUERY[kind], str(calls), "key", str(gate))
    gate.wait_until_reached()

    time_passes(2 * LEASE_SECONDS)
    gate.open()

    rows_ended()
    time_passes(2 * LEASE_SECONDS)
    assert calls.count() == effects() == {"key": 1}
    assert set(ConsumerModel.objects.values_list("pk", flat=True)) == ids
    nothing_was_spent()
    for consumer in (worker, other):
        assert "Rescued" not in consumer.output
        stops_in_order(consumer)


@pytest.mark.sqlite
def test_consumer_paused_with_the_write_lock_cannot_be_rescued_and_completes(consume, gate, calls):
    schedule(tasks.write_then_wait, str(calls), "key", str(gate))
    paused = consume()
    gate.wait_until_reached()
    paused.pause()
    other = consume()
    gate.open()
    time_passes(3 * LEASE_SECONDS)

    paused.resume()

    rows_ended()
    assert calls.count() == effects() == {"key": 1}
    for consumer in (paused, other):
        consumer_id(consumer)
        stops_in_order(consumer)


@pytest.mark.server
def test_database_that_is_away_for_twice_the_lease_lets_nobody_be_rescued(
    consume, database_proxy, gate, calls
):
    url = url_of_test_database(port=database_proxy.port)
    schedule(tasks.wait, str(calls), "sync", str(gate))
    schedule(tasks.await_, str(calls), "async", str(gate))
    consumers = [consume(database_url=url) for _ in range(2)]
    ids = {consumer_id(consumer) for consumer in consumers}

    def both_are_running() -> None:
        assert set(calls.count()) == {"sync", "async"}

    eventually(both_are_running)

    database_proxy.refuse()
    database_proxy.cut()
    time_passes(2 * LEASE_SECONDS)
    for consumer in consumers:
        consumer.wait_for_line("Heartbeat failed")
    database_proxy.accept()

    def all_are_back() -> None:
        late = ConsumerModel.objects.filter(suspected_at__isnull=False)
        assert not late.exists()
        assert set(ConsumerModel.objects.values_list("pk", flat=True)) == ids

    eventually(all_are_back)
    time_passes(2 * LEASE_SECONDS)
    gate.open()
    rows_ended()
    assert calls.count() == {"sync": 1, "async": 1}
    assert set(ConsumerModel.objects.values_list("pk", flat=True)) == ids
    nothing_was_spent()
    for consumer in consumers:
        assert "Rescued" not in consumer.output
        stops_in_order(consumer)
