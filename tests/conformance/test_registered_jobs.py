"""Registered jobs: who may start which on what, and what a refusal says."""

import threading
import uuid
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied, ValidationError
from django.core.management import call_command
from django.db import transaction
from django.test.utils import isolate_apps

from firefly_jobs import atask, firing, job_registry, registry
from firefly_jobs.databases.functions import DatabaseNow
from firefly_jobs.exceptions import JobRefused, TaskDefinitionError
from firefly_jobs.job_registry import (
    get_job_from_name,
    register_job,
    start_job_from_name,
)
from firefly_jobs.models import JobStart, SavedJob, ScheduleModel, TaskModel
from firefly_jobs.states import Status
from testproject.datafiles.models import DataFile, Project
from testproject.datafiles.tasks import flag_custom
from tests.conformance import tasks
from tests.conformance.support import run_burst

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def files():
    project = Project.objects.create(name="apollo")
    return [DataFile.objects.create(name=f"{n}", project=project) for n in range(3)]


@pytest.fixture
def user():
    return get_user_model().objects.create_user("ada")


@pytest.fixture
def staff():
    return get_user_model().objects.create_user("grace", is_staff=True)


@pytest.fixture
def registering():
    """Forget, after the test, what it registers."""
    jobs = mock.patch.object(job_registry, "_jobs", dict(job_registry._jobs))
    tasks = mock.patch.object(registry, "_tasks", dict(registry._tasks))
    with jobs, tasks:
        yield


def pks(files):
    return [file.pk for file in files]


def refusal(*args, **kwargs):
    """Return the code and the message of a start that writes nothing."""
    success, message, code = start_job_from_name(*args, **kwargs)
    assert not success
    assert (TaskModel.objects.count(), JobStart.objects.count()) == (0, 0)
    with pytest.raises(JobRefused) as caught:
        get_job_from_name(*args, **kwargs)
    assert (caught.value.message, caught.value.status_code) == (message, code)
    return code, message


# --- the documented example


def test_a_job_is_started_by_its_name_and_says_so(files, user):
    success, message, code = start_job_from_name(
        "flag_custom", "datafile", pks(files)[:2], {"custom_flag": True}, user_pk=user.pk
    )

    row = TaskModel.objects.get()
    assert (success, code) == (True, 200)
    assert message == f"Started 'Flag custom' as task {row.pk}."
    assert row.params["kwargs"] == {
        "custom_flag": True,
        "datafile_pks": pks(files)[:2],
        "user_pk": user.pk,
    }
    start = JobStart.objects.get()
    assert (start.task_id, start.user_pk, start.task_name) == (row.pk, f"{user.pk}", "flag_custom")
    assert start.obj_pks == pks(files)[:2]
    run_burst()
    assert list(DataFile.objects.filter(custom_flag=True)) == files[:2]
    row.refresh_from_db()
    assert row.returned == 2


def test_a_job_is_got_and_started_later(files):
    named = get_job_from_name(
        job_name="flag_custom", obj_type="datafile", obj_pks=pks(files), job_args={}, user_pk=None
    )
    assert TaskModel.objects.count() == 0
    row = named.apply_async()
    assert row.params["kwargs"] == {"custom_flag": True, "datafile_pks": pks(files)}


def test_a_start_belongs_to_the_callers_transaction(files):
    with transaction.atomic():
        start_job_from_name("flag_custom", "datafile", pks(files))
        transaction.set_rollback(True)
    assert (TaskModel.objects.count(), JobStart.objects.count()) == (0, 0)


def test_each_object_counts_once(files):
    first = files[0].pk
    start_job_from_name("flag_custom", "datafile", [first] * 600)
    assert TaskModel.objects.get().params["kwargs"]["datafile_pks"] == [first]


def test_defaults_and_arguments_are_never_changed(registering):
    defaults, given = {"flags": [1]}, {"more": [1]}
    register_job("Lists", "lists", "datafile", default_args=defaults)(flag_custom)

    named = get_job_from_name("lists", "datafile", [1], given)
    named.job.kwargs["flags"].append(2)
    defaults["flags"].append(3)

    assert get_job_from_name("lists", "datafile", [1]).job.kwargs["flags"] == [1]
    assert given == {"more": [1]}


@atask
@register_job("Async", "async_job", "thing")
async def async_below(thing_pks):
    """Is async, registered below."""
    return list(thing_pks)


