"""The ready-made job types, against a real web server, mail server and database."""

import ipaddress
import socket
import ssl
import subprocess
import sys
from datetime import date, timedelta
from decimal import Decimal
from email import message_from_bytes, policy
from typing import Any

import django
import pytest
import trustme
from aiosmtpd.controller import Controller
from django.core import mail
from django.db import connection, transaction

from firefly_jobs import Job, PayloadError
from firefly_jobs.contrib import http
from firefly_jobs.contrib.jobs import DatabaseQueryJob, EmailJob, HTTPRequestJob, SQLQueryJob
from firefly_jobs.models import TaskModel
from tests.conformance.support import run_burst
from tests.factories import create_effect, unique_name
from tests.support.servers import free_port
from tests.support.threads import Concurrent
from tests.support.waiting import eventually
from tests.support.web_server import WebServer, web_server
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)

EFFECTS = Effect._meta.db_table


def ended(job: Job) -> TaskModel:
    row = job.schedule()
    run_burst()
    row.refresh_from_db()
    return row


# --- HTTP


@pytest.fixture(scope="module")
def _web():
    with web_server() as server:
        yield server


@pytest.fixture
def web(_web: WebServer):
    _web.requests.clear()
    _web.gate.clear()
    return _web


def request(url, *args, **words):
    """Return a job that may reach the tests' own server."""
    return HTTPRequestJob(url, *args, allow_private=True, **words)


@pytest.mark.parametrize(
    ("path", "status", "result"),
    [
        ("/json", 200, {"a": [1, None]}),
        ("/", 200, "hello"),
        ("/latin", 200, "é"),
        ("/empty", 204, ""),
    ],
)
def test_an_answer_is_json_where_it_says_so_and_else_text(web, path, status, result):
    row = ended(request(f"{web.url}{path}"))

    assert row.status == "completed", row.error
    assert set(row.returned) == {"status_code", "headers", "result"}
    assert (row.returned["status_code"], row.returned["result"]) == (status, result)
    assert row.returned["headers"]["content-type"].split(";")[0] in {
        "application/problem+json", "application/json", "text/html", "text/plain",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "body", "kind"),
    [
        ({"json": {"a": 1}}, b'{"a":1}', "application/json"),
        ({"data": {"a": "1 2"}}, b"a=1+2", "application/x-www-form-urlencoded"),
        ({"data": "text"}, b"text", None),
        ({"data": b"\x00\xff"}, b"\x00\xff", None),
        ({"json": [], "headers": {"Content-Type": "a/b"}}, b"[]", "a/b"),
    ],
)
def test_a_body_is_sent_as_it_was_given(web, words, body, kind):
    row = ended(request(f"{web.url}/x", "post", **words))

    ((method, path, headers, received),) = web.requests
    assert (row.status, method, path, received) == ("completed", "POST", "/x", body)
    assert headers.get("content-type") == kind
    assert headers["user-agent"].startswith("django-firefly-jobs/")


@pytest.mark.parametrize("status", [400, 404, 503])
def test_an_answer_that_is_an_error_fails_the_attempt_and_is_not_quoted(web, status):
    row = ended(request(f"{web.url}/status/{status}?token=secret"))

    assert row.status == "failed"
    assert row.error == f"HTTPRequestFailed: GET {web.url} was answered with {status}."
    assert "secret" not in row.attempts.get().traceback


def test_a_redirect_is_not_followed(web):
    row = ended(request(f"{web.url}/status/302"))

    assert (row.status, row.returned["status_code"]) == ("completed", 302)
    assert row.returned["headers"]["location"] == f"{web.url}/json"
    assert len(web.requests) == 1


def test_a_failed_attempt_is_retried_as_the_job_says(web):
    row = ended(request(f"{web.url}/status/500", max_retries=2, retry_delay=0))

    assert (row.status, row.retry_attempts, len(web.requests)) == ("failed", 2, 3)


