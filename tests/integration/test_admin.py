"""The admin, through its views: what it shows, to whom, and what it reads for that."""

import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from firefly_jobs import lifecycle, serializers
from firefly_jobs.admin import rows as admin_rows
from firefly_jobs.databases.functions import SecondsFromNow
from firefly_jobs.models import ConsumerModel, TaskAttempt, TaskEvent, TaskModel
from firefly_jobs.states import Status
from tests.conftest import VENDOR
from tests.factories import create_effect
from tests.testapp.models import Effect

LIST = "admin:firefly_jobs_taskmodel_changelist"
PAGE = "admin:firefly_jobs_taskmodel_change"
DELETE = "admin:firefly_jobs_taskmodel_delete"
ECHO = "tests.testapp.tasks.echo"
ADD = "tests.testapp.tasks.add"

pytestmark = pytest.mark.django_db


class Evil:
    """Its repr is an attack on the page; module-level, so that it can be pickled."""

    def __repr__(self) -> str:
        return "<script>alert(1)</script>"


class Broken:
    """Its repr raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr today")


def create_task(*args: Any, using: str = "default", **fields: Any) -> TaskModel:
    """Write a row as a consumer would have left it; ``args`` are the call's."""
    values: dict[str, Any] = {"func_name": ECHO, "status": Status.COMPLETED} | fields
    if "returned" in values:
        values["raw_returned"] = serializers.dumps_returned(
            values.pop("returned"), task_name=values["func_name"], serializer="pickle"
        )
    values.setdefault(
        "raw_params",
        serializers.dumps_params(
            args, values.pop("kwargs", {}), task_name=values["func_name"], serializer="pickle"
        ),
    )
    task = TaskModel(**values)
    task.save(using=using)
    return TaskModel.objects.using(using).get(pk=task.pk)


def person(*permissions: str) -> Client:
    """Return the browser of a staff user with these permissions on tasks."""
    user = User.objects.create_user("anna", is_staff=True)
    for permission in permissions:
        user.user_permissions.add(
            Permission.objects.get(content_type__app_label="firefly_jobs", codename=permission)
        )
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def viewer() -> Client:
    return person("view_taskmodel", "view_consumermodel")


@pytest.fixture
def operator() -> Client:
    return person("view_taskmodel", "change_taskmodel", "delete_taskmodel")


def listed(client: Client, **query: Any) -> list[int]:
    response = client.get(reverse(LIST), query)
    assert response.status_code == 200
    return [task.pk for task in response.context["cl"].result_list]


def text_of(client: Client, task: TaskModel) -> str:
    response = client.get(reverse(PAGE, args=[task.pk]))
    assert response.status_code == 200
    return response.content.decode()


def act(client: Client, action: str, *tasks: TaskModel, **data: Any) -> list[str]:
    response = client.post(
        reverse(LIST),
        {"action": action, "_selected_action": [task.pk for task in tasks], "index": 0} | data,
        follow=True,
    )
    return [str(message) for message in response.context["messages"]]


# --- the list


def test_newest_task_comes_first(viewer):
    tasks = [create_task() for _ in range(3)]

    assert listed(viewer) == [task.pk for task in reversed(tasks)]


def test_list_filters_by_status_queue_and_function(viewer):
    failed = create_task(status=Status.FAILED, queue="mail")
    waiting = create_task(status=Status.CREATED, queue="mail", func_name=ADD)
    running = create_task(status=Status.RUNNING, consumer=3)

    assert listed(viewer, status__exact="failed") == [failed.pk]
    assert listed(viewer, status__exact="running") == [running.pk]
    assert listed(viewer, queue="mail") == [waiting.pk, failed.pk]
    assert listed(viewer, function=ADD) == [waiting.pk]
    assert listed(viewer, function=ADD, status__exact="failed") == []


def test_filters_offer_registered_tasks_and_queues_that_wait(viewer):
    create_task(status=Status.CREATED, queue="night")
    create_task(status=Status.COMPLETED, queue="nobody-waits-here")

    response = viewer.get(reverse(LIST))
    choices = {
        spec.parameter_name: [value for value, _ in spec.lookup_choices]
        for spec in response.context["cl"].filter_specs
        if hasattr(spec, "parameter_name")
    }

    assert {"night", "default"} <= set(choices["queue"])
    assert "nobody-waits-here" not in choices["queue"]
    assert {ECHO, ADD} <= set(choices["function"])