def test_async_functions_are_started_as_well():
    assert start_job_from_name("async_job", "thing", ["a", uuid.UUID(int=5)])[0]
    run_burst()
    assert TaskModel.objects.get().returned == ["a", uuid.UUID(int=5)]
    assert JobStart.objects.get().obj_pks == ["a", str(uuid.UUID(int=5))]


# --- refusals


def test_an_unknown_job_is_not_found(files):
    code, message = refusal("flag_costum", "datafile", pks(files))
    assert code == 404
    assert message == ("There is no registered job 'flag_costum'. Did you mean 'flag_custom'?")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"obj_type": "project"}, "is for objects of type 'datafile', not 'project'"),
        ({"obj_pks": []}, "needs at least one datafile"),
        ({"obj_pks": range(1, 502)}, "is started on 500 objects at most, got 501"),
        ({"obj_pks": "101"}, "are a list, got str"),
        ({"obj_pks": None}, "are a list, got NoneType"),
        ({"obj_pks": [1.5]}, "a number, a text or a UUID, got a float"),
        ({"obj_pks": [True]}, "got a bool"),
        ({"job_args": [1]}, 'Arguments are given by name, such as {"days": 7}, got a list'),
        ({"job_args": "x"}, "got a text"),
        ({"obj_pks": [10**5000]}, "is a number that no database has"),
        ({"obj_pks": [-(2**63)]}, "is a number that no database has"),
        ({"job_args": {"datafile_pks": [1]}}, "datafile_pks is not given as an argument"),
        ({"job_args": {"user_pk": 1}}, "user_pk is not given as an argument"),
        ({"job_args": {"custom_flag": lambda: None}}, "The arguments do not fit 'Flag custom'"),
    ],
)
@pytest.mark.parametrize("by", ["nobody", "staff"])
def test_what_does_not_fit_is_a_bad_request(given, words, by, staff):
    given = {"obj_type": "datafile", "obj_pks": [1], **given}
    given["user_pk"] = staff.pk if by == "staff" else None
    code, message = refusal("flag_custom", **given)
    assert code == 400
    assert words in message


def test_arguments_are_named_that_are_unknown_or_missing(staff):
    code, message = refusal("rename_files", "datafile", [1], {"prefx": "x"}, user_pk=staff.pk)
    assert (code, message) == (
        400,
        "'Rename' takes no argument 'prefx'. Did you mean 'prefix'?",
    )
    code, message = refusal("rename_files", "datafile", [1])
    assert code == 400
    assert "missing a required argument: 'prefix'" in message


@pytest.mark.parametrize("user_pk", [999_999, "nobody", ""])
def test_an_unknown_user_is_not_found(user_pk):
    assert refusal("flag_custom", "datafile", [1], user_pk=user_pk)[0] == 404


def test_what_only_staff_may_start(user, staff, files):
    code, message = refusal("rename_files", "datafile", [1], {"prefix": "x"}, user_pk=user.pk)
    assert (code, message) == (403, "Only staff may start 'Rename'.")
    for user_pk in (staff.pk, None):
        found = start_job_from_name(
            "rename_files", "datafile", pks(files), {"prefix": "x"}, user_pk=user_pk
        )
        assert found[2] == 200
    assert [row.params["kwargs"]["user_pk"] for row in TaskModel.objects.order_by("pk")[:1]] == [
        staff.pk
    ]


def test_the_limit_holds_with_and_without_a_user(staff):
    for user_pk in (staff.pk, None):
        found = refusal("rename_files", "datafile", [1, 2, 3, 4], {"prefix": "x"}, user_pk=user_pk)
        assert found[0] == 400


def test_a_user_who_is_not_active_may_start_nothing(user):
    user.is_active = False
    user.save()
    assert refusal("flag_custom", "datafile", [1], user_pk=user.pk)[0] == 403


def test_a_job_may_ask_who_starts_it_on_what(registering, user):
    asked = []

    def can_start(person, objects):
        asked.append((person, objects))
        if objects == [2]:
            message = "not these"
            raise PermissionDenied(message)
        return objects != [1]

    job = flag_custom.func
    register_job("Asks", "asks", "datafile", can_start=can_start)(job)

    assert refusal("asks", "datafile", [1], user_pk=user.pk)[0] == 403
    assert refusal("asks", "datafile", [2], user_pk=user.pk) == (403, "not these")
    assert start_job_from_name("asks", "datafile", [3], user_pk=user.pk)[0]
    assert start_job_from_name("asks", "datafile", [1])[0]
    assert set(map(str, asked)) == {str((user, [n])) for n in (1, 2, 3)}


