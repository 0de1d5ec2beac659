"""Run rows through the real consumer, look from a second connection, provoke what goes wrong.

Nothing here stands in for the database or the consumer.  What is vendor-specific about
provoking a lock or counting reads stands here, so that the tests read the same on every
database.
"""

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any
from unittest import mock

import pytest
from asgiref.sync import async_to_sync
from django.db import connection, connections, transaction
from django.db.models import Model
from django.utils import timezone

from firefly_jobs import lifecycle
from firefly_jobs.attempts import Claim
from firefly_jobs.claiming import Claimer
from firefly_jobs.consumer import Consumer
from firefly_jobs.models import ConsumerModel, TaskModel
from tests.conformance import tasks
from tests.conftest import VENDOR
from tests.factories import unique_name
from tests.support.threads import Concurrent
from tests.support.waiting import eventually
from tests.testapp.models import Effect

TABLE = TaskModel._meta.db_table
EFFECTS = Effect._meta.db_table
CLAIM_INDEX = "firefly_claim"

on_servers = [pytest.mark.postgresql, pytest.mark.mysql]


# --- scheduling and consuming


def schedule(
    body: Callable[..., Any], *args: Any, atomic: bool = True, **options: Any
) -> TaskModel:
    """Schedule a call of ``body``, a function or coroutine function, as a task.

    Args:
        body: What the consumer calls; it must be run by a consumer of this process.
        args: Arguments for ``body``.
        atomic: Whether in the task's transaction.
        options: As for ``task.using()``.
    """
    key = unique_name(body.__name__)
    tasks.BODIES[key] = body
    if inspect.iscoroutinefunction(body):
        acall = tasks.acall if atomic else tasks.acall_in_autocommit
        return async_to_sync(acall.using(**options).schedule)(key, *args)
    call = tasks.call if atomic else tasks.call_in_autocommit
    return call.using(**options).schedule(key, *args)


def run_burst(*queues: str, **options: Any) -> int:
    """Run a consumer until nothing is due, and return its exit code."""
    return Consumer(list(queues) or None, burst=True, **options).run()


def run_one(body: Callable[..., Any], **options: Any) -> TaskModel:
    """Run ``body`` as a task and return its row."""
    row = schedule(body, **options)
    run_burst()
    row.refresh_from_db()
    return row


@contextmanager
def running(consumer: Consumer) -> Iterator[Concurrent[int]]:
    """Run ``consumer`` in a thread of its own; stop it when the block ends, however it does.

    One that was left behind would take the tasks of every test after this one.
    """
    exit_code = Concurrent(consumer.run)
    try:
        yield exit_code
    finally:
        consumer.stop()
        exit_code.result(timeout_seconds=60)


@contextmanager
def consuming(*queues: str, **options: Any) -> Iterator[Consumer]:
    """Run a new consumer in a thread of its own during the block."""
    consumer = Consumer(list(queues) or None, **options)
    with running(consumer):
        yield consumer


def run_until(
    condition: Callable[[], object], *, timeout_seconds: float = 20.0, **options: Any
) -> None:
    """Run a consumer until ``condition`` asserts nothing false any more."""
    with consuming(**options):
        eventually(condition, timeout_seconds=timeout_seconds)


def run_until_ended(*rows: TaskModel, timeout_seconds: float = 20.0, **options: Any) -> None:
    """Run a consumer until all ``rows`` have ended, and read them again."""

    def all_ended() -> None:
        for row in rows:
            row.refresh_from_db()
            assert TaskModel.Status(row.status).is_terminal, (row.status, row.error)

    run_until(all_ended, timeout_seconds=timeout_seconds, **options)


def claim(*queues: str, limit: int = 100, consumer: int = 1) -> list[Claim]:
    """Claim as a consumer that has just started would."""
    return Claimer(list(queues) or ["default"], using="default").claim(limit, consumer=consumer)


def claim_one(consumer: int = 1) -> Claim:
    """Claim the one row that is due."""
    (claimed,) = claim(consumer=consumer)
    return claimed


def take_over(held: Claim, *, consumer: int = 2) -> Claim:
    """Let another consumer hold the row of ``held``, under a new fence."""
    assert lifecycle.release([held], using="default") == 1
    return claim_one(consumer)


