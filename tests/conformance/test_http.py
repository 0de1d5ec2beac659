"""Registered jobs over HTTP, as a browser and as a program use them."""

import json
from datetime import date, timedelta
from decimal import Decimal
from typing import Any
from unittest import mock
from urllib.parse import quote

import pytest
import schemathesis
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.core.exceptions import (
    BadRequest,
    DisallowedRedirect,
    PermissionDenied,
    ValidationError,
)
from django.core.handlers.wsgi import WSGIHandler
from django.shortcuts import get_object_or_404
from django.test import Client
from django.test.client import FakePayload
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from firefly_jobs import job_registry
from firefly_jobs.models import JobStart, SavedJob, ScheduleModel, TaskModel
from testproject.datafiles.models import DataFile
from testproject.datafiles.tasks import flag_custom
from tests.conformance import tasks
from tests.conformance.support import run_burst
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def user():
    return get_user_model().objects.create_user("ada", password="lovelace")


@pytest.fixture
def client(user):
    found = Client()
    found.force_login(user)
    return found


def by_token(request):
    """Be an authenticator: the header names the user."""
    name = request.headers.get("X-Token")
    return get_user_model().objects.filter(username=name).first() if name else None


@pytest.fixture
def authenticator(jobs):
    jobs(API_AUTHENTICATOR="tests.conformance.test_http.by_token")


def post(client, name, body, **extra):
    text = body if isinstance(body, str) else json.dumps(body)
    return client.post(f"/api/jobs/{name}/start/", text, content_type="application/json", **extra)


def test_a_job_is_started_watched_and_read(client, user):
    files = [DataFile.objects.create(name=f"{n}") for n in range(2)]

    answer = post(client, "flag_custom", {"obj_pks": [file.pk for file in files]})

    assert answer.status_code == 200
    found = answer.json()
    pk = found["task"]["id"]
    assert found["message"] == f"Started 'Flag custom' as task {pk}."
    assert (found["task"]["status"], found["task"]["progress"]) == ("created", 0.0)
    assert JobStart.objects.get().user_pk == str(user.pk)
    run_burst()
    found = client.get(f"/api/tasks/{pk}/").json()
    assert (found["status"], found["result"], found["progress"]) == ("completed", 2, 1.0)
    assert DataFile.objects.filter(custom_flag=True).count() == 2


def test_jobs_are_listed_with_what_a_form_needs(client):
    (job,) = [j for j in client.get("/api/jobs/").json()["jobs"] if j["obj_type"] == "datafile"]
    assert (job["task_name"], job["name"], job["max_items"]) == ("flag_custom", "Flag custom", 500)
    assert job["arguments"] == [
        {
            "name": "custom_flag",
            "schema": {"type": "boolean"},
            "is_required": False,
            "default": True,
            "help": "Whether they get the flag or lose it.",
        }
    ]


@pytest.mark.parametrize(
    ("name", "body", "code", "words"),
    [
        ("flag_costum", {"obj_pks": [1]}, 404, "Did you mean 'flag_custom'"),
        ("flag_custom", {"obj_pks": []}, 400, "at least one datafile"),
        ("flag_custom", {}, 400, "at least one datafile"),
        ("flag_custom", {"obj_pks": [1], "obj_type": "project"}, 400, "not 'project'"),
        ("flag_custom", {"obj_pks": [1], "pks": [2]}, 400, "not pks"),
        ("flag_custom", {"obj_pks": list(range(501))}, 400, "500 objects at most"),
        ("rename_files", {"obj_pks": [1]}, 403, "Only staff"),
        ("flag_custom", "{", 400, "no JSON"),
        ("flag_custom", "[" * 5_000, 400, "no JSON"),
        ("flag_custom", "[]", 400, "The body is an object"),
        ("flag_custom", "x" * 3_000_000, 413, "too large"),
    ],
)
def test_refusals_say_what_is_wrong(client, name, body, code, words):
    answer = post(client, name, body)
    assert answer.status_code == code
    assert words in answer.json()["message"]
    assert TaskModel.objects.count() == 0


def test_nobody_is_asked_to_sign_in(user):
    for path in ("jobs", "tasks", "tasks/1"):
        assert Client().get(f"/api/{path}/").status_code == 401
    assert post(Client(), "flag_custom", {"obj_pks": [1]}).status_code == 401
    client = Client()
    client.force_login(user)
    user.is_active = False
    user.save()
    assert client.get("/api/jobs/").status_code in {401, 403}