@pytest.mark.parametrize("form", ["{}", "#{}", "  {} "])
def test_search_for_a_number_finds_the_task_of_that_id(viewer, form):
    task, _ = create_task(), create_task()

    assert listed(viewer, q=form.format(task.pk)) == [task.pk]


@pytest.mark.parametrize(
    ("term", "is_found"),
    [
        (ECHO, True),
        ("tests.testapp.tasks.ec", True),
        ("TESTS.TESTAPP.tasks.echo", True),
        ("ech", True),
        ("cho", False),
        ("9" * 30, False),
        ("9223372036854775808", False),
    ],
)
def test_search_for_a_name_finds_the_beginning_of_a_registered_one(viewer, term, is_found):
    task = create_task()
    create_task(func_name=ADD)

    assert listed(viewer, q=term) == ([task.pk] if is_found else [])


def test_search_for_a_function_that_is_gone_takes_its_whole_name(viewer):
    task = create_task(func_name="shop.tasks.removed")

    assert listed(viewer, q="shop.tasks.removed") == [task.pk]
    assert listed(viewer, q="shop.tasks.rem") == []


def test_list_counts_no_further_than_it_pages(viewer, monkeypatch):
    monkeypatch.setattr(admin_rows, "COUNT_MAX", 5)
    tasks = [create_task() for _ in range(7)]

    response = viewer.get(reverse(LIST))

    assert listed(viewer) == [task.pk for task in reversed(tasks[2:])]
    assert "only the newest 5 are listed" in response.content.decode()


def test_list_pages_in_order(viewer):
    TaskModel.objects.bulk_create(
        TaskModel(func_name=ECHO, raw_params="", status=Status.COMPLETED) for _ in range(250)
    )
    keys = list(TaskModel.objects.order_by("-pk").values_list("pk", flat=True))

    assert [*listed(viewer), *listed(viewer, p=2), *listed(viewer, p=3)] == keys


def test_filter_without_an_index_looks_at_the_newest_rows_and_says_so(viewer, monkeypatch):
    monkeypatch.setattr(admin_rows, "SEARCH_ROWS", 2)
    old = create_task(status=Status.FAILED)
    new = create_task(status=Status.FAILED)
    create_task(func_name=ADD)

    assert listed(viewer, q=ECHO) == [new.pk]
    assert listed(viewer, function=ECHO) == [new.pk]
    assert "Searched among the newest 2 tasks only" in (
        viewer.get(reverse(LIST), {"q": ECHO}).content.decode()
    )
    # These have an index.
    assert listed(viewer, function=ECHO, status__exact="failed") == [new.pk, old.pk]
    assert listed(viewer, q=str(old.pk)) == [old.pk]
    assert "Searched among" not in viewer.get(reverse(LIST)).content.decode()


def test_list_reads_no_payload_and_no_row_per_task(viewer):
    for _ in range(20):
        create_task("secret", raw_params="not even a payload")
    viewer.get(reverse(LIST))

    with CaptureQueriesContext(connection) as queries:
        viewer.get(reverse(LIST))

    about_tasks = [q["sql"] for q in queries if "firefly_jobs_taskmodel" in q["sql"]]
    assert not any("params" in sql or "returned" in sql for sql in about_tasks)
    assert len(about_tasks) <= 4
    assert not any("COUNT(" in sql.upper() for sql in about_tasks)


def plan(sql: str) -> str:
    explain = {"sqlite": "EXPLAIN QUERY PLAN ", "postgresql": "EXPLAIN ", "mysql": "EXPLAIN "}
    with connection.cursor() as cursor:
        cursor.execute(explain[VENDOR] + sql)
        return "\n".join(" ".join(map(str, row)) for row in cursor.fetchall())


# MariaDB and MySQL commit before ANALYZE TABLE.
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("status", "index"),
    [
        ("failed", "firefly_rare"),
        ("cancelled", "firefly_rare"),
        ("running", "firefly_running"),
    ],
)
def test_rare_states_are_found_by_an_index(viewer, status, index):
    TaskModel.objects.bulk_create(
        TaskModel(
            func_name=ECHO,
            raw_params="x" * 300,
            status=status if number % 1000 == 0 else Status.COMPLETED,
            consumer=1,
        )
        for number in range(5000)
    )
    # SQLite decides without statistics, unless somebody asked for them.
    if VENDOR != "sqlite":
        table = "TABLE " if VENDOR == "mysql" else ""
        with connection.cursor() as cursor:
            cursor.execute(f"ANALYZE {table}firefly_jobs_taskmodel")
    with CaptureQueriesContext(connection) as queries:
        assert len(listed(viewer, status__exact=status)) == 5

    (keys,) = [q["sql"] for q in queries if re.search(r"LIMIT 10001", q["sql"])]
    assert index in plan(keys)