class Short(HTTPRequestJob):
    max_response_bytes = 1_000


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (lambda web: Short(f"{web.url}/bytes/1001", allow_private=True), "longer than 1,000 bytes"),
        (lambda web: request(f"{web.url}/wait", timeout=0.1), "no answer within 0.1 s"),
        (lambda web: request(f"{web.url}/broken"), "says that it is JSON, and is not"),
        (lambda web: request("http://127.0.0.1:1/"), "ConnectError"),
        (lambda web: request("http://nowhere.invalid/"), "the name cannot be resolved"),
    ],
)
def test_what_gives_no_usable_answer_fails_and_says_why(web, job, error):
    row = ended(job(web))

    assert row.status == "failed"
    assert row.error.startswith("HTTPRequestFailed: GET http://")
    assert error in row.error
    assert "secret" not in row.error + row.attempts.get().traceback


def test_an_answer_of_just_the_allowed_length_is_taken(web):
    row = ended(Short(f"{web.url}/bytes/1000", allow_private=True))

    assert (row.status, len(row.returned["result"])) == ("completed", 1_000)


def test_an_answer_is_asked_for_as_it_is_and_taken_in_no_other_form(web):
    plain = ended(request(f"{web.url}/encoded/identity"))
    compressed = ended(request(f"{web.url}/encoded/gzip"))

    assert {headers["accept-encoding"] for _, _, headers, _ in web.requests} == {"identity"}
    assert (plain.status, plain.returned["result"]) == ("completed", "hello")
    assert compressed.status == "failed"
    assert compressed.error.startswith(
        f"HTTPRequestFailed: GET {web.url}: the answer is compressed"
    )


def test_many_requests_wait_at_the_same_time(web):
    rows = [request(f"{web.url}/wait").schedule() for _ in range(5)]

    def open_when_all_have_arrived():
        def all_have_arrived():
            assert len(web.requests) == len(rows)

        eventually(all_have_arrived)
        web.gate.set()

    opening = Concurrent(open_when_all_have_arrived)
    run_burst()
    opening.result()

    assert set(TaskModel.objects.values_list("status", flat=True)) == {"completed"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"url": "ftp://example.com/"}, "begins with http:// or https://.*'ftp'"),
        ({"url": "file:///etc/passwd"}, "must be a valid URL"),
        ({"url": "example.com"}, "must be a valid URL"),
        ({"url": "http://"}, "must be a valid URL"),
        ({"url": "http://x:99999999/"}, "must be a valid URL"),
        ({"url": None}, "must be a valid URL"),
        ({"url": "http://xn--/"}, "must be a valid URL"),
        ({"url": "https://user:secret@example.com/"}, "must not hold a user name or password"),
        ({"method": "GET /"}, "method must be a word"),
        ({"headers": {"a b": "x"}}, "name of a header"),
        ({"headers": {"X-Key": "secret\r\nX: y"}}, "'X-Key' must be one line"),
        ({"headers": {"X-Key": 5}}, "'X-Key' must be one line"),
        ({"headers": ["secret"]}, "headers must be a dictionary, got a list"),
        ({"headers": "secret"}, "headers must be a dictionary, got a str"),
        ({"headers": {"Content-Length": "1"}, "data": "abc"}, "'Content-Length' must not be given"),
        ({"headers": {"TRANSFER-ENCODING": "chunked"}}, "'TRANSFER-ENCODING' must not be given"),
        ({"headers": {"Host": "internal.example"}}, "'Host' must not be given"),
        ({"headers": {"Accept-Encoding": "gzip"}}, "'Accept-Encoding' must not be given"),
        ({"headers": {"connection": "keep-alive"}}, "'connection' must not be given"),
        ({"method": "connect"}, "must not be CONNECT"),
        ({"data": ["secret"]}, "body must be text, bytes or a form"),
        ({"data": 5}, "body must be text, bytes or a form"),
        ({"data": "\ud800"}, "body must be text, bytes or a form"),
        ({"json": float("nan")}, "what JSON can hold"),
        ({"url": "http://example.com/\ud800"}, "must be a valid URL"),
        ({"data": "a", "json": 1}, "either data= or json="),
        ({"json": Decimal("1.5")}, "what JSON can hold"),
        ({"timeout": 0}, "timeout must be"),
        ({"timeout": timedelta(hours=2)}, "timeout must be"),
        ({"url": "http://127.0.0.1/"}, "127.0.0.1 is no address of the public internet"),
        ({"url": "http://[::1]:80/"}, "no address of the public internet"),
        ({"url": "http://169.254.169.254/latest/"}, "no address of the public internet"),
    ],
)
def test_a_request_that_cannot_be_sent_is_refused_where_it_is_made(words, message):
    with pytest.raises(ValueError, match=message) as raised:
        HTTPRequestJob(**{"url": "https://example.com/", **words})

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        *((a, True) for a in ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8")),
        *((a, False) for a in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "0.0.0.0")),
        *((a, False) for a in ("169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1")),
        *((a, False) for a in ("::1", "::", "fe80::1", "fc00::1", "fec0::1", "ff02::1")),
        *((a, False) for a in ("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::")),
        *((a, False) for a in ("2001:0:1:2:3:4:5:6", "::127.0.0.1", "255.255.255.255")),
    ],
)
def test_only_addresses_of_the_public_internet_are_public(address, expected):
    assert http.is_public(ipaddress.ip_address(address)) is expected