def test_a_session_needs_a_token_against_forgery(user):
    client = Client(enforce_csrf_checks=True)
    client.force_login(user)
    body = {"obj_pks": [1]}

    answer = post(client, "flag_custom", body)
    assert (answer.status_code, TaskModel.objects.count()) == (403, 0)
    assert "CSRF" in answer.json()["message"]

    client.get("/admin/login/")
    token = client.cookies["csrftoken"].value
    assert post(client, "flag_custom", body, headers={"X-CSRFToken": token}).status_code == 200
    assert client.get("/api/jobs/").status_code == 200


def test_an_authenticator_of_ones_own_needs_none(user, authenticator):
    client = Client(enforce_csrf_checks=True, headers={"X-Token": "ada"})
    assert post(client, "flag_custom", {"obj_pks": [1]}).status_code == 200
    assert JobStart.objects.get().user_pk == str(user.pk)
    wrong = Client(headers={"X-Token": "bob"})
    assert wrong.get("/api/jobs/").status_code == 401


def test_users_see_what_they_started_and_staff_with_permission_all(client, user):
    mine = post(client, "flag_custom", {"obj_pks": [1]}).json()["task"]["id"]
    other = tasks.nothing.schedule().pk

    assert [task["id"] for task in client.get("/api/tasks/").json()["tasks"]] == [mine]
    assert client.get(f"/api/tasks/{other}/").status_code == 404
    assert client.get("/api/tasks/9223372036854775808/").status_code == 404
    user.is_staff = True
    user.save()
    assert client.get(f"/api/tasks/{other}/").status_code == 404
    user.user_permissions.add(Permission.objects.get(codename="view_taskmodel"))
    assert client.get(f"/api/tasks/{other}/").status_code == 200
    assert len(client.get("/api/tasks/").json()["tasks"]) == 2


def test_tasks_are_listed_page_by_page(client):
    ids = [post(client, "flag_custom", {"obj_pks": [1]}).json()["task"]["id"] for _ in range(5)]
    found: list[int] = []
    before: Any = ""
    while before is not None:
        page = client.get(f"/api/tasks/?limit=2{before and f'&before={before}'}").json()
        found += [task["id"] for task in page["tasks"]]
        before = page["next"]
    assert found == ids[::-1]
    for query in ("limit=0", "limit=201", "limit=x", "before=-1"):
        assert client.get(f"/api/tasks/?{query}").status_code == 400


def test_results_that_are_no_json_are_told_as_text(client, user):
    tasks.BODIES["odd"] = lambda: {1, 2}
    row = tasks.call.schedule("odd")
    JobStart.objects.create(task_id=row.pk, user_pk=user.pk, task_name="x", obj_type="y")
    run_burst()
    found = client.get(f"/api/tasks/{row.pk}/").json()
    assert (found["result"], found["result_text"]) == (None, "{1, 2}")
    TaskModel.objects.filter(pk=row.pk).update(raw_returned="pickle:forged:AAAA")
    found = client.get(f"/api/tasks/{row.pk}/").json()
    assert "BadSignature" in found["result_text"]
    assert not Effect.objects.exists()


def test_other_methods_are_refused_in_json(client):
    answer = client.delete("/api/jobs/")
    assert (answer.status_code, answer["Allow"]) == (405, "GET, HEAD, OPTIONS")
    assert "DELETE is not allowed" in answer.json()["message"]


@pytest.mark.parametrize("method", ["post", "put", "delete"])
@pytest.mark.parametrize("path", ["jobs/", "tasks/", "tasks/1/", "openapi.json"])
def test_no_path_but_that_of_a_start_takes_another_method(client, path, method):
    answer = getattr(client, method)(f"/api/{path}")
    assert answer.status_code == 405
    assert "is not allowed here" in answer.json()["message"]


def test_a_start_takes_nothing_but_a_post(client):
    for method in ("get", "put", "delete"):
        answer = getattr(client, method)("/api/jobs/flag_custom/start/")
        assert (answer.status_code, answer["Allow"]) == (405, "POST, OPTIONS")