# --- one task


def test_page_shows_the_call_its_result_and_its_times(viewer):
    task = create_task("a", 2, kwargs={"key": [1, 2]}, returned={"lines": 3}, duration=0.25)

    text = text_of(viewer, task)

    assert "echo(\n    &#x27;a&#x27;,\n    2,\n    key=[1, 2],\n)" in text
    assert "{&#x27;lines&#x27;: 3}" in text
    assert "250 ms" in text


def test_page_shows_history_with_tracebacks_escaped(viewer):
    task = create_task(status=Status.FAILED, error="ValueError: <b>bad</b>", max_retries=1)
    for number in (1, 2):
        TaskAttempt.objects.create(
            task=task,
            number=number,
            fence=number,
            outcome="failed" if number == 2 else "retried",
            consumer=4,
            traceback=f'File "x.py", line {number}\nValueError: <b>bad</b>',
            error="ValueError: <b>bad</b>",
        )

    text = text_of(viewer, task)

    assert "<b>bad</b>" not in text
    assert text.index("line 2") < text.index("line 1")
    assert text.count("<details open>") == 1


def test_history_is_cut_at_a_stated_number_of_attempts(viewer):
    task = create_task(status=Status.CREATED)
    TaskAttempt.objects.bulk_create(
        TaskAttempt(task=task, number=1, fence=n, outcome="snoozed", error=f"snooze-{n}.")
        for n in range(25)
    )

    text = text_of(viewer, task)

    assert "snooze-24." in text
    assert "snooze-4." not in text
    assert "Only the newest 20 attempts are shown." in text


def test_events_are_shown_where_there_are_any(viewer):
    task, other = create_task(status=Status.CREATED), create_task(status=Status.CREATED)
    TaskEvent.objects.create(task=task, kind="claimed", consumer=4)
    TaskEvent.objects.bulk_create(
        TaskEvent(task=task, kind="retried", consumer=4, message=f"<b>retry-{n}.</b>")
        for n in range(50)
    )

    text = text_of(viewer, task)

    assert text.index("retry-49.") < text.index("retry-0.")
    assert "<b>retry" not in text
    assert "Only the newest 50 events are shown." in text
    assert "claimed" not in text
    assert "what happened" not in text_of(viewer, other).lower()


def test_payload_that_was_changed_is_not_decoded_and_the_page_says_why(viewer):
    task = create_task("harmless")
    body = task.raw_params.rpartition(":")[2]
    TaskModel.objects.filter(pk=task.pk).update(
        raw_params=f"pickle:{'0' * 64}:{body}", raw_returned=f"pickle:{'0' * 64}:{body}"
    )

    text = text_of(viewer, task)

    assert text.count("Not shown:") == 2
    assert "carry no valid signature" in text
    assert "harmless" not in text


def test_unsigned_pickle_is_not_decoded_to_be_looked_at(viewer):
    with override_settings(FIREFLY_JOBS={"SIGNING": False}):
        text = text_of(viewer, create_task("harmless", returned="harmless too"))

    assert text.count("it is pickled and not signed") == 2
    assert "harmless" not in text


def test_vanished_model_instance_is_explained(viewer):
    effect = create_effect()
    task = create_task(effect)
    Effect.objects.all().delete()

    assert f"Effect {effect.pk} no longer exists in database" in text_of(viewer, task)


def test_repr_is_escaped_and_cut(viewer):
    task = create_task(Evil(), "x" * 100_000, *range(200), returned=list(range(10_000)))

    text = text_of(viewer, task)

    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "… 152 more" in text
    assert len(text) < 40_000


def test_object_whose_repr_raises_does_not_break_the_page(viewer):
    assert "Broken instance at 0x" in text_of(viewer, create_task(Broken()))


def test_payload_in_an_unknown_format_is_explained(viewer):
    assert "unknown format" in text_of(viewer, create_task(raw_params="<b>nonsense</b>"))


