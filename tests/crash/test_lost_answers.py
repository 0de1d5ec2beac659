"""An answer that is lost on the way: what the server did is found out and acted on once."""

import pytest

from firefly_jobs.models import TaskAttempt, TaskModel
from tests.conftest import VENDOR
from tests.crash import tasks
from tests.crash.conftest import (
    Kinds,
    effects,
    nothing_was_spent,
    rows_ended,
    schedule,
    stops_in_order,
)
from tests.support.databases import url_of_test_database

pytestmark = pytest.mark.server

ANNOUNCING: Kinds = {"sync": tasks.write_wait_and_announce, "async": tasks.write_await_and_announce}
WAITING: Kinds = {"sync": tasks.write_then_wait, "async": tasks.write_then_await}
COUNTING: Kinds = {"sync": tasks.count, "async": tasks.acount}

# As a word: every connection to MariaDB begins with "READ COMMITTED".
COMMIT = rb"\bCOMMIT\b"
# How a claim is committed: as one statement where it is one.
CLAIM = {"postgresql": rb"SET status = 'running'", "mysql": COMMIT}[
    VENDOR if VENDOR != "sqlite" else "mysql"
]
# What only the statement contains that settles many.
BATCH = {"postgresql": rb"json_array_elements", "mysql": rb"JSON_TABLE"}[
    VENDOR if VENDOR != "sqlite" else "mysql"
]

# What asks which tables there are.
TABLES = {"postgresql": rb"pg_catalog\.pg_class", "mysql": rb"information_schema\.tables"}[
    VENDOR if VENDOR != "sqlite" else "mysql"
]


@pytest.fixture
def consume_over(consume, database_proxy):
    """Return a function that starts a consumer whose every connection leads over the proxy."""

    def start(*arguments, **options):
        url = url_of_test_database(port=database_proxy.port)
        return consume(*arguments, database_url=url, **options)

    return start


@pytest.mark.parametrize("kind", ANNOUNCING)
def test_commit_whose_answer_was_lost_is_found_out_and_acted_on_once(  # noqa: PLR0917 - fixtures
    consume_over, database_proxy, gate, calls, announced, kind
):
    row = schedule(ANNOUNCING[kind], str(calls), "key", str(gate), str(announced))
    # With one task to do it claims no more, so the next COMMIT is that of the call.
    consumer = consume_over("--max-tasks", "1")
    gate.wait_until_reached()
    rule = database_proxy.lose_answer(after_match=COMMIT)
    gate.open()

    assert consumer.wait() == 0, consumer.output
    assert rule.fired.wait(20)
    row.refresh_from_db()
    assert (row.status, row.fence) == ("completed", 1)
    assert effects() == calls.count() == announced.count() == {"key": 1}
    assert "LeaseLost" not in consumer.output
    assert not TaskAttempt.objects.exists()
    nothing_was_spent()


@pytest.mark.parametrize("kind", ANNOUNCING)
def test_commit_whose_answer_was_lost_is_found_out_when_the_server_is_back(  # noqa: PLR0917 - fixtures
    consume_over, database_proxy, gate, calls, announced, kind
):
    row = schedule(ANNOUNCING[kind], str(calls), "key", str(gate), str(announced))
    consumer = consume_over("--max-tasks", "1")
    gate.wait_until_reached()
    held = database_proxy.hold_answers(after_match=COMMIT)
    gate.open()
    assert held.fired.wait(20.0)
    database_proxy.refuse()
    database_proxy.cut()
    held.release()
    consumer.wait_for_line("interrupted, goes on")

    database_proxy.accept()

    assert consumer.wait() == 0, consumer.output
    row.refresh_from_db()
    assert (row.status, row.fence) == ("completed", 1)
    assert effects() == calls.count() == {"key": 1}
    # The process that was to run it may have lost the chance, but never does it twice.
    assert announced.count()["key"] <= 1
    assert not TaskAttempt.objects.exists()
    nothing_was_spent()


@pytest.mark.parametrize("kind", WAITING)
def test_call_whose_connection_is_cut_runs_again_and_spends_no_retry(
    consume_over, database_proxy, gate, calls, kind
):
    row = schedule(WAITING[kind], str(calls), "key", str(gate))
    consumer = consume_over()
    gate.wait_until_reached()

    database_proxy.cut()
    gate.open()

    rows_ended()
    row.refresh_from_db()
    assert (row.retry_attempts, row.max_retries) == (0, 0)
    assert effects() == {"key": 1}
    assert calls.count() == {"key": 2}
    stops_in_order(consumer)


def test_claim_whose_answer_was_lost_is_released_by_its_owner_and_runs(
    consume_over, database_proxy, calls
):
    rows = [schedule(tasks.count_and_write, str(calls), f"key-{n}") for n in range(3)]
    rule = database_proxy.lose_answer(after_match=CLAIM)

    consumer = consume_over()

    rows_ended()
    assert rule.fired.wait(20)
    consumer.wait_for_line("claimed for this consumer without its knowledge")
    assert effects() == calls.count() == {f"key-{n}": 1 for n in range(3)}
    assert TaskModel.objects.get(pk=rows[0].pk).fence == 2
    nothing_was_spent()
    stops_in_order(consumer)


@pytest.mark.parametrize(
    "step", [TABLES, rb"INTO .firefly_jobs_consumermodel"], ids=["tables", "registration"]
)
def test_consumer_whose_first_steps_get_no_answer_tries_again(consume_over, database_proxy, step):
    schedule(tasks.write, "key")
    rule = database_proxy.lose_answer(after_match=step)

    consumer = consume_over("--max-tasks", "1")

    assert consumer.wait() == 0, consumer.output
    assert rule.fired.is_set()
    assert "Waiting for database" in consumer.output
    assert effects() == {"key": 1}


@pytest.mark.parametrize("kind", COUNTING)
def test_batched_settling_whose_answer_was_lost_completes_each_task_once(
    consume_over, database_proxy, calls, kind
):
    keys = [f"key-{n}" for n in range(20)]
    rows = [schedule(COUNTING[kind], str(calls), key) for key in keys]
    rule = database_proxy.lose_answer(after_match=BATCH)

    consumer = consume_over()

    rows_ended()
    assert rule.fired.wait(20)
    assert calls.count() == dict.fromkeys(keys, 1)
    assert "LeaseLost" not in consumer.output
    fences = TaskModel.objects.filter(pk__in=[row.pk for row in rows]).values_list("fence")
    assert len(fences) == len(rows)
    nothing_was_spent()
    stops_in_order(consumer)


def test_failure_whose_answer_was_lost_is_recorded_once(consume_over, database_proxy, calls):
    schedule(tasks.count_and_fail, str(calls), "key")
    rule = database_proxy.lose_answer(after_match=rb"taskattempt")

    consumer = consume_over()

    rows_ended(status="failed")
    assert rule.fired.wait(20)
    assert calls.count() == {"key": 1}
    assert TaskAttempt.objects.get().outcome == "failed"
    stops_in_order(consumer)