@pytest.mark.parametrize("task_id", ["9" * 5_000, "9" * 20, "-1", "x", "\u0663", "1.0"])
def test_what_is_no_id_of_a_task_is_not_found(client, task_id):
    answer = client.get(f"/api/tasks/{quote(task_id)}/")
    assert answer.status_code == 404
    assert "that you may see" in answer.json()["message"]


def test_a_task_of_others_and_none_are_told_by_the_same_words(client):
    others = tasks.nothing.schedule().pk
    answers = [client.get(f"/api/tasks/{pk}/") for pk in (others, others + 1_000)]
    words = [
        answer.json()["message"].replace(str(pk), "N")
        for answer, pk in zip(answers, (others, others + 1_000), strict=True)
    ]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert words[0] == words[1]


@pytest.mark.parametrize("key", ["a\x00b", "\ud800", {"pk": 1}, None, 1.5, True])
def test_what_is_no_key_of_an_object_is_a_bad_request(client, key):
    answer = post(client, "flag_custom", {"obj_pks": [key]})
    assert answer.status_code == 400
    assert "The key of an object" in answer.json()["message"]


@pytest.fixture
def signed_in(user):
    """Return a client as a browser is one: with a session and a token against forgery."""
    client = Client(enforce_csrf_checks=True)
    client.force_login(user)
    client.get("/admin/login/")
    client.defaults["HTTP_X_CSRFTOKEN"] = client.cookies["csrftoken"].value
    return client


def test_a_form_is_no_json_whatever_its_parts(signed_in):
    answer = signed_in.post("/api/jobs/flag_custom/start/", {"obj_pks": "1"})
    assert answer.status_code == 400
    assert "The body is no JSON" in answer.json()["message"]


def test_a_form_that_is_too_large_is_refused_in_json(signed_in):
    form = f"obj_pks={'1' * 3_000_000}"
    answer = signed_in.post(
        "/api/jobs/flag_custom/start/", form, content_type="application/x-www-form-urlencoded"
    )
    assert answer.status_code == 413
    assert "too large" in answer.json()["message"]


def test_a_token_in_a_form_lets_nothing_in_that_is_no_json(user):
    client = Client(enforce_csrf_checks=True)
    client.force_login(user)
    client.get("/admin/login/")
    token = client.cookies["csrftoken"].value
    answer = client.post("/api/jobs/flag_custom/start/", {"csrfmiddlewaretoken": token})
    assert answer.status_code in {400, 403}
    assert TaskModel.objects.count() == 0


def test_answers_for_one_user_are_kept_for_no_other(client):
    for path in ("jobs/", "tasks/"):
        assert "private" in client.get(f"/api/{path}")["Cache-Control"]
        assert "no-store" in client.get(f"/api/{path}")["Cache-Control"]


def denied(request):
    """Be an authenticator that refuses by raising."""
    message = "This token has expired."
    raise PermissionDenied(message)


def silently_denied(request):
    """Be one that gives no reason."""
    raise PermissionDenied


def missing(request):
    """Be an authenticator that looks its tokens up as views do."""
    return get_object_or_404(get_user_model(), username="nobody")


def suspicious(request):
    """Be one that takes a signature for forged."""
    message = "forged"
    raise DisallowedRedirect(message)


def bad(request):
    """Be one that can make nothing of the request."""
    message = "two tokens"
    raise BadRequest(message)


def reading(request):
    """Be one that signs the body."""
    return request.body and None


def reading_a_form(request):
    """Be one that takes the token from a form."""
    return request.POST.get("token") and None


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("denied", 403, "This token has expired."),
        ("silently_denied", 403, "You may not do this."),
        ("missing", 404, "No User matches the given query."),
        ("suspicious", 400, "The request was refused."),
        ("bad", 400, "two tokens"),
    ],
)
def test_what_an_authenticator_raises_is_told_in_json(jobs, name, code, words):
    jobs(API_AUTHENTICATOR=f"tests.conformance.test_http.{name}")
    for answer in (Client().get("/api/jobs/"), post(Client(), "flag_custom", {"obj_pks": [1]})):
        assert (answer.status_code, answer.json()) == (code, {"message": words})
        assert "no-store" in answer["Cache-Control"]