@pytest.fixture
def resolver(monkeypatch):
    """Let names resolve to what the test says; return the list of names that were asked for."""
    known: dict[str, list[str]] = {}
    asked: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **words):
        if host not in known:
            return real(host, port, *args, **words)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known, asked


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "both.test"])
def test_a_name_that_resolves_to_a_private_address_is_refused_before_anything_is_sent(
    web, resolver, host
):
    known, _ = resolver
    # One of them would do for the attacker.
    known["both.test"] = ["8.8.8.8", "127.0.0.1"]

    row = ended(HTTPRequestJob(f"http://{host}:{web.port}/"))

    assert row.status == "failed"
    assert "resolves to an address that is not of the public internet" in row.error
    assert web.requests == []


def test_the_connection_goes_to_the_address_that_was_looked_at(web, resolver):
    known, asked = resolver
    known["service.test"] = ["127.0.0.1"]

    row = ended(request(f"http://service.test:{web.port}/"))

    assert row.status == "completed"
    assert asked == ["service.test"]
    assert web.requests[0][2]["host"] == f"service.test:{web.port}"


def test_the_next_address_is_tried_if_one_refuses(web, resolver):
    known, _ = resolver
    known["service.test"] = ["127.0.0.2", "127.0.0.1"]

    assert ended(request(f"http://service.test:{web.port}/")).status == "completed"


def test_a_certificate_is_checked_against_the_name_and_not_the_address(
    resolver, monkeypatch, tmp_path
):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("service.test").configure_cert(context)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    http._tls.cache_clear()
    known, _ = resolver
    known["service.test"] = known["other.test"] = ["127.0.0.1"]

    with web_server(context) as web:
        good = ended(request(f"https://service.test:{web.port}/json"))
        bad = ended(request(f"https://other.test:{web.port}/json"))
    http._tls.cache_clear()

    assert (good.status, good.returned["result"]) == ("completed", {"a": [1, None]})
    assert bad.status == "failed"
    assert "CERTIFICATE_VERIFY_FAILED" in bad.error


