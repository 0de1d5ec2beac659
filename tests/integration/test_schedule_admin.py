"""The pages of schedules, saved jobs and starts, as far as no browser is needed."""

from datetime import date, timedelta
from decimal import Decimal
from typing import Any
from unittest import mock

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.contrib.messages import get_messages
from django.core.exceptions import ValidationError
from django.test import Client

from firefly_jobs import job_registry, planning
from firefly_jobs.admin import forms
from firefly_jobs.admin.forms import arguments_form, entered
from firefly_jobs.exceptions import JobRefused
from firefly_jobs.models import JobStart, SavedJob, ScheduleModel, TaskModel
from testproject.datafiles.models import DataFile, Project
from tests.conformance import tasks

pytestmark = pytest.mark.django_db

SCHEDULES = "/admin/firefly_jobs/schedulemodel/"


@pytest.fixture
def admin_client(admin_user):
    found = Client()
    found.force_login(admin_user)
    return found


@pytest.fixture
def registering():
    with mock.patch.object(job_registry, "_jobs", dict(job_registry._jobs)):
        yield


def schedule(name, **words):
    return ScheduleModel.objects.create(name=name, func_name=tasks.nothing.name, every=60, **words)


def act(client, action, *rows):
    return client.post(SCHEDULES, {"action": action, "_selected_action": [r.pk for r in rows]})


def told(answer):
    return [str(message) for message in get_messages(answer.wsgi_request)]


def posted(**changes):
    found = {
        "name": "s",
        "func_name": tasks.nothing.name,
        "saved_job": "",
        "arguments": "null",
        "every": "60",
        "misfire": "once",
        "overlap": "skip",
        "jitter": "0",
    }
    return {**found, **changes}


def test_one_that_is_broken_can_be_paused_and_stops_nobody_else(admin_client):
    broken, other = schedule("a"), schedule("b")
    ScheduleModel.objects.filter(pk=broken.pk).update(arguments={"args": [1, 2, 3]})

    answer = act(admin_client, "pause_selected", broken, other)

    assert told(answer) == ["Paused 2 schedules."]
    answer = act(admin_client, "resume_selected", broken, other)
    problem, done = told(answer)[-2:]
    assert problem.startswith("a: tests.conformance.tasks.nothing() -> None cannot be called")
    assert done == "Resumed 1 schedule."
    other.refresh_from_db()
    assert not other.is_paused
    # It was not paused any more.
    assert told(act(admin_client, "resume_selected", other))[-1] == "There was nothing to do."


def test_the_page_of_a_broken_one_says_why_in_place_of_when(admin_client):
    row = schedule("a")
    ScheduleModel.objects.filter(pk=row.pk).update(arguments={"args": [1, 2, 3]})
    page = admin_client.get(f"{SCHEDULES}{row.pk}/change/").content.decode()
    assert "cannot be called like this" in page
    row.pause()
    page = admin_client.get(f"{SCHEDULES}{row.pk}/change/").content.decode()
    assert "none while it is paused" in page


def test_a_new_one_is_asked_for_what_a_person_can_say(admin_client):
    page = admin_client.get(f"{SCHEDULES}add/").content.decode()
    assert 'name="cron"' in page
    for word in ("How it goes", "Declared by", "Next occurrences", "Successes"):
        assert word not in page


def test_an_interval_is_shown_in_words(admin_client):
    schedule("s")
    ScheduleModel.objects.update(every=30 * 86400)
    assert "30 d<" in admin_client.get(SCHEDULES).content.decode()


def test_what_cannot_be_run_now_is_told(admin_client, monkeypatch):
    row = schedule("s")
    monkeypatch.setattr(
        ScheduleModel, "run_now", mock.Mock(side_effect=ValidationError({"name": "no such"}))
    )
    assert told(act(admin_client, "run_selected_now", row)) == ["s: no such"]