def test_status_of_a_later_version_does_not_break_the_page(operator):
    assert "paused" in text_of(operator, create_task(status="paused"))


def test_task_that_is_not_there_leads_back_to_the_index(viewer):
    assert viewer.get(reverse(PAGE, args=[12345])).status_code == 302


# --- actions


def test_retry_says_how_many_are_due_again_and_how_many_are_not(operator):
    failed = create_task(status=Status.FAILED, retry_attempts=2, max_retries=2)
    cancelled = create_task(status=Status.CANCELLED)
    others = [create_task(status=s) for s in (Status.COMPLETED, Status.RUNNING, Status.CREATED)]

    assert act(operator, "retry_tasks", failed, cancelled, *others) == [
        "2 tasks are due again.",
        "3 tasks were left as they are: only failed and cancelled tasks can be retried.",
    ]

    assert set(TaskModel.objects.due()) == {failed, cancelled, others[-1]}
    failed.refresh_from_db()
    assert failed.retry_attempts == 0


def test_cancel_says_how_many_were_cancelled_and_how_many_had_started(operator):
    waiting = create_task(status=Status.CREATED)
    running = create_task(status=Status.RUNNING)

    assert act(operator, "cancel_tasks", waiting, running) == [
        "1 task was cancelled.",
        "1 task was left as it is: it has started, or has ended.",
    ]

    waiting.refresh_from_db()
    running.refresh_from_db()
    assert (waiting.status, running.status) == (Status.CANCELLED, Status.RUNNING)


def test_actions_are_on_record(operator):
    task = create_task(status=Status.FAILED)
    create_task(status=Status.COMPLETED)

    act(operator, "retry_tasks", *TaskModel.objects.all())

    entries = LogEntry.objects.values_list("user__username", "object_id", "change_message")
    assert list(entries) == [("anna", str(task.pk), "Made due again.")]


def test_action_on_all_that_match_is_bounded(operator, monkeypatch):
    monkeypatch.setattr("firefly_jobs.admin.tasks.COUNT_MAX", 3)
    for _ in range(5):
        create_task(status=Status.FAILED)

    told = act(operator, "retry_tasks", *TaskModel.objects.all()[:1], select_across=1)

    assert told == [
        "Only the newest 3 of the selected tasks were looked at.",
        "3 tasks are due again.",
    ]
    assert TaskModel.objects.due().count() == 3


def test_viewer_sees_no_action_and_can_start_none(viewer):
    task = create_task(status=Status.FAILED)

    text = viewer.get(reverse(LIST)).content.decode()
    act(viewer, "retry_tasks", task)

    assert "retry_tasks" not in text
    assert "retry_tasks" not in text_of(viewer, task)
    task.refresh_from_db()
    assert task.status == Status.FAILED


def test_page_offers_what_fits_the_status(operator):
    buttons = {
        status: re.findall(
            r'name="action" value="(\w+)"', text_of(operator, create_task(status=status))
        )
        for status in Status
    }

    assert buttons == {
        Status.CREATED: ["cancel_tasks"],
        Status.BLOCKED: ["cancel_tasks"],
        Status.RUNNING: [],
        Status.COMPLETED: [],
        Status.FAILED: ["retry_tasks"],
        Status.CANCELLED: ["retry_tasks"],
    }


def test_button_leads_back_to_the_page_of_the_task(operator):
    task = create_task(status=Status.FAILED)

    response = operator.post(
        reverse(LIST),
        {"action": "retry_tasks", "_selected_action": task.pk, "index": 0, "firefly_page": task.pk},
    )

    assert response["Location"] == reverse(PAGE, args=[task.pk])


# --- what nobody may do, or only with care


def test_nobody_adds_or_edits_a_task():
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    task = create_task(status=Status.FAILED)

    assert client.get(reverse("admin:firefly_jobs_taskmodel_add")).status_code == 403
    assert client.post(reverse(PAGE, args=[task.pk]), {"status": "completed"}).status_code == 403
    text = text_of(client, task)
    assert 'name="_save"' not in text
    assert 'name="status"' not in text