@pytest.mark.parametrize(
    ("name", "form", "code"),
    [
        ("reading", f"a={'1' * 3_000_000}", 413),
        ("reading_a_form", f"a={'1' * 3_000_000}", 413),
        ("reading_a_form", "&".join(f"a{n}=1" for n in range(1_100)), 400),
    ],
)
def test_a_body_that_an_authenticator_cannot_read_is_refused_in_json(jobs, name, form, code):
    jobs(API_AUTHENTICATOR=f"tests.conformance.test_http.{name}")
    answer = Client().post(
        "/api/jobs/flag_custom/start/", form, content_type="application/x-www-form-urlencoded"
    )
    assert answer.status_code == code
    assert answer.json()["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/x-www-form-urlencoded", "&".join(f"a{n}=1" for n in range(1_100))),
        ("multipart/form-data", "x"),
        ("multipart/form-data; boundary=\u00e9", "x"),
        ("multipart/form-data; boundary=x", "--x\r\nno form"),
        ("application/x-www-form-urlencoded; charset=nothing", "a=1"),
        ("application/json; charset=nothing", "{}"),
        ("text/plain", "\xff\xfe"),
    ],
)
def test_a_body_of_another_kind_is_refused_in_json(user, kind, body):
    # Without a token in the header, so that one is looked for in the form.
    client = Client(enforce_csrf_checks=True)
    client.force_login(user)
    client.get("/admin/login/")
    answer = client.generic("POST", "/api/jobs/flag_custom/start/", body, content_type=kind)
    assert answer.status_code in {400, 403}
    assert answer.json()["message"]


def test_a_body_that_breaks_off_is_refused_in_json(client):
    class Broken(FakePayload):
        def read(self, *args, **kwargs):
            message = "the client has gone"
            raise OSError(message)

    answer = client.post(
        "/api/jobs/flag_custom/start/",
        "{}",
        content_type="application/json",
        **{"wsgi.input": Broken(b"{}")},
    )
    assert answer.status_code == 400
    assert answer.json()["message"] == "The body could not be read."


def test_what_a_jobs_own_check_does_not_find_is_told_in_json(client):
    def can_start(person, pks):
        return get_object_or_404(DataFile, pk=pks[0])

    with mock.patch.object(job_registry, "_jobs", dict(job_registry._jobs)):
        job_registry.register_job("Asks", "asks", "datafile", can_start=can_start)(flag_custom)
        answer = post(client, "asks", {"obj_pks": [4711]})
    assert answer.status_code == 404
    assert answer.json()["message"] == "No DataFile matches the given query."


def test_an_error_of_the_projects_own_is_not_hidden(jobs):
    jobs(API_AUTHENTICATOR="tests.conformance.test_http.by_number")
    with pytest.raises(KeyError):
        Client().get("/api/jobs/")


class Person:
    """A user as an authenticator may give it: of a project's own kind."""

    is_active = is_authenticated = True

    def __init__(self, pk):
        self.pk = pk


def by_number(request):
    """Be an authenticator that knows no users of Django."""
    return Person(request.headers["X-Number"])


def test_users_of_a_kind_that_has_no_staff_see_what_they_started(jobs, user):
    jobs(API_AUTHENTICATOR="tests.conformance.test_http.by_number")
    mine = Client(headers={"X-Number": str(user.pk)})
    started = post(mine, "flag_custom", {"obj_pks": [1]}).json()["task"]["id"]
    assert [task["id"] for task in mine.get("/api/tasks/").json()["tasks"]] == [started]
    assert Client(headers={"X-Number": "other"}).get("/api/tasks/").json()["tasks"] == []


class Silent:
    """Something that cannot even say what it is."""

    def __repr__(self):
        message = "no"
        raise RuntimeError(message)


def test_a_result_that_cannot_be_told_hides_no_other(client, user):
    tasks.BODIES["silent"] = Silent
    row = tasks.call.schedule("silent")
    JobStart.objects.create(task_id=row.pk, user_pk=user.pk, task_name="x", obj_type="y")
    run_burst()
    (found,) = client.get("/api/tasks/").json()["tasks"]
    assert found["status"] == "completed"
    assert found["result_text"] == "a Silent, whose repr() raises RuntimeError"