@pytest.mark.parametrize("depth", [300, 900, 5_000, 100_000])
@pytest.mark.parametrize(
    ("url", "field"),
    [(f"{SCHEDULES}add/", "arguments"), ("/admin/firefly_jobs/savedjob/add/", "job_args")],
)
def test_arguments_that_are_nested_deeply_are_refused(admin_client, url, field, depth):
    saved = {"task_name": "rename_files", "target_type": "", "target_pk": "", "relation": ""}
    data = {**posted(), **saved, field: "[" * depth + "]" * depth}
    answer = admin_client.post(url, data)
    assert answer.status_code == 200
    assert answer.context["adminform"].form.errors[field]


@pytest.mark.parametrize(
    ("url", "field"),
    [(f"{SCHEDULES}add/", "arguments"), ("/admin/firefly_jobs/savedjob/add/", "job_args")],
)
def test_half_a_surrogate_pair_is_refused_and_shown_again(admin_client, url, field):
    data = {**posted(), "task_name": "rename_files", field: r'{"args": ["\ud800"]}'}
    answer = admin_client.post(url, data)
    assert answer.status_code == 200
    assert answer.context["adminform"].form.errors[field]
    assert r"\ud800" in answer.content.decode()


@pytest.mark.parametrize("what", ["changed", "deleted"])
def test_who_saves_after_somebody_else_is_told_so(admin_client, monkeypatch, what):
    row = schedule("s")
    check = planning.check_call

    def meanwhile(instance):
        check(instance)
        rows = ScheduleModel.objects.filter(pk=row.pk)
        rows.update(timezone="Europe/Oslo") if what == "changed" else rows.delete()

    monkeypatch.setattr(forms, "check_call", meanwhile)
    answer = admin_client.post(f"{SCHEDULES}{row.pk}/change/", posted(every="90"))
    assert answer.status_code == 302
    assert told(answer)[-1].startswith("Nothing was saved, as somebody else has changed it")
    # The test's own transaction keeps what came between.
    assert not ScheduleModel.objects.filter(every=90).exists()


def test_a_wrong_zone_and_a_wrong_expression_are_told_at_once(admin_client):
    changes = posted(every="", cron="x", timezone="Not/There")
    errors = admin_client.post(f"{SCHEDULES}add/", changes).context["adminform"].form.errors
    assert set(errors) == {"cron", "timezone"}
    assert all(len(problems) == 1 for problems in errors.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"every": "", "cron": "* * * * *", "timezone": "Europe/Olso"}, "Europe/Olso"),
        ({"every": "0"}, "An interval must be"),
        ({"every": "", "cron": "0 0 30 2 *"}, "never"),
        ({"arguments": '{"args": [NaN]}'}, "JSON"),
        ({"arguments": '{"args": ["\\\\u0000"]}'}, "no database stores"),
        ({"arguments": '{"args": [1]}'}, "cannot be called like this"),
        ({"misfire": "all"}, "Choose overlap"),
        ({"func_name": ""}, "Choose a function, or a saved job."),
    ],
)
def test_what_is_wrong_is_told_in_the_form_and_nothing_is_written(admin_client, changes, words):
    row = schedule("s")
    for url in (f"{SCHEDULES}add/", f"{SCHEDULES}{row.pk}/change/"):
        name = "s" if str(row.pk) in url else "another"
        answer = admin_client.post(url, posted(name=name, **changes))
        assert answer.status_code == 200
        assert words in answer.content.decode().replace("&#x27;", "'")
    assert list(ScheduleModel.objects.values_list("name", "every")) == [("s", 60.0)]


def test_a_page_of_what_cannot_be_read_says_why(admin_client):
    row = schedule("s")
    ScheduleModel.objects.filter(pk=row.pk).update(every=None, cron="x", timezone="Not/There")
    answer = admin_client.get(f"{SCHEDULES}{row.pk}/change/")
    assert answer.status_code == 200
    assert "Not/There" in answer.content.decode()
    assert admin_client.get(SCHEDULES).status_code == 200