@pytest.mark.parametrize("status", list(Status))
def test_only_ended_tasks_can_be_deleted(operator, status):
    task = create_task(status=status)
    TaskAttempt.objects.create(task=task, number=1, fence=1, outcome="failed")
    url = reverse(DELETE, args=[task.pk])

    asked = operator.get(url)
    deleted = operator.post(url, {"post": "yes"})

    if status.is_terminal:
        assert "attempts: 1" in re.sub(r"<[^>]+>", "", asked.content.decode()).lower()
        assert deleted.status_code == 302
        assert not TaskModel.objects.exists()
        assert not TaskAttempt.objects.exists()
    else:
        assert (asked.status_code, deleted.status_code) == (403, 403)
        assert TaskModel.objects.filter(pk=task.pk).exists()


def test_task_that_was_revived_while_its_deletion_was_confirmed_stays(operator, monkeypatch):
    task = create_task(status=Status.FAILED)
    delete = lifecycle.delete

    def delete_after_a_person_was_quicker(ids, *, using):
        lifecycle.retry(ids, using=using)
        return delete(ids, using=using)

    monkeypatch.setattr(lifecycle, "delete", delete_after_a_person_was_quicker)

    response = operator.post(reverse(DELETE, args=[task.pk]), {"post": "yes"}, follow=True)

    assert [str(m) for m in response.context["messages"]] == [
        "The task was not deleted: it was made due again meanwhile."
    ]
    assert not LogEntry.objects.exists()
    assert TaskModel.objects.filter(pk=task.pk).exists()


def test_many_are_not_deleted_from_the_list(operator):
    create_task()

    assert "delete_selected" not in operator.get(reverse(LIST)).content.decode()


# --- several databases


@pytest.mark.django_db(databases=["default", "other"])
def test_tasks_are_those_of_the_configured_database():
    here = create_task(status=Status.COMPLETED)
    with override_settings(FIREFLY_JOBS={"DATABASE": "other"}):
        there = create_task("there", status=Status.FAILED, using="other", pk=here.pk + 1000)
        TaskAttempt.objects.using("other").create(
            task=there, number=1, fence=1, outcome="failed", traceback="a traceback from there"
        )
        client = Client()
        client.force_login(User.objects.create_superuser("root"))

        assert listed(client) == [there.pk]
        assert "a traceback from there" in text_of(client, there)
        assert act(client, "retry_tasks", there) == ["1 task is due again."]
        assert act(client, "cancel_tasks", there) == ["1 task was cancelled."]
        response = client.post(reverse(DELETE, args=[there.pk]), {"post": "yes"})

    assert response.status_code == 302
    assert not TaskModel.objects.using("other").exists()
    assert TaskModel.objects.get() == here


# --- consumers


def test_consumers_show_when_they_were_last_heard_of(viewer):
    alive = ConsumerModel.objects.create(name="web-1:17", queues="default,mail", lease_seconds=30)
    late = ConsumerModel.objects.create(name="web-2:18", queues="*", lease_seconds=30)
    ConsumerModel.objects.filter(pk=late.pk).update(renewed_at=SecondsFromNow(-125))
    create_task(status=Status.RUNNING, consumer=alive.pk)

    response = viewer.get(reverse("admin:firefly_jobs_consumermodel_changelist"))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", response.content.decode()))

    assert re.search(r"web-2:18 late \* 2 min \d+ s ago 0 ", text)
    assert re.search(r"web-1:17 alive default, mail [\d.]+ m?s ago 1 ", text)


def test_nobody_edits_a_consumer():
    consumer = ConsumerModel.objects.create(name="web-1", queues="default", lease_seconds=30)
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    page = reverse("admin:firefly_jobs_consumermodel_change", args=[consumer.pk])

    assert client.get(page).status_code == 200
    assert client.post(page, {"name": "x"}).status_code == 403
    assert client.get(reverse("admin:firefly_jobs_consumermodel_add")).status_code == 403


@pytest.mark.parametrize(
    ("span", "words"),
    [
        (timedelta(seconds=-1), "0 ms"),
        (timedelta(milliseconds=45), "45 ms"),
        (timedelta(seconds=12.34), "12.3 s"),
        (timedelta(seconds=59.96), "1 min 0 s"),
        (timedelta(seconds=192), "3 min 12 s"),
        (timedelta(minutes=125), "2 h 5 min"),
        (timedelta(days=3, hours=4), "3 d 4 h"),
    ],
)
def test_span_is_told_in_the_two_units_that_matter(span, words):
    from firefly_jobs.admin import presentation

    assert presentation.span(span) == words