def test_a_job_that_is_no_task_hides_no_other(client):
    def alone(datafile_pks):
        pass

    with mock.patch.object(job_registry, "_jobs", dict(job_registry._jobs)):
        job_registry.register_job("Alone", "alone", "datafile")(alone)
        found = {job["task_name"] for job in client.get("/api/jobs/").json()["jobs"]}
    assert "flag_custom" in found
    assert "alone" not in found


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_as_the_description_says(user, authenticator, mode):
    get_user_model().objects.create_superuser("root")
    post(Client(headers={"X-Token": "root"}), "flag_custom", {"obj_pks": [1]})
    described = schemathesis.openapi.from_wsgi("/api/openapi.json", WSGIHandler())
    results: Any = described.get_all_operations()
    operations = [result.ok() for result in results]
    assert len(operations) == 4

    for operation in operations:

        @given(operation.as_strategy(mode))
        @settings(
            max_examples=25,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        def is_kept(case):
            case.call_and_validate(headers={"X-Token": "root"})

        try:
            is_kept()
        except Unsatisfiable:
            # Nothing about this operation can be wrong.
            assert mode is GenerationMode.NEGATIVE
            assert operation.label == "GET /jobs/"


# --- types


@pytest.fixture
def paint():
    jobs = mock.patch.object(job_registry, "_jobs", dict(job_registry._jobs))
    with jobs:
        yield job_registry.register_job("Paint", "paint", "datafile")(tasks.paint)


def test_values_become_what_the_function_is_annotated_with(client, paint):
    given = {"day": "2026-11-26", "colour": "BLUE", "price": "1.50", "pause": 1.5}
    assert post(client, "paint", {"obj_pks": [1], "job_args": given}).status_code == 200

    kwargs = TaskModel.objects.get().params["kwargs"]

    assert kwargs == {
        "datafile_pks": [1],
        "day": date(2026, 11, 26),
        "colour": tasks.Colour.BLUE,
        "price": Decimal("1.50"),
        "pause": timedelta(seconds=1.5),
    }
    for word, value in (("day", "x"), ("colour", "green"), ("price", []), ("day", None)):
        answer = post(client, "paint", {"obj_pks": [1], "job_args": {**given, word: value}})
        assert answer.status_code == 400
        assert f"{word} must be" in answer.json()["message"]


def test_types_and_defaults_are_listed_as_they_may_be_said(client, paint):
    jobs = {job["task_name"]: job for job in client.get("/api/jobs/").json()["jobs"]}
    found = {a["name"]: (a["schema"], a.get("default")) for a in jobs["paint"]["arguments"]}
    assert found["day"] == ({"type": "string", "format": "date"}, None)
    assert found["colour"] == ({"enum": ["RED", "BLUE"]}, "RED")
    assert found["pause"] == ({"type": "number", "description": "seconds"}, 120.0)
    said = {name: default for name, (_, default) in found.items() if default is not None}
    answer = post(client, "paint", {"obj_pks": [1], "job_args": {**said, "day": "2026-11-26"}})
    assert answer.status_code == 200


def test_a_saved_job_s_arguments_become_the_same(user, paint):
    saved = SavedJob(
        name="s", task_name="paint", obj_type="datafile", job_args={"day": "2026-11-26"}
    )
    saved.full_clean()
    saved.save()
    assert saved.start([1], user).params["kwargs"]["day"] == date(2026, 11, 26)
    saved.job_args = {"day": "tomorrow"}
    with pytest.raises(ValidationError, match="day must be a day such as"):
        saved.full_clean()


def test_a_schedule_s_arguments_become_the_same(paint):
    schedule = ScheduleModel.objects.create(
        name="s", func_name=tasks.paint.name, arguments={"args": [[1], "2026-11-26"]}
    )
    assert schedule.run_now().params["args"] == ([1], date(2026, 11, 26))
    with pytest.raises(ValidationError, match="day must be a day such as"):
        schedule.change(arguments={"args": [[1]], "kwargs": {"day": "tomorrow"}})


def test_arguments_that_are_nested_too_deeply_are_a_bad_request(client):
    deep = "[" * 600 + "]" * 600
    body = f'{{"obj_pks": [1], "job_args": {{"custom_flag": {deep}}}}}'
    answer = post(client, "flag_custom", body)
    assert answer.status_code == 400
    assert "message" in answer.json()