@pytest.fixture
def saved():
    project = Project.objects.create(name="apollo")
    DataFile.objects.create(name="a", project=project)
    values: dict[str, Any] = {
        "name": "rename",
        "task_name": "rename_files",
        "obj_type": "datafile",
        "job_args": {"prefix": "x"},
        "target": project,
        "objects": "datafiles",
    }
    return SavedJob.objects.create(**values)


def test_a_page_shows_counts_and_no_word_of_json_where_there_are_no_arguments(admin_client):
    row = schedule("s")
    ScheduleModel.objects.filter(pk=row.pk).update(
        arguments=None, run_count=1200, success_count=1100, failure_count=100
    )
    assert "1,200 / 1,100 / 100" in admin_client.get(SCHEDULES).content.decode()
    page = admin_client.get(f"{SCHEDULES}{row.pk}/change/").content.decode()
    assert ">null<" not in page.replace("\n", "")
    answer = admin_client.post(f"{SCHEDULES}{row.pk}/change/", posted(arguments="", every="90"))
    assert answer.status_code == 302
    row.refresh_from_db()
    assert (row.arguments, row.every) == (None, 90)


def test_a_saved_job_is_run_by_hand_by_who_may_start_it(admin_client, admin_user, saved):
    row = ScheduleModel.objects.create(name="nightly", saved_job=saved, every=60)

    answer = act(admin_client, "run_selected_now", row)

    assert told(answer)[0].startswith("Started")
    start = JobStart.objects.get()
    assert (start.user_pk, start.task_name) == (str(admin_user.pk), "rename_files")
    assert row.tasks.get().is_manual
    nobody = get_user_model().objects.create_user("eve")
    with pytest.raises(JobRefused, match="Only staff may start"):
        row.run_now(user=nobody)
    assert TaskModel.objects.count() == 1
    # The code itself may.
    assert row.run_now().is_manual
    assert JobStart.objects.count() == 1


def test_a_schedule_of_a_saved_job_is_changed_after_it_has_run(admin_client, saved):
    row = ScheduleModel.objects.create(name="s", saved_job=saved, every=60)
    row.run_now()
    changes = posted(func_name="", saved_job=str(saved.pk), every="120")
    answer = admin_client.post(f"{SCHEDULES}{row.pk}/change/", changes)
    assert answer.status_code == 302
    row.refresh_from_db()
    assert (row.every, row.calls) == (120, "saved job rename")


def test_a_saved_job_without_objects_is_not_put_on_a_schedule(admin_client, saved):
    saved.target, saved.relation = None, ""
    saved.save()
    changes = posted(func_name="", saved_job=str(saved.pk))
    answer = admin_client.post(f"{SCHEDULES}add/", changes)
    assert "no target with a relation" in answer.content.decode()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"target_type": "nope", "target_pk": "1", "relation": "x"},
            "There is no model &#x27;nope&#x27;",
        ),
        (
            {"target_type": "a.b.c", "target_pk": "1", "relation": "x"},
            "There is no model &#x27;a.b.c&#x27;",
        ),
        ({"relation": "datafiles"}, "A relation belongs to a target"),
        ({"job_args": '"x"'}, "got a text"),
        ({"job_args": '{"prefix": 7}'}, "prefix must be a text, got a number"),
    ],
)
def test_what_is_wrong_with_a_saved_job_is_told_in_words(admin_client, changes, words):
    good = {
        "name": "s",
        "task_name": "rename_files",
        "job_args": '{"prefix": "x"}',
    }
    answer = admin_client.post("/admin/firefly_jobs/savedjob/add/", {**good, **changes})
    assert answer.status_code == 200
    assert words in answer.content.decode()
    answer = admin_client.post("/admin/firefly_jobs/savedjob/add/", good)
    assert answer.status_code == 302
    assert SavedJob.objects.get().obj_type == "datafile"


