"""Registered jobs as a program uses them: over a real socket, beside a real consumer."""

import http.cookiejar
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import pytest
from django.contrib.auth.models import User

from firefly_jobs.models import JobStart
from testproject.datafiles.models import DataFile
from tests.conftest import StartConsumer

pytestmark = pytest.mark.django_db(transaction=True)


class Program:
    """Signs in as a browser does, then speaks JSON; knows nothing but addresses."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.cookies = http.cookiejar.CookieJar()
        self.opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(self.cookies)
        )

    @property
    def token(self) -> str:
        return next(str(c.value) for c in self.cookies if c.name == "csrftoken")

    def sign_in(self, name: str, password: str) -> None:
        login = f"{self.address}/admin/login/"
        with self.opener.open(login, timeout=20) as page:
            (hidden,) = set(re.findall(r'csrfmiddlewaretoken" value="(\w+)"', page.read().decode()))
        words = {"username": name, "password": password, "csrfmiddlewaretoken": hidden}
        form = urllib.parse.urlencode({**words, "next": "/api/jobs/"}).encode()
        self.opener.open(login, form, timeout=20).close()

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Send a request, a POST if there is a body; return the code and what the JSON says."""
        data = None if body is None else json.dumps(body).encode()
        words = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(f"{self.address}/api/{path}", data, words)
        try:
            with self.opener.open(request, timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


def test_a_program_starts_a_job_and_reads_its_result(
    live_server: Any, start_consumer: StartConsumer
) -> None:
    # Staff, since the admin has the only page to sign in at; no permission comes with that.
    ada = User.objects.create_user("ada", password="lovelace", is_staff=True)
    User.objects.create_user("eve", password="listening", is_staff=True)
    files = [DataFile.objects.create(name=f"{number}").pk for number in range(3)]
    program = Program(live_server.url)
    body = {"obj_pks": files, "job_args": {"custom_flag": True}}

    assert program.ask("jobs/")[0] == 401
    program.sign_in("ada", "lovelace")
    code, listed = program.ask("jobs/")
    assert code == 200
    assert "flag_custom" in [job["task_name"] for job in listed["jobs"]]

    code, refused = program.ask("jobs/flag_custom/start/", body)
    assert (code, "CSRF" in refused["message"]) == (403, True)
    assert not JobStart.objects.exists()

    token = {"X-CSRFToken": program.token}
    code, started = program.ask("jobs/flag_custom/start/", body, **token)
    assert code == 200
    task_id = started["task"]["id"]
    assert f"task {task_id}" in started["message"]
    assert JobStart.objects.get().user_pk == str(ada.pk)

    assert start_consumer("--burst").wait() == 0
    code, found = program.ask(f"tasks/{task_id}/")
    assert (code, found["result"], found["error"]) == (200, 3, "")
    assert DataFile.objects.filter(custom_flag=True).count() == 3
    assert [task["id"] for task in program.ask("tasks/")[1]["tasks"]] == [task_id]

    other = Program(live_server.url)
    other.sign_in("eve", "listening")
    assert other.ask(f"tasks/{task_id}/")[0] == 404
    assert other.ask("tasks/") == (200, {"tasks": [], "next": None})