async def says_no(person, objects):
    return False


class SaysNo:
    async def __call__(self, person, objects):
        return False


@pytest.mark.parametrize("asked", [says_no, partial(says_no), SaysNo()])
def test_a_coroutine_that_would_let_everybody_in_is_refused(registering, asked):
    with pytest.raises(TypeError, match="must be a plain function"):
        register_job("Asks", "asks", "datafile", can_start=asked)(flag_custom.func)


def test_an_answer_that_has_to_be_awaited_lets_nobody_in(registering, user):
    def can_start(person, objects):
        return says_no(person, objects)

    register_job("Asks", "asks", "datafile", can_start=can_start)(flag_custom.func)
    with pytest.raises(TypeError, match="must return True or False"):
        start_job_from_name("asks", "datafile", [1], user_pk=user.pk)
    assert TaskModel.objects.count() == 0


def test_a_number_that_is_no_key_names_no_user(user):
    for odd in (True, user.pk + 0.5, float("inf"), float("nan")):
        assert refusal("flag_custom", "datafile", [1], user_pk=odd)[0] == 404


def test_a_user_of_a_kind_that_has_no_staff_is_none():
    class Person:
        is_active = is_authenticated = True

    jobs = job_registry.registered_jobs(Person(), "datafile")
    assert [job.task_name for job in jobs] == ["flag_custom"]


@pytest.mark.parametrize(
    ("command", "status", "moment"),
    [
        ("delete_completed_tasks", Status.COMPLETED, "completed"),
        ("delete_failed_tasks", Status.FAILED, "failed"),
    ],
)
def test_who_started_a_task_is_pruned_with_it(user, command, status, moment):
    for number in range(3):
        start_job_from_name("flag_custom", "datafile", [number], user_pk=user.pk)
    kept, *ended = TaskModel.objects.order_by("pk")
    for row in ended:
        TaskModel.objects.filter(pk=row.pk).update(status=status, **{moment: DatabaseNow()})

    call_command(command, verbosity=0)

    assert list(JobStart.objects.values_list("task", flat=True)) == [kept.pk]
    kept.delete()
    assert not JobStart.objects.exists()


# --- objects and arguments


def test_no_more_keys_are_read_than_may_be_started():
    read = []

    def many():
        for number in range(100_000):
            read.append(number)
            yield number

    with pytest.raises(JobRefused, match="500 objects at most"):
        get_job_from_name("flag_custom", "datafile", many())
    assert len(read) == 501


@pytest.mark.parametrize("key", ["a\x00b", "\ud800"])
def test_a_key_that_no_row_can_keep_is_refused(key):
    code, message = refusal("flag_custom", "datafile", [key])
    assert code == 400
    assert "that databases do not keep" in message


def test_what_is_changed_after_the_checks_is_not_started(registering):
    given = {"custom_flag": {"values": [1]}}
    named = get_job_from_name("flag_custom", "datafile", [1], given)
    given["custom_flag"]["values"].append(2)
    assert named.apply_async().params["kwargs"]["custom_flag"] == {"values": [1]}


def test_an_argument_that_cannot_be_stored_is_a_bad_request():
    code, message = refusal("flag_custom", "datafile", [1], {"custom_flag": threading.Lock()})
    assert code == 400
    assert "do not fit" in message


def test_a_start_whose_unique_key_is_taken_says_so(registering):
    once = flag_custom.using(unique_key="flagging", on_conflict="raise")
    register_job("Once", "once", "datafile")(once)
    assert start_job_from_name("once", "datafile", [1])[0]

    success, message, code = start_job_from_name("once", "datafile", [2])

    assert (success, code) == (False, 400)
    assert message == (
        f"'Once' was not started, as task {TaskModel.objects.get().pk} does the same and has not "
        f"ended. Wait for it, or cancel it."
    )
    assert (TaskModel.objects.count(), JobStart.objects.count()) == (1, 1)


def test_what_is_nested_too_deeply_is_a_bad_request():
    deep: list[object] = []
    for _ in range(5_000):
        deep = [deep]
    code, message = refusal("flag_custom", "datafile", [1], {"custom_flag": deep})
    assert code == 400
    assert "nested too deeply" in message