def test_saved_jobs_are_listed_by_the_names_that_people_know(admin_client, saved):
    page = admin_client.get("/admin/firefly_jobs/savedjob/").content.decode()
    assert "apollo (project)" in page
    assert job_registry.find("rename_files").name in page
    Project.objects.all().delete()
    SavedJob.objects.create(name="lost", task_name="no_such_job", obj_type="x")
    page = admin_client.get("/admin/firefly_jobs/savedjob/").content.decode()
    assert f"gone: datafiles.project {saved.target_pk}" in page
    assert "no_such_job" in page


# --- the form of a start


def form_of(task, data=None):
    registered = job_registry.register_job("Job", "job", "datafile")(task)
    assert registered is task
    found = job_registry.find("job")
    return arguments_form(found)(
        None if data is None else {f"arg-{name}": value for name, value in data.items()}
    )


def shown(form):
    """Return what a browser would send if nobody touched the form."""
    found = {name: form.get_initial_for_field(field, name) for name, field in form.fields.items()}
    return {
        name: form.fields[name].prepare_value(value)
        for name, value in found.items()
        if value not in {None, False}
    }


def test_a_form_that_nobody_touches_says_what_the_function_would(registering):
    data = {**shown(form_of(tasks.paint)), "day": "2026-11-26"}
    form = form_of(tasks.paint, data)
    assert form.is_valid(), form.errors
    assert entered(form) == {
        "day": date(2026, 11, 26),
        "colour": tasks.Colour.RED,
        "price": Decimal("9.90"),
        "pause": timedelta(minutes=2),
        "is_dry": None,
        "note": "none",
        "number": 4,
    }


def test_what_is_emptied_is_empty_where_that_can_be(registering):
    data = {"day": "2026-11-26", "note": "", "number": "", "price": "", "is_dry": "false"}
    form = form_of(tasks.paint, {**shown(form_of(tasks.paint)), **data})
    assert form.is_valid(), form.errors
    found = entered(form)
    assert (found["note"], found["number"], found["is_dry"]) == ("", None, False)
    assert "price" not in found


def test_a_list_is_written_as_json_and_a_text_that_nobody_annotated_as_it_is(registering):
    form = form_of(tasks.loose)
    assert shown(form) == {"words": "Hello", "days": '["2026-11-26"]', "either": '"x"'}
    form = form_of(tasks.loose, shown(form))
    assert form.is_valid(), form.errors
    assert entered(form) == {"words": "Hello", "days": [date(2026, 11, 26)], "either": "x"}
    for days in ('["tomorrow"]', "[", "7"):
        assert set(form_of(tasks.loose, {"days": days}).errors) == {"days"}


def test_what_was_entered_is_still_there_when_a_start_is_refused(admin_client, registering):
    job_registry.register_job("Paint", "paint", "datafile")(tasks.paint)
    file = DataFile.objects.create(name="a")
    page = {
        "action": "start_job_paint",
        "_selected_action": [file.pk],
        "firefly_confirmed": "paint",
        "arg-day": "2026-11-26",
        "arg-colour": "BLUE",
        "arg-price": "1",
        "arg-pause": "60",
        "arg-note": "remember me",
    }
    with mock.patch.object(
        job_registry.NamedJob, "start", side_effect=JobRefused("not today", 400)
    ):
        answer = admin_client.post("/admin/datafiles/datafile/", page)
    text = answer.content.decode()
    assert "not today" in text
    assert "remember me" in text


def test_looking_at_rows_is_enough_to_be_offered_their_jobs(registering):
    viewer = get_user_model().objects.create_user("eve", is_staff=True)
    viewer.user_permissions.set(Permission.objects.filter(codename="view_datafile"))
    client = Client()
    client.force_login(viewer)
    DataFile.objects.create(name="a")
    assert "Start: Flag custom" in client.get("/admin/datafiles/datafile/").content.decode()
