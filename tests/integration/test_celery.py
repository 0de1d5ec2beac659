"""The bridge to Celery, with real workers on Redis and on RabbitMQ."""

import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command

from firefly_jobs import Job, group, lifecycle
from firefly_jobs.attempts import Claim
from firefly_jobs.contrib.celery import CeleryIntegrationJob, CeleryJob, install
from firefly_jobs.contrib.celery import app as bridge
from firefly_jobs.contrib.celery import jobs as celery_jobs
from firefly_jobs.contrib.celery.consume import CeleryConsumer
from firefly_jobs.contrib.celery.worker import execute
from firefly_jobs.models import ConsumerModel, TaskAttempt, TaskModel
from tests.conformance.support import (
    ago,
    claim_one,
    consuming,
    effects,
    outcomes,
    run_burst,
    running,
)
from tests.conftest import StartConsumer
from tests.support.brokers import RABBITMQ, REDIS, Broker
from tests.support.celery_app import BROKER, QUEUE, add, fail, make_app, note, wait_for
from tests.support.celery_worker import CeleryWorker
from tests.support.threads import Concurrent
from tests.support.waiting import eventually
from tests.testapp import tasks

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.redis]

PATIENCE = 30.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """A broker with a worker that listens on a queue of this run's own."""

    app: Celery
    worker: CeleryWorker
    broker: str
    queue: str

    @property
    def environment(self) -> dict[str, str]:
        """What a consumer in a process of its own needs to know."""
        return {BROKER: self.broker, QUEUE: self.queue}


@contextmanager
def _cluster(broker: Broker, *, pool: str) -> Iterator[Cluster]:
    queue = f"firefly-tests-{uuid.uuid4().hex[:12]}"
    with CeleryWorker(broker.url, queue, pool=pool) as worker:
        worker.wait_until_ready()
        app = make_app(broker.url, queue)
        yield Cluster(app, worker, broker.url, queue)
        app.close()
    with redis.Redis.from_url(REDIS.url) as client:
        if keys := list(client.scan_iter(match=f"{queue}*")):
            client.delete(*keys)