def test_defaults_that_are_read_are_changed_for_nobody(registering):
    register_job("Tag", "tag", "datafile", default_args={"words": ["a"]})(tasks.tag)
    (job,) = (job for job in job_registry.registered_jobs() if job.task_name == "tag")
    job.default_args["words"].append("b")
    job.arguments[0].default.append("c")

    assert job.default_args == {"words": ["a"]}
    defaults = {argument.name: argument.default for argument in job.arguments}
    assert defaults == {"words": ["a"], "number": 7}
    named = get_job_from_name("tag", "datafile", [1])
    assert named.job.kwargs["words"] == ["a"]


# --- registering


def test_a_copy_of_a_task_is_started_with_its_own_options(registering):
    register_job("Slowly", "slowly", "datafile")(flag_custom.using(queue="slow", priority=-5))
    start_job_from_name("slowly", "datafile", [1])
    row = TaskModel.objects.get()
    assert (row.queue, row.priority, row.func_name) == ("slow", -5, flag_custom.name)


def test_who_starts_a_job_is_no_default(registering):
    with pytest.raises(TaskDefinitionError, match="user_pk, which each start says itself"):
        register_job("Spoof", "spoof", "datafile", default_args={"user_pk": 1})(flag_custom.func)


def test_a_name_is_taken_once(registering):
    def other(datafile_pks):
        pass

    with pytest.raises(TaskDefinitionError, match=r"flag_custom already is\. Give one"):
        register_job("Other", "flag_custom", "datafile")(other)
    # The same function again, of a module that is reloaded.
    register_job("Flag custom", "flag_custom", "datafile")(flag_custom)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"task_data_type": "data file"}, "a word such as 'datafile'"),
        ({"name": ""}, "name must be a text"),
        ({"max_items": 0}, "max_items must be a whole number"),
        ({"can_start": 5}, "can_start must be callable"),
        ({"default_args": {"nothing": 1}}, "it takes no nothing"),
        ({"task_data_type": "other"}, "it takes no other_pks"),
        ({"default_args": {"datafile_pks": [1]}}, "each start says itself"),
        ({"task_name": "shop/flag"}, "no slash, since it is part of a URL"),
        ({"task_name": "flag\n"}, "printable characters"),
        ({"task_name": "x" * 201}, "200 printable characters at most"),
        ({"task_data_type": "x" * 101}, "of 100 characters at most"),
    ],
)
def test_what_cannot_be_registered(registering, words, reason):
    def job(datafile_pks, flag=False):
        pass

    given = {"name": "Job", "task_name": "job", "task_data_type": "datafile", **words}
    with pytest.raises((TaskDefinitionError, TypeError, ValueError), match=reason):
        register_job(**given)(job)


def test_a_function_that_is_no_task_is_told(registering):
    def alone(datafile_pks):
        pass

    register_job("Alone", "alone", "datafile")(alone)
    with pytest.raises(TaskDefinitionError, match="which is no task"):
        start_job_from_name("alone", "datafile", [1])


def test_what_a_user_may_start_is_listed(user, staff):
    names = [job.task_name for job in job_registry.registered_jobs(staff, "datafile")]
    assert names == ["flag_custom", "rename_files"]
    (job,) = job_registry.registered_jobs(user, "datafile")
    assert (job.name, job.max_items, job.description) == (
        "Flag custom",
        500,
        "Flag files, or take the flag away.",
    )
    (argument,) = job.arguments
    assert (argument.name, argument.type, argument.is_required, argument.default) == (
        "custom_flag",
        bool,
        False,
        True,
    )
    assert argument.help == "Whether they get the flag or lose it."


# --- saved


@pytest.fixture
def saved(files):
    values: dict[str, Any] = {
        "name": "flag apollo",
        "task_name": "flag_custom",
        "obj_type": "datafile",
        "job_args": {"custom_flag": True},
        "target": files[0].project,
        "objects": "datafiles",
    }
    return SavedJob.objects.create(**values)


def test_a_saved_job_is_started_on_what_its_target_has_by_then(saved, files, user):
    new = DataFile.objects.create(name="new", project=files[0].project)
    DataFile.objects.create(name="of another")

    row = saved.start(user=user)

    assert row.params["kwargs"]["datafile_pks"] == [*pks(files), new.pk]
    assert row.params["kwargs"]["user_pk"] == user.pk
    assert saved.start(pks=[files[0].pk]).params["kwargs"]["datafile_pks"] == [files[0].pk]
    assert list(SavedJob.objects.for_target(files[0].project)) == [saved]
    assert SavedJob.objects.get(pk=saved.pk).target == files[0].project


