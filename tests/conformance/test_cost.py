"""What a task costs in statements: none that it does not need."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection
from django.db.backends.signals import connection_created

from firefly_jobs.models import TaskModel
from tests.conformance import tasks
from tests.conformance.support import EFFECTS, TABLE, effects, run_burst

pytestmark = pytest.mark.django_db(transaction=True)

CALLS = 300


@contextmanager
def statements_of_a_consumer() -> Iterator[list[str]]:
    """Collect what this thread's connection and all that are made during the block execute."""
    statements: list[str] = []

    def keep(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        statements.append(sql)
        return execute(sql, params, many, context)

    def watch(connection: Any, **_: Any) -> None:
        # This thread's may be made anew as well.
        if keep not in connection.execute_wrappers:
            connection.execute_wrappers.append(keep)

    connection_created.connect(watch)
    try:
        with connection.execute_wrapper(keep):
            yield statements
    finally:
        connection_created.disconnect(watch)


def test_tasks_without_queries_share_their_statements():
    for _ in range(CALLS):
        tasks.nothing.schedule()

    with statements_of_a_consumer() as statements:
        run_burst()

    assert TaskModel.objects.filter(status="completed").count() == CALLS
    # Mostly a quarter or less; a loaded machine has smaller batches.
    assert 0 < len(statements) < CALLS / 2


def test_a_task_that_inserts_a_row_costs_its_insert_and_one_update():
    for number in range(CALLS):
        tasks.insert.schedule("key", number)

    with statements_of_a_consumer() as statements:
        run_burst()

    assert len(effects()) == CALLS
    inserts = [sql for sql in statements if sql.startswith("INSERT") and EFFECTS in sql]
    assert len(inserts) == CALLS
    completing = [sql for sql in statements if sql.startswith("UPDATE") and TABLE in sql]
    # On SQLite rows are completed past Django, and only claims are left.
    least = 0 if connection.vendor == "sqlite" else CALLS
    assert least <= len(completing) < least + CALLS / 2
    # The claims are the rest.
    assert len(statements) < CALLS * 3