@pytest.fixture(scope="module")
def _redis(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock(), _cluster(REDIS, pool="solo") as found:
        yield found


@pytest.fixture(scope="module")
def _rabbitmq(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock(), _cluster(RABBITMQ, pool="prefork") as found:
        yield found


@pytest.fixture(autouse=True)
def _forget_app():
    yield
    bridge._installed.clear()


@pytest.fixture
def cluster(_redis: Cluster):
    install(_redis.app)
    return _redis


@pytest.fixture(
    params=[
        pytest.param("_redis", id="redis"),
        pytest.param("_rabbitmq", id="rabbitmq", marks=pytest.mark.rabbitmq),
    ]
)
def any_cluster(request):
    found = request.getfixturevalue(request.param)
    install(found.app)
    return found


def has_ended(*rows: TaskModel) -> Callable[[], None]:
    def all_have() -> None:
        for row in rows:
            row.refresh_from_db()
            assert TaskModel.Status(row.status).is_terminal, (row.status, row.error)

    return all_have


def is_waiting(row: TaskModel) -> Callable[[], None]:
    def waits() -> None:
        row.refresh_from_db()
        assert (row.status, row.error.split(" as ")[0]) == ("created", "handed over to Celery")

    return waits


def run(job: Job, **options: Any) -> TaskModel:
    """Schedule a job, and consume until it has ended."""
    row = job.schedule()
    with consuming(**options):
        eventually(has_ended(row), timeout_seconds=PATIENCE)
    return row


# --- CeleryJob


def test_a_call_is_handed_over_and_its_result_comes_back(any_cluster):
    row = run(CeleryJob(add, [1], {"b": 2}))

    assert row.status == "completed"
    assert set(row.returned) == {"celery_task_id", "result"}
    assert row.returned["result"] == 3
    assert row.error == ""
    (attempt,) = row.attempts.all()
    assert attempt.outcome == "snoozed"
    assert attempt.error == f"handed over to Celery as {row.returned['celery_task_id']}"
    assert (row.retry_attempts, CeleryIntegrationJob) == (0, CeleryJob)


def test_a_row_that_waits_takes_no_slot_and_is_woken_by_the_worker(cluster, tmp_path, monkeypatch):
    # So that looking by itself would be too late.
    monkeypatch.setattr(celery_jobs, "LOOK_SECONDS_MIN", 600.0)
    gate = tmp_path / "gate"
    row = CeleryJob(wait_for, [str(gate)]).schedule()

    with consuming(threads=1):
        eventually(is_waiting(row))
        other = tasks.write_effect.schedule("meanwhile", 5)
        eventually(has_ended(other))
        row.refresh_from_db()
        assert (row.status, row.consumer) == ("created", None)
        gate.touch()
        eventually(has_ended(row), timeout_seconds=PATIENCE)

    assert (row.status, row.returned["result"]) == ("completed", "waited")


def test_a_row_that_nobody_wakes_looks_by_itself(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(celery_jobs, "LOOK_SECONDS_MIN", 0.05)
    monkeypatch.setattr(celery_jobs, "LOOK_SECONDS_MAX", 0.05)
    monkeypatch.setattr(celery_jobs, "HEADER", "nobody_looks_for_this")
    gate = tmp_path / "gate"
    row = CeleryJob(wait_for, [str(gate)]).schedule()

    with consuming():
        eventually(is_waiting(row))
        fence = row.fence

        def has_looked_twice() -> None:
            row.refresh_from_db()
            assert row.fence > fence + 2

        eventually(has_looked_twice)
        gate.touch()
        eventually(has_ended(row), timeout_seconds=PATIENCE)

    assert row.status == "completed"
    # Looking leaves no trace.
    assert outcomes(row) == ["snoozed"]


def test_what_the_celery_task_raises_fails_the_attempt_with_its_traceback(cluster):
    row = run(CeleryJob("tests.fail", ["reason"], max_retries=1, retry_delay=0))

    assert (row.status, row.retry_attempts) == ("failed", 1)
    assert row.error.startswith("CeleryTaskFailed: LookupError: reason (Celery task tests.fail, ")
    assert outcomes(row) == ["snoozed", "retried", "snoozed", "failed"]
    reports = row.attempts.filter(outcome__in=["retried", "failed"])
    assert all("In the Celery worker:\nTraceback" in each.traceback for each in reports)
    # Each attempt was a call of its own.
    assert len(set(row.attempts.filter(outcome="snoozed").values_list("error", flat=True))) == 2


def test_a_failed_job_that_is_revived_calls_again(cluster):
    row = run(CeleryJob(fail, ["reason"]))
    assert row.retry_now()

    with consuming():
        eventually(has_ended(row), timeout_seconds=PATIENCE)

    assert outcomes(row) == ["snoozed", "failed", "snoozed", "failed"]
    assert len(set(row.attempts.values_list("error", flat=True))) == 4


def test_a_call_that_is_never_reported_fails_when_it_has_been_silent_for_too_long(cluster):
    install(_app_without_worker(cluster))
    row = run(CeleryJob("tests.nobody", silence=0.5))

    assert row.status == "failed"
    assert row.error.startswith("CeleryTaskSilent: Celery did not report the end of tests.nobody")


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")
def test_a_call_that_celery_revoked_fails(cluster):
    app = _app_without_worker(cluster)
    install(app)
    row = CeleryJob(add, [1]).schedule()

    with consuming():
        eventually(is_waiting(row))
        celery_id = row.error.rpartition(" ")[2]
        # What a worker does with a message whose id was revoked.
        app.backend.mark_as_revoked(celery_id, "revoked")
        lifecycle.hasten(row.pk, reason=row.error, using="default")
        eventually(has_ended(row), timeout_seconds=PATIENCE)

    assert row.status == "failed"
    assert row.error.startswith(
        "CeleryTaskFailed: TaskRevokedError: revoked (Celery task tests.add"
    )


@pytest.fixture
def start_killed(start_consumer: StartConsumer, cluster: Cluster):
    """Return a function that starts a consumer of Celery jobs, with a short lease."""

    def start(*arguments: str, **options: Any):
        settings = {
            "LEASE_SECONDS": 1.0,
            "IMPORTS": ["tests.support.celery_app", "firefly_jobs.contrib.celery.jobs"],
        }
        return start_consumer(
            *arguments, jobs_settings=settings, environment=cluster.environment, **options
        )

    return start


@pytest.mark.parametrize("checkpoint", ["executing", "settling"])
def test_a_consumer_that_is_killed_around_the_sending_leaves_one_call(
    start_killed, tmp_path, checkpoint
):
    path = tmp_path / "calls"
    row = CeleryJob(note, [str(path)]).schedule()
    victim = start_killed(checkpoint=f"{checkpoint}:kill")
    victim.wait()
    if checkpoint == "settling":
        # It had been sent, and ends before anybody looks again.
        eventually(lambda: _assert_is_there(path))

    start_killed()
    eventually(has_ended(row), timeout_seconds=PATIENCE)

    assert (row.status, row.returned["result"]) == ("completed", "noted")
    assert path.read_text() == "x\n"
    assert (row.rescues > 0) or "lost" in outcomes(row)


def _assert_is_there(path: Path) -> None:
    assert path.exists()


def test_a_report_changes_only_a_row_that_waits_for_it():
    row = CeleryJob("tests.add", [1]).schedule()
    claimed = claim_one()
    TaskModel.objects.update(error="waits")
    assert not lifecycle.hasten(row.pk, reason="waits", using="default")
    lifecycle.release([claimed], using="default")
    TaskModel.objects.filter(pk=row.pk, status="created").update(not_before=ago(-600))

    assert not lifecycle.hasten(row.pk, reason="waits for another", using="default")
    assert lifecycle.hasten(row.pk, reason="waits", using="default")
    assert TaskModel.objects.due().get().pk == row.pk


def test_a_report_that_cannot_be_written_does_not_fail_the_celery_task(caplog):
    task = SimpleNamespace(request={bridge.HEADER: ["no such alias", 1], "id": "x"})

    bridge._ended(task=task, state="SUCCESS")

    assert "could not be told" in caplog.text


@pytest.mark.parametrize("backend", [None, "rpc://"])
def test_an_application_whose_results_nobody_can_read_is_refused(backend):
    install(Celery("none", broker=REDIS.url, backend=backend, set_as_current=False))
    row = CeleryJob("tests.add", [1]).schedule()

    run_burst()
    row.refresh_from_db()

    assert row.status == "failed"
    assert row.error.startswith("ImproperlyConfigured: CeleryJob learns from Celery's result")


def test_an_application_that_runs_its_tasks_at_once_needs_no_worker():
    app = Celery("eager", broker=REDIS.url, backend=REDIS.url, set_as_current=False)
    app.conf.task_always_eager = True
    install(app)
    rows = [CeleryJob(add.name, [2]).schedule(), CeleryJob(fail, ["reason"]).schedule()]

    run_burst()
    has_ended(*rows)()

    assert (rows[0].status, rows[0].returned["result"]) == ("completed", 2)
    assert (rows[1].status, outcomes(rows[1])) == ("failed", ["failed"])


def test_a_process_without_an_application_says_what_to_do():
    row = CeleryJob("tests.add", [1]).schedule()

    run_burst()
    row.refresh_from_db()

    assert row.error.startswith("ImproperlyConfigured: No Celery application is known")
    with pytest.raises(ImproperlyConfigured):
        bridge.installed_app()
    with pytest.raises(CommandError, match="No Celery application is known"):
        call_command("celery_consume", verbosity=0)


def test_without_celery_the_package_and_the_command_say_what_to_install():
    code = (
        "import sys; sys.modules['celery'] = None\n"
        "import django; django.setup()\n"
        "from django.core.management import call_command\n"
        "call_command('celery_consume', verbosity=0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )

    assert "ImportError: firefly_jobs.contrib.celery is a bridge to Celery" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("django.core.management.base.CommandError: firefly_jobs.contrib.celery")
    assert last.endswith("pip install 'django-firefly-jobs[celery]'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"celery_task": ""}, "celery_task must be"),
        ({"celery_task": 5}, "celery_task must be"),
        ({"celery_task": "x", "task_args": "abc"}, "task_args must be a list"),
        ({"celery_task": "x", "silence": 0}, "silence must be"),
        ({"celery_task": "x", "silence": True}, "silence must be"),
    ],
)
def test_a_call_that_cannot_be_is_refused_where_it_is_made(words, message):
    with pytest.raises(ValueError, match=message):
        CeleryJob(**words)


# --- celery_consume


def test_a_database_without_tables_is_an_error_of_the_command(start_manage, tmp_path):
    url = f"sqlite:///{tmp_path / 'empty.sqlite3'}"
    environment = {BROKER: REDIS.url, QUEUE: "none"}
    process = start_manage(
        "celery_consume",
        database_url=url,
        jobs_settings={"IMPORTS": ["tests.support.celery_app"]},
        environment=environment,
    )

    assert process.wait() == 1
    assert "CommandError: Database 'default' cannot be used: no such table" in process.output


@contextmanager
def sending(cluster_or_app: Any, **options: Any) -> Iterator[CeleryConsumer]:
    """Run a consumer in a thread whose slots are Celery workers."""
    app = getattr(cluster_or_app, "app", cluster_or_app)
    consumer: Any = CeleryConsumer(app, **{"shutdown_timeout": 0, **options})
    with running(consumer):
        yield consumer


def test_workers_execute_rows_and_settle_them(any_cluster):
    rows = [tasks.write_effect.schedule(f"k{n}", n) for n in range(5)]
    rows += [tasks.add.schedule(1, 2), tasks.with_context.job.with_args(10).schedule()]
    async_row = tasks.aadd.job.with_args(3, 4).schedule()

    with sending(any_cluster):
        eventually(has_ended(*rows, async_row), timeout_seconds=PATIENCE)

    assert [row.status for row in (*rows, async_row)] == ["completed"] * 8
    assert [row.returned for row in (*rows[5:], async_row)] == [3, 11, 7]
    assert sorted(effects()) == [0, 1, 2, 3, 4]
    assert not TaskAttempt.objects.exists()
    assert not ConsumerModel.objects.exists()


def test_what_fails_in_a_worker_is_retried_and_fails_as_everywhere(cluster):
    row = tasks.add.job.with_args("a", 1).with_options(max_retries=1, retry_delay=0).schedule()
    late = tasks.write_effect.using(expires=1e-6).schedule("late")

    with sending(cluster):
        eventually(has_ended(row, late), timeout_seconds=PATIENCE)

    assert (row.status, row.retry_attempts) == ("failed", 1)
    assert outcomes(row) == ["retried", "failed"]
    assert row.error.startswith("TypeError: ")
    assert (late.status, late.error, effects()) == ("cancelled", "expired", [])


def claimed_row() -> tuple[TaskModel, Claim]:
    row = tasks.write_effect.schedule("once", 1)
    return row, claim_one()


def test_a_message_that_is_delivered_twice_has_one_effect():
    row, claim = claimed_row()
    message = {"using": "default", "consumer": 1, "pk": claim.id, "fence": claim.fence}

    execute(**message)  # type: ignore[arg-type]  # as JSON has it
    execute(**message)  # type: ignore[arg-type]  # likewise
    row.refresh_from_db()

    assert (row.status, effects()) == ("completed", [1])


def test_two_workers_with_the_same_message_commit_one_effect():
    row, claim = claimed_row()
    message = {"using": "default", "consumer": 1, "pk": claim.id, "fence": claim.fence}

    both = [Concurrent(lambda: execute(**message)) for _ in range(2)]  # type: ignore[arg-type]  # likewise
    for one in both:
        one.result()
    row.refresh_from_db()

    assert (row.status, effects()) == ("completed", [1])


def test_a_message_that_comes_too_late_does_nothing():
    row, claim = claimed_row()
    lifecycle.release([claim], using="default")

    execute(using="default", consumer=1, pk=claim.id, fence=claim.fence)
    row.refresh_from_db()

    assert (row.status, effects()) == ("created", [])


def test_a_step_whose_workflow_has_stopped_is_not_called():
    run = group(tasks.write_effect.job.with_args("once", 1)).schedule()
    claim = claim_one()
    assert run.cancel()

    execute(using="default", consumer=1, pk=claim.id, fence=claim.fence)
    run.refresh_from_db()
    row = TaskModel.objects.get(pk=claim.id)

    assert (row.status, row.error, effects()) == (
        "cancelled",
        "cancelled: the workflow was cancelled",
        [],
    )
    assert run.status == "cancelled"


def test_no_more_are_in_flight_than_allowed(cluster):
    rows = [tasks.write_effect.schedule(f"k{n}") for n in range(5)]

    def two_are_running() -> None:
        assert TaskModel.objects.running().count() == 2

    with sending(_app_without_worker(cluster), max_in_flight=2):
        eventually(two_are_running)
    for row in rows:
        row.refresh_from_db()

    # What had not ended was given back when it stopped.
    assert [row.status for row in rows] == ["created"] * 5
    assert not ConsumerModel.objects.exists()


def _app_without_worker(cluster: Cluster) -> Celery:
    return make_app(cluster.broker, f"{cluster.queue}-empty")


def test_what_no_worker_ends_counts_as_lost_and_runs_again(cluster):
    row = tasks.write_effect.schedule("k")

    def is_lost() -> None:
        assert "lost" in outcomes(row)

    with sending(_app_without_worker(cluster), silence=0.5):
        eventually(is_lost)
    row.refresh_from_db()

    assert row.rescues > 0
    assert "No Celery worker has ended this task within 0.5 s" in row.error
    with sending(cluster):
        eventually(has_ended(row), timeout_seconds=PATIENCE)
    assert (row.status, effects()) == ("completed", [1])


def test_a_broker_that_is_away_leaves_rows_due():
    app = make_app("redis://127.0.0.1:1/0", "none")
    row = tasks.write_effect.schedule("k")

    def was_given_back() -> None:
        row.refresh_from_db()
        assert (row.status, row.fence > 1) == ("created", True)

    with sending(app):
        eventually(was_given_back, timeout_seconds=PATIENCE)

    run_burst()
    row.refresh_from_db()
    assert (row.status, row.rescues, effects()) == ("completed", 0, [1])


@pytest.fixture
def start_sending(start_manage, cluster: Cluster):
    """Return a function that starts ``celery_consume`` in a process of its own."""

    def start(*arguments: str, queue: str | None = None, **options: Any):
        return start_manage(
            "celery_consume",
            *arguments,
            jobs_settings={"LEASE_SECONDS": 1.0, "IMPORTS": ["tests.support.celery_app"]},
            environment=cluster.environment | ({QUEUE: queue} if queue else {}),
            **options,
        )

    return start


def test_a_consumer_that_is_killed_is_survived_by_its_tasks(start_sending, cluster, settings):
    rows = [tasks.write_effect.schedule(f"k{n}", n) for n in range(3)]
    victim = start_sending(queue=f"{cluster.queue}-empty")

    def all_are_sent() -> None:
        assert TaskModel.objects.running().count() == 3

    eventually(all_are_sent, timeout_seconds=PATIENCE)
    victim.kill9()
    settings.FIREFLY_JOBS = {**settings.FIREFLY_JOBS, "LEASE_SECONDS": 1.0}
    with sending(cluster):
        eventually(has_ended(*rows), timeout_seconds=PATIENCE)

    assert sorted(effects()) == [0, 1, 2]
    assert all(row.rescues == 1 for row in rows)


def test_a_consumer_that_is_asked_to_stop_gives_back_what_has_not_ended(start_sending, cluster):
    row = tasks.write_effect.schedule("k")
    process = start_sending("--shutdown-timeout", "0", queue=f"{cluster.queue}-empty")

    def is_sent() -> None:
        row.refresh_from_db()
        assert row.status == "running"

    eventually(is_sent, timeout_seconds=PATIENCE)
    process.terminate()

    assert process.wait() == 0
    row.refresh_from_db()
    assert (row.status, row.rescues, outcomes(row)) == ("created", 0, ["released"])
    assert not ConsumerModel.objects.exists()


def test_a_worker_that_is_killed_leaves_nothing_and_another_one_does_it(cluster, settings):
    # However long the second worker takes to start.
    settings.FIREFLY_JOBS = {**settings.FIREFLY_JOBS, "MAX_RESCUES": 10_000}
    queue = f"{cluster.queue}-mortal"
    app = make_app(cluster.broker, queue)
    row = tasks.write_effect.schedule("k")

    with (
        CeleryWorker(cluster.broker, queue, checkpoint="settling:kill") as victim,
        sending(app, silence=1),
    ):
        victim.wait(timeout_seconds=60.0)
        assert effects() == []
        with CeleryWorker(cluster.broker, queue):
            eventually(has_ended(row), timeout_seconds=60.0)

    assert (row.status, effects()) == ("completed", [1])
    assert "lost" in outcomes(row)