def test_a_saved_job_makes_the_same_checks(saved, files):
    DataFile.objects.all().delete()
    with pytest.raises(JobRefused, match="needs at least one datafile") as caught:
        saved.start()
    assert caught.value.status_code == 400
    files[0].project.delete()
    with pytest.raises(JobRefused, match="does not exist"):
        saved.get_job()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"task_name": "flag"}, "task_name"),
        ({"obj_type": "project"}, "obj_type"),
        ({"job_args": {"datafile_pks": [1]}}, "job_args"),
        ({"relation": "files"}, "relation"),
        ({"target_pk": "0"}, "target_pk"),
        ({"target_pk": "no number"}, "target_pk"),
        ({"target_type": "datafiles.nothing"}, "target_type"),
        ({"target_type": "no label"}, "target_type"),
        ({"job_args": [1]}, "job_args"),
        ({"target_pk": ""}, "target_type"),
    ],
)
def test_what_is_wrong_with_a_saved_job_is_found_when_it_is_checked(saved, changes, field):
    saved.full_clean()
    for name, value in changes.items():
        setattr(saved, name, value)
    with pytest.raises(ValidationError) as caught:
        saved.full_clean()
    assert list(caught.value.message_dict) == [field]


@pytest.mark.parametrize(
    "changes",
    [{"target_pk": "no number"}, {"target_type": "datafiles.nothing"}, {"target_type": "no label"}],
)
def test_a_saved_job_whose_target_cannot_be_looked_up_is_refused(saved, changes):
    for name, value in changes.items():
        setattr(saved, name, value)
    with pytest.raises(JobRefused, match="Saved job 'flag apollo'") as caught:
        saved.get_job()
    assert caught.value.status_code == 400


def test_a_saved_job_without_arguments_is_saved(saved):
    saved.job_args = None  # an empty field of a form
    saved.full_clean()
    saved.save()
    assert SavedJob.objects.get().job_args == {}


def test_a_saved_job_reads_no_more_keys_than_may_be_started(saved, files):
    many = [DataFile(name="many", project=files[0].project) for _ in range(600)]
    DataFile.objects.bulk_create(many)
    assert len(saved.current_pks(at_most=500)) == 501
    with pytest.raises(JobRefused, match="500 objects at most"):
        saved.start()
    assert TaskModel.objects.count() == 0


@isolate_apps("testproject.datafiles")
def test_a_saved_job_belongs_to_the_model_of_a_proxy(saved, files):
    class Programme(Project):
        class Meta:
            app_label = "datafiles"
            proxy = True

    saved.target = Programme.objects.get(pk=files[0].project_id)
    saved.save()
    assert saved.target_type == "datafiles.project"
    assert list(SavedJob.objects.for_target(files[0].project)) == [saved]


def test_a_saved_job_of_which_nothing_is_left_fails_its_schedule_and_no_other(saved, files):
    empty = Project.objects.create(name="empty")
    nothing = SavedJob(name="of nothing", task_name="flag_custom", obj_type="datafile")
    nothing.target, nothing.relation = empty, "datafiles"
    nothing.save()
    rows = [
        ScheduleModel.objects.create(name=job.name, saved_job=job, every=60)
        for job in (nothing, saved)
    ]
    ScheduleModel.objects.update(next_run=datetime.now(UTC) - timedelta(seconds=5))

    assert firing.fire_due(using="default").calls == 1

    for row in rows:
        row.refresh_from_db()
        assert row.next_run
        assert row.next_run > datetime.now(UTC)
    assert (rows[0].failure_count, rows[1].failure_count) == (1, 0)
    assert "at least one datafile" in rows[0].last_error


def test_a_schedule_starts_a_saved_job(saved, files):
    schedule = ScheduleModel.objects.create(name="nightly flags", saved_job=saved, every=60)
    ScheduleModel.objects.filter(pk=schedule.pk).update(
        next_run=datetime.now(UTC) - timedelta(seconds=5)
    )

    assert firing.fire_due(using="default").calls == 1
    run_burst()

    assert DataFile.objects.filter(custom_flag=True).count() == 3
    schedule.refresh_from_db()
    assert (schedule.success_count, schedule.last_result) == (1, 3)
    DataFile.objects.all().delete()
    with pytest.raises(JobRefused):
        schedule.run_now()