def outcomes(row: TaskModel) -> list[str]:
    """Return how the attempts of ``row`` ended that are kept as history."""
    return list(row.attempts.values_list("outcome", flat=True))


def effects() -> list[int]:
    """Return the values of all effects, in order."""
    return list(Effect.objects.order_by("id").values_list("value", flat=True))


def undone(work: Callable[[], object]) -> None:
    """Do ``work`` in an inner block that fails.

    Raises:
        LookupError: Always.
    """
    with transaction.atomic():
        work()
        raise LookupError


# --- rows planted with SQL


def plant(
    count: int,
    *,
    queue: str = "default",
    priority: int = 0,
    status: str = "created",
    due: datetime | None = None,
) -> None:
    """Insert ``count`` rows of ``tasks.nothing`` with one statement.

    Args:
        count: How many.
        queue: Their queue.
        priority: Their priority.
        status: Their status.
        due: Their ``not_before``; ``None`` for now.
    """
    columns: dict[str, Any] = {
        "func_name": tasks.nothing.name,
        "params": tasks.nothing.row((), {}).raw_params,
        "queue": queue,
        "priority": priority,
        "status": status,
        "not_before": connection.ops.adapt_datetimefield_value(due),
    }
    zeros = ["retry_attempts", "retry_delay", "max_retries", "fence", "rescues", "lost_alone"]
    digits = " UNION ALL ".join(f"SELECT {digit} AS d" for digit in range(10))
    numbers = " CROSS JOIN ".join(f"({digits}) d{place}" for place in range(len(str(count))))
    values = ["%s"] * len(columns) + ["0"] * len(zeros)
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {TABLE} ({', '.join([*columns, *zeros])}) "
            f"SELECT {', '.join(values)} FROM {numbers} LIMIT {count}",
            list(columns.values()),
        )


def analyze(*models: type[Model]) -> None:
    """Let the planner know what is in some tables, by default that of tasks."""
    word = "ANALYZE TABLE" if VENDOR == "mysql" else "ANALYZE"
    with connection.cursor() as cursor:
        for model in models or (TaskModel,):
            cursor.execute(f"{word} {model._meta.db_table}")


def ago(seconds: float) -> datetime:
    """Return a moment in the past; negative seconds are in the future."""
    return timezone.now() - timedelta(seconds=seconds)


def dead_consumer(*, name: str = "gone", lease_seconds: float = 1.0) -> ConsumerModel:
    """Write the row of a consumer that has not renewed its lease for an hour."""
    row = ConsumerModel.objects.create(name=name, queues="default", lease_seconds=lease_seconds)
    ConsumerModel.objects.filter(pk=row.pk).update(renewed_at=ago(3600))
    row.refresh_from_db()
    return row


# --- a second connection


@contextmanager
def second_connection(*, timeout_seconds: float | None = None) -> Iterator[Any]:
    """Return another connection to the test database, in autocommit mode.

    Args:
        timeout_seconds: On SQLite, how long it waits for a lock.
    """
    other: Any = connections["default"].copy()
    if VENDOR == "sqlite" and timeout_seconds is not None:
        other.settings_dict["OPTIONS"]["timeout"] = timeout_seconds
    other.inc_thread_sharing()
    try:
        yield other
    finally:
        other.close()


def query(on: Any, sql: str, *params: Any) -> list[Any]:
    """Execute a statement on a connection and return its rows, if it has any."""
    with on.cursor() as cursor:
        cursor.execute(sql, params)
        return list(cursor.fetchall()) if cursor.description else []


def outside(function: Callable[..., Any], *args: Any) -> Any:
    """Return what ``function`` returns on another thread, which has its own connections."""
    return Concurrent(function, *args).result()


def status_seen_outside(row: TaskModel) -> str:
    """Return the committed status of ``row``, whatever this thread's transaction sees."""

    def read() -> str:
        return TaskModel.objects.values_list("status", flat=True).get(pk=row.pk)

    return str(outside(read))


@contextmanager
def locked_by_another(effect: Effect) -> Iterator[None]:
    """Let another connection hold the lock of ``effect``: on SQLite, of the whole database."""
    with second_connection() as other:
        other.set_autocommit(False)
        try:
            query(other, f"UPDATE {EFFECTS} SET note = 'locked' WHERE id = {effect.pk}")
            yield
        finally:
            other.rollback()
            other.set_autocommit(True)