def test_proxies_of_the_environment_are_not_used(web, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    assert ended(request(f"{web.url}/")).status == "completed"


def test_without_its_library_the_module_says_what_to_install():
    code = (
        "import sys; sys.modules['httpx'] = None\n"
        "import django; django.setup()\n"
        "from firefly_jobs.contrib.jobs import EmailJob, HTTPRequestJob\n"
        "EmailJob('a@example.com', 's', 'b')\n"
        "HTTPRequestJob('https://example.com/')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )

    assert "ImportError: firefly_jobs.contrib.http sends requests with httpx" in done.stderr
    assert "pip install 'django-firefly-jobs[http]'" in done.stderr


# --- mail


class Mailbox:
    """What a mail server has taken: recipients, and the mail."""

    def __init__(self):
        self.received: list[tuple[list[str], Any]] = []

    async def handle_DATA(self, server, session, envelope):  # noqa: N802 - what the server calls
        received = message_from_bytes(envelope.content, policy=policy.default)
        self.received.append((envelope.rcpt_tos, received))
        return "250 taken"


def send_to(settings, port):
    """Let Django send its mail to a port of this machine."""
    backend = "django.core.mail.backends.smtp.EmailBackend"
    if django.VERSION >= (6, 1):
        options = {"host": "127.0.0.1", "port": port}
        settings.MAILERS = {"default": {"BACKEND": backend, "OPTIONS": options}}
    else:
        settings.EMAIL_BACKEND = backend
        settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", port


@pytest.fixture
def smtp(settings):
    handler = Mailbox()
    controller = Controller(handler, hostname="127.0.0.1", port=free_port())
    controller.start()
    send_to(settings, controller.port)
    yield handler
    controller.stop()


def test_a_mail_arrives_with_its_attachments(smtp):
    job = EmailJob(
        ["a@example.com", "b@example.com"],
        "Grüße",
        "Hallo\n",
        from_email="shop@example.com",
        attachments=[("a.csv", "x,y\n", "text/csv"), ("b.bin", b"\x00\xff")],
    )

    row = ended(job)

    ((recipients, received),) = smtp.received
    assert row.returned == {
        "to": ["a@example.com", "b@example.com"], "subject": "Grüße", "sent": True,
    }  # fmt: skip
    assert recipients == ["a@example.com", "b@example.com"]
    assert (received["from"], received["subject"]) == ("shop@example.com", "Grüße")
    body, csv, binary = received.iter_parts()
    assert body.get_content().strip() == "Hallo"
    assert (csv.get_filename(), csv.get_content_type()) == ("a.csv", "text/csv")
    assert csv.get_content().replace("\r\n", "\n") == "x,y\n"
    assert (binary.get_filename(), binary.get_content()) == ("b.bin", b"\x00\xff")


def test_a_mail_goes_through_the_backend_of_the_settings():
    row = ended(EmailJob("a@example.com", "Hello", "text"))

    assert row.returned == {"to": "a@example.com", "subject": "Hello", "sent": True}
    (sent,) = mail.outbox
    assert (sent.to, sent.from_email) == (["a@example.com"], "webmaster@localhost")


def test_a_mail_server_that_is_away_fails_the_attempt(settings):
    send_to(settings, 1)

    row = ended(EmailJob("a@example.com", "Hello", "text"))

    assert (row.status, row.error.split(":")[0]) == ("failed", "ConnectionRefusedError")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"to": []}, "to must be an address"),
        ({"to": "nobody"}, "to must be an address"),
        ({"to": ["a@example.com\nBcc: secret@example.com"]}, "to must be an address"),
        ({"subject": "secret\r\nBcc: x@example.com"}, "subject must be one line"),
        ({"body": None}, "body text"),
        ({"from_email": "a@example.com\n"}, "from_email must be an address"),
        ({"attachments": [("a.txt",)]}, "attachments must be"),
        ({"attachments": ["a.txt"]}, "attachments must be"),
        ({"attachments": None}, "attachments must be"),
        ({"attachments": [("a.txt", 5)]}, "attachments must be"),
    ],
)
def test_what_cannot_be_a_mail_is_refused_where_it_is_made(words, message):
    with pytest.raises(ValueError, match=message) as raised:
        EmailJob(**{"to": "a@example.com", "subject": "s", "body": "b", **words})

    assert "secret" not in str(raised.value)


def test_bytes_cannot_be_attached_to_a_job_that_is_stored_as_json():
    job = EmailJob("a@example.com", "s", "b", attachments=[("a", b"x")], serializer="json")

    with pytest.raises(PayloadError, match="'attachments'"):
        job.schedule()