@contextmanager
def impatient_connections() -> Iterator[None]:
    """Let SQLite connections that are opened in this block wait briefly for a lock."""
    options = connections.settings["default"].get("OPTIONS", {})
    if VENDOR != "sqlite":
        yield
        return
    with mock.patch.dict(options, {"timeout": 0.1}):
        connections["default"].close()
        yield
    connections["default"].close()


@contextmanager
def repeatable_reads() -> Iterator[None]:
    """Let connections that are opened in this block see one snapshot in each transaction."""
    level: Any = "repeatable read"
    if VENDOR == "postgresql":
        from django.db.backends.postgresql.psycopg_any import IsolationLevel

        level = IsolationLevel.REPEATABLE_READ
    options = connections.settings["default"].setdefault("OPTIONS", {})
    with mock.patch.dict(options, {"isolation_level": level}):
        connections["default"].close()
        connections["default"].__dict__.pop("isolation_level", None)
        yield
    connections["default"].close()


def update_impatiently(effect: Effect) -> None:
    """Update ``effect`` on this thread's connection; raise soon if it is locked.

    On SQLite connections must be impatient already.
    """
    if VENDOR == "postgresql":
        query(connection, "SET LOCAL lock_timeout = '50ms'")
    elif VENDOR == "mysql":
        query(connection, "SET innodb_lock_wait_timeout = 1")
    Effect.objects.filter(pk=effect.pk).update(note="updated")


def session_id(on: Any) -> int:
    """Return the server's id of a connection's session, without asking the server."""
    if VENDOR == "postgresql":
        return int(on.connection.info.backend_pid)
    return int(on.connection.thread_id())


def holds_transaction(session: int) -> bool:
    """Whether the server's session has an open transaction, as another session sees it."""
    sql = {
        "postgresql": "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND xact_start IS NOT NULL",
        "mysql": "SELECT 1 FROM information_schema.innodb_trx WHERE trx_mysql_thread_id = %s",
    }[VENDOR]
    _let_innodb_look()
    with second_connection() as other:
        return bool(query(other, sql, session))


def assert_waits_for_lock(session: int) -> None:
    """Assert that the server's session waits for a lock."""
    sql = {
        "postgresql": "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'",
        "mysql": "SELECT 1 FROM information_schema.innodb_trx "
        "WHERE trx_mysql_thread_id = %s AND trx_state = 'LOCK WAIT'",
    }[VENDOR]
    _let_innodb_look()
    with second_connection() as other:
        assert query(other, sql, session), "it does not wait for a lock"


def _let_innodb_look() -> None:
    # Its list of transactions is a copy, renewed only if nobody has read it for 0.1 s.
    if VENDOR == "mysql":
        threading.Event().wait(0.12)


def deadlock(mine: Effect, theirs: Effect) -> None:
    """Run into a real deadlock on this thread's connection, of which it is the victim.

    Raises:
        OperationalError: What the database says to the victim.
    """
    has_locked = threading.Event()
    sessions: list[int] = []

    def cross() -> None:
        with transaction.atomic():
            if VENDOR == "postgresql":
                query(connection, "SET LOCAL deadlock_timeout = '1min'")
            # InnoDB ends the transaction that has changed less.
            Effect.objects.bulk_create([Effect(task_key="weight", value=0) for _ in range(200)])
            Effect.objects.filter(pk=theirs.pk).update(note="theirs")
            sessions.append(session_id(connection))
            has_locked.set()
            Effect.objects.filter(pk=mine.pk).update(note="theirs")
            transaction.set_rollback(True)

    if VENDOR == "postgresql":
        query(connection, "SET LOCAL deadlock_timeout = '10ms'")
    Effect.objects.filter(pk=mine.pk).update(note="mine")
    crossing = Concurrent(cross)
    assert has_locked.wait(10)
    eventually(lambda: assert_waits_for_lock(sessions[0]))
    try:
        # Not by the ORM, which would mark the transaction for rollback.
        query(connection, f"UPDATE {EFFECTS} SET note = 'mine' WHERE id = {theirs.pk}")
    finally:
        if VENDOR == "mysql":
            crossing.result()