# --- SQL


def test_a_query_gives_rows_by_the_names_of_their_columns():
    key = unique_name()
    effect = create_effect(task_key=key, value=7)

    row = ended(
        SQLQueryJob(f"SELECT id, value FROM {EFFECTS} WHERE task_key = %s ORDER BY id", [key])
    )

    assert row.returned == {
        "rows": [{"id": effect.pk, "value": 7}], "row_count": 1, "columns": ["id", "value"],
    }  # fmt: skip


def test_parameters_may_have_names_and_are_never_part_of_the_statement():
    row = ended(
        DatabaseQueryJob(
            f"SELECT COUNT(*) AS n FROM {EFFECTS} WHERE task_key = %(key)s",
            {"key": "' OR '1' = '1"},
        )
    )

    assert row.returned["rows"] == [{"n": 0}]
    assert DatabaseQueryJob is SQLQueryJob


def test_a_statement_without_rows_tells_how_many_it_changed():
    keys = [unique_name(), unique_name()]
    for key in keys:
        create_effect(task_key=key)

    row = ended(SQLQueryJob(f"UPDATE {EFFECTS} SET value = 9 WHERE task_key IN (%s, %s)", keys))

    assert row.returned == {"rows": [], "row_count": 2, "columns": []}
    assert set(Effect.objects.values_list("value", flat=True)) == {9}


class Few(SQLQueryJob):
    max_rows = 2

    def run(self, query, params=None, using="default"):
        Effect.objects.create(task_key="of the call")
        return super().run(query, params, using)


def test_more_rows_than_allowed_fail_the_attempt_and_undo_it():
    for _ in range(2):
        create_effect()

    row = ended(Few(f"SELECT id FROM {EFFECTS}"))

    assert row.status == "failed"
    assert "gives more than 2 rows" in row.error
    assert not Effect.objects.filter(task_key="of the call").exists()
    create = Effect.objects.first()
    assert create is not None
    assert ended(Few(f"SELECT id FROM {EFFECTS} LIMIT 2")).returned["row_count"] == 2


def test_two_columns_of_one_name_fail_the_attempt():
    row = ended(SQLQueryJob("SELECT 1 AS a, 2 AS a"))

    assert (row.status, "two columns of one name" in row.error) == ("failed", True)


def test_values_come_back_as_the_driver_gives_them():
    binary = {"postgresql": "'\\x00ff'::bytea", "mysql": "x'00ff'", "sqlite": "x'00ff'"}
    row = ended(SQLQueryJob(f"SELECT {binary[connection.vendor]} AS b, NULL AS n, 'é%%' AS t", []))

    assert row.returned["rows"] == [{"b": b"\x00\xff", "n": None, "t": "é%"}]


@pytest.mark.server
def test_decimals_and_dates_come_back():
    row = ended(
        SQLQueryJob("SELECT CAST('1.50' AS DECIMAL(5, 2)) AS d, CAST('2030-01-02' AS DATE) AS t")
    )

    assert row.returned["rows"] == [{"d": Decimal("1.50"), "t": date(2030, 1, 2)}]


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_query_runs_on_the_alias_it_names():
    with transaction.atomic(using="other"):
        Effect.objects.using("other").create(task_key="elsewhere")

    row = ended(SQLQueryJob(f"SELECT task_key FROM {EFFECTS}", using="other"))

    assert row.returned["rows"] == [{"task_key": "elsewhere"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"query": " "}, "query must be an SQL statement"),
        ({"query": None}, "query must be an SQL statement"),
        ({"params": "abc"}, "params must be a list or a dictionary"),
        ({"using": []}, "using must be the alias of a database, got a list"),
        ({"using": "othr"}, "no database 'othr' in DATABASES. Did you mean 'other'"),
    ],
)
def test_what_cannot_be_executed_is_refused_where_it_is_made(words, message):
    with pytest.raises(ValueError, match=message):
        SQLQueryJob(**{"query": "SELECT 1", **words})