def prepare_deadlock() -> tuple[Effect, Effect]:
    """Create the two rows over which :func:`deadlock` is fought."""
    mine, theirs = (Effect.objects.create(task_key=f"deadlock-{n}", value=0) for n in range(2))
    return mine, theirs


class Watch:
    """Look at tasks and their effects from a second connection, over and over.

    An effect belongs to the task whose id is its ``value``.  Tasks must have ``expected``
    effects once they are completed, and none in every other state.
    """

    def __init__(self, *, expected: int = 1) -> None:
        self._expected = expected
        self._stopping = threading.Event()
        self.violations: list[Any] = []
        self.looks = 0

    def __enter__(self) -> "Watch":
        self._looking = Concurrent(self._look)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._looking.result()

    def _look(self) -> None:
        sql = (
            f"SELECT t.id, t.status, COUNT(e.id) FROM {TABLE} t "
            f"LEFT JOIN {EFFECTS} e ON e.value = t.id GROUP BY t.id, t.status"
        )
        with second_connection() as other:
            while True:
                is_last = self._stopping.is_set()
                for task_id, status, count in query(other, sql):
                    if count != (self._expected if status == "completed" else 0):
                        self.violations.append((task_id, status, count))
                self.looks += 1
                if is_last:
                    return


# --- what a statement costs


@contextmanager
def captured_statements() -> Iterator[list[tuple[str, Any]]]:
    """Collect what this thread's connection executes, as ``(sql, params)``."""
    statements: list[tuple[str, Any]] = []

    def keep(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        statements.append((sql, params))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(keep):
        yield statements


def about_tasks(statements: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Leave out what is not about the table of tasks: savepoints and the like."""
    return [(sql, params) for sql, params in statements if TABLE in sql]


def indexes_used(sql: str, params: Any) -> set[str]:
    """Return the indexes that the database plans to use for reading rows of tasks."""
    if VENDOR == "postgresql":
        (((plan,),),) = query(connection, f"EXPLAIN (FORMAT JSON) {sql}", *params)
        return {node["Index Name"] for node in _nodes(plan["Plan"]) if "Index Name" in node}
    if VENDOR == "mysql":
        rows = query(connection, f"EXPLAIN {sql}", *params)
        return {row[5] for row in rows if row[5]}
    rows = query(connection, f"EXPLAIN QUERY PLAN {sql}", *params)
    details = [row[3] for row in rows]
    assert not any(detail.startswith("SCAN") for detail in details), details
    return {word for detail in details for word in detail.split() if word.startswith("firefly_")}


def rows_read(sql: str, params: Any) -> int:
    """Execute a statement, undo it, and return how many rows or index entries it read.

    On SQLite, which does not count them, a twentieth of the virtual machine's steps:
    a claimed row takes about that many.
    """
    with transaction.atomic():
        try:
            return _rows_read(sql, params)
        finally:
            transaction.set_rollback(True)


def _rows_read(sql: str, params: Any) -> int:
    if VENDOR == "postgresql":
        ((answer,),) = query(connection, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", *params)
        (plan,) = json.loads(answer) if isinstance(answer, str) else answer
        return int(
            max(
                node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
                for node in _nodes(plan["Plan"])
            )
        )
    if VENDOR == "mysql":
        # Reading the counters reads a table in memory, row by row, and counts itself.
        first = _handler_reads()
        before = _handler_reads()
        query(connection, sql, *params)
        return _handler_reads() - before - (before - first)
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 20
        return 0

    connection.connection.set_progress_handler(count, 20)
    try:
        query(connection, sql, *params)
    finally:
        connection.connection.set_progress_handler(None, 0)
    return steps // 20


def _handler_reads() -> int:
    rows = query(connection, "SHOW SESSION STATUS LIKE 'Handler_read%%'")
    return sum(int(value) for _, value in rows)


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", []):
        yield from _nodes(below)


# --- coroutines


class Gate:
    """Coroutines wait here until any thread opens it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_open = False
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def wait(self) -> None:
        """Wait until the gate is open."""
        event = asyncio.Event()
        with self._lock:
            if self._is_open:
                return
            self._waiting.append((asyncio.get_running_loop(), event))
        await event.wait()

    def open(self) -> None:
        """Let everybody through, now and later."""
        with self._lock:
            self._is_open = True
            waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            loop.call_soon_threadsafe(event.set)
