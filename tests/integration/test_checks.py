"""System checks: each says what is wrong and what to do, and none of them raises."""

import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
from django.core.checks import run_checks
from django.db import OperationalError, connection, connections
from django.test import override_settings

from firefly_jobs import checks, job_registry, registry
from firefly_jobs.databases import of
from firefly_jobs.decorators import task
from firefly_jobs.models import ScheduleModel
from tests.testapp.tasks import add

GOOD_KEY = "k3y-" + "".join(chr(ord("a") + n % 26) for n in range(60))


def ids(found: Any) -> list[str]:
    return [message.id.removeprefix("firefly_jobs.") for message in found]


@pytest.fixture
def registered(monkeypatch):
    """Give a registry of the test's own; call it with options to register a task."""
    monkeypatch.setattr(registry, "_tasks", {})
    monkeypatch.setattr(checks, "import_tasks", lambda: None)

    def register(**options: Any) -> Any:
        return task(**options)(add.func)

    return register


def test_project_of_the_tests_has_no_problem():
    found = [m for m in run_checks() if (m.id or "").startswith("firefly_jobs.")]

    assert found == []


def test_every_message_has_a_hint_and_an_id_of_its_own(registered):
    registered(database="nowhere")
    with override_settings(FIREFLY_JOBS={"SIGNING": False}, USE_TZ=False):
        found = [*checks.check_tasks(), *checks.check_time_zone(), *checks.check_signing()]

    assert ids(found) == ["E007", "E003", "W001"]
    assert all(message.hint for message in found)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"MAX_RETRYS": 3}, "FIREFLY_JOBS has no key 'MAX_RETRYS'. Did you mean 'MAX_RETRIES'?"),
        ({"MAX_RETRIES": -1}, "FIREFLY_JOBS['MAX_RETRIES'] must be a whole number"),
        ([], "FIREFLY_JOBS must be a dictionary, got list."),
    ],
)
def test_settings_with_a_problem_are_e001(value, message):
    with override_settings(FIREFLY_JOBS=value):
        (found,) = checks.check_settings()

        assert found.id == "firefly_jobs.E001"
        assert found.msg.startswith(message)
        assert found.hint
        # The other checks leave it at that.
        assert checks.check_tasks() == []
        assert checks.check_registered_jobs() == []
        assert checks.check_authenticator() == []
        assert checks.check_signing() == []
        assert checks.check_secret_key() == []
        assert checks.check_databases(databases=["default"]) == []


def count_items(item_pks):
    return len(item_pks)


def test_a_registered_job_that_is_no_task_is_e010(registered, monkeypatch):
    monkeypatch.setattr(job_registry, "_jobs", {})
    register = job_registry.register_job

    def flag(item_pks):
        pass

    register("Count", "count", "item")(count_items)
    task(count_items)
    register("Flag", "flag", "item")(flag)
    register("Clear", "clear", "item")(flag)

    found = checks.check_registered_jobs()

    assert ids(found) == ["E010", "E010"]
    assert "The registered job 'clear' is tests.integration.test_checks." in found[0].msg
    assert "The registered job 'flag' is" in found[1].msg
    assert all(message.hint for message in found)


async def waits(request):
    return None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tests.integration.nothing.by_token", "cannot be imported: ModuleNotFoundError"),
        ("tests.integration.test_checks.nothing", "cannot be imported: ImportError"),
        ("tests.integration.test_checks.GOOD_KEY", "cannot be called"),
        ("tests.integration.test_checks.waits", "is a coroutine function"),
    ],
)
def test_an_authenticator_that_cannot_be_called_is_e011(name, reason):
    with override_settings(FIREFLY_JOBS={"API_AUTHENTICATOR": name}):
        (found,) = checks.check_authenticator()

    assert found.id == "firefly_jobs.E011"
    assert f"is {name!r}, which {reason}" in found.msg
    assert found.hint


def test_an_authenticator_that_can_be_called_is_none():
    name = "tests.integration.test_checks.ids"
    with override_settings(FIREFLY_JOBS={"API_AUTHENTICATOR": name}):
        assert checks.check_authenticator() == []
    assert checks.check_authenticator() == []


def test_alias_that_is_not_in_databases_is_e002():
    with override_settings(FIREFLY_JOBS={"DATABASE": "defualt"}):
        (found,) = checks.check_settings()

    assert found.id == "firefly_jobs.E002"
    assert "'defualt', which is not in DATABASES. Did you mean 'default'?" in found.msg


def test_alias_of_a_task_that_is_not_in_databases_is_e007(registered):
    registered(database="othre")

    (found,) = checks.check_tasks()

    assert found.id == "firefly_jobs.E007"
    assert "'tests.testapp.tasks.add' has database='othre'" in found.msg
    assert "Did you mean 'other'?" in found.msg


def test_naive_moments_are_e003():
    with override_settings(USE_TZ=False):
        assert ids(checks.check_time_zone()) == ["E003"]


def test_database_of_another_kind_is_e004(registered):
    registered(database="default")
    with mock.patch.object(connections["default"], "vendor", "oracle"):
        (of_settings,) = checks.check_settings()
        (of_task,) = checks.check_tasks()
        assert checks.check_databases(databases=["default"]) == []

    assert (of_settings.id, of_task.id) == ("firefly_jobs.E004", "firefly_jobs.E004")
    assert "PostgreSQL, MariaDB, MySQL and SQLite" in of_settings.msg
    assert "The task 'tests.testapp.tasks.add'" in of_task.msg


def test_task_module_that_cannot_be_imported_is_e008():
    with override_settings(FIREFLY_JOBS={"IMPORTS": ["tests.no_such_module"]}):
        (found,) = checks.check_tasks()

    assert found.id == "firefly_jobs.E008"
    assert "No module named 'tests.no_such_module'" in found.msg


def test_hooks_of_every_task_that_cannot_be_loaded_are_e009():
    with override_settings(FIREFLY_JOBS={"HOOKS": ["tests.no_such_module.Audit"]}):
        (found,) = checks.check_hooks()

    assert found.id == "firefly_jobs.E009"
    assert "No module named 'tests.no_such_module'" in found.msg


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"SIGNING": False}, ["W001"]),
        ({"SIGNING": False, "SERIALIZER": "json"}, []),
    ],
)
def test_unsigned_pickle_is_w001(settings, expected, registered):
    with override_settings(FIREFLY_JOBS=settings):
        assert ids(checks.check_signing()) == expected


def test_unsigned_pickle_of_a_single_task_is_w001(registered):
    registered(serializer="pickle")

    with override_settings(FIREFLY_JOBS={"SIGNING": False, "SERIALIZER": "json"}):
        assert ids(checks.check_signing()) == ["W001"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"SECRET_KEY": GOOD_KEY}, []),
        ({"SECRET_KEY": "short"}, ["SECRET_KEY"]),
        ({"SECRET_KEY": "aab" * 30}, ["SECRET_KEY"]),
        ({"SECRET_KEY": f"django-insecure-{GOOD_KEY}"}, ["SECRET_KEY"]),
        ({"SECRET_KEY": ""}, ["SECRET_KEY"]),
        ({"SECRET_KEY": GOOD_KEY, "SECRET_KEY_FALLBACKS": ["old"]}, ["SECRET_KEY_FALLBACKS"]),
        ({"SECRET_KEY": "short", "FIREFLY_JOBS": {"SERIALIZER": "json"}}, []),
    ],
)
def test_key_that_can_be_guessed_is_w002_when_deploying(settings, names, registered):
    with override_settings(**settings):
        found = checks.check_secret_key()

    assert [message.msg.partition(" ")[0] for message in found] == names
    assert set(ids(found)) <= {"W002"}
    assert all("run any code" in message.msg for message in found)


def test_key_is_looked_at_by_deployment_checks_only():
    with override_settings(SECRET_KEY="short"):
        assert "firefly_jobs.W002" not in {m.id for m in run_checks()}
        assert "firefly_jobs.W002" in {m.id for m in run_checks(include_deployment_checks=True)}


# --- what only a connection can tell


def test_databases_are_left_alone_unless_django_checks_them(django_db_blocker):
    # A query would raise here: the test has no database.
    assert checks.check_databases() == []


@pytest.mark.django_db(databases=["default", "other"])
def test_migrated_databases_of_the_tests_have_no_problem(registered):
    registered(database="other")

    assert checks.check_databases(databases=["default", "other"]) == []


@pytest.mark.django_db
def test_database_without_our_tables_is_w003(registered):
    with mock.patch.object(connection.introspection, "table_names", return_value=["auth_user"]):
        (found,) = checks.check_databases(databases=["default"])

    assert found.id == "firefly_jobs.W003"
    assert "has no table firefly_jobs_taskmodel" in found.msg
    assert "FIREFLY_JOBS['DATABASE']" in found.msg
    assert "migrate --database default" in str(found.hint)


@pytest.mark.django_db(databases=["default", "other"])
def test_database_of_a_task_without_our_tables_names_the_task(registered):
    registered(database="other")
    with mock.patch.object(connections["other"].introspection, "table_names", return_value=[]):
        (found,) = checks.check_databases(databases=["default", "other"])

    assert found.id == "firefly_jobs.W003"
    assert "the task 'tests.testapp.tasks.add'" in found.msg


@pytest.mark.django_db
def test_only_the_databases_that_django_checks_now_are_asked(registered):
    registered(database="other")

    # 'other' is closed to this test: asking it would raise.
    assert checks.check_databases(databases=["default"]) == []


@pytest.mark.django_db
def test_schedules_that_do_not_fit_their_calls_are_w006():
    right = ScheduleModel.objects.create(
        name="right", func_name=add.name, every=60, arguments={"args": [1]}
    )
    assert checks.check_databases(databases=["default"]) == []
    ScheduleModel.objects.filter(pk=right.pk).update(name="wrong", arguments={"args": [1, 2, 3]})

    (found,) = checks.check_databases(databases=["default"])

    assert found.id == "firefly_jobs.W006"
    assert "Schedule 'wrong' cannot run: tests.testapp.tasks.add" in found.msg
    ScheduleModel.objects.filter(pk=right.pk).update(func_name="tests.gone")
    (found,) = checks.check_databases(databases=["default"])
    assert "No task named 'tests.gone'" in found.msg


@pytest.mark.django_db
def test_database_that_is_down_is_w005_and_no_traceback():
    down = OperationalError("connection refused\n")
    with mock.patch.object(connection.introspection, "table_names", side_effect=down):
        (found,) = checks.check_databases(databases=["default"])

    assert found.id == "firefly_jobs.W005"
    assert found.msg == "Database 'default' could not be checked: connection refused"


@pytest.mark.django_db
@pytest.mark.server
def test_server_without_skip_locked_is_e005():
    with mock.patch.object(connection.features, "has_select_for_update_skip_locked", new=False):
        (found,) = of("default").problems(connection)

    assert found.id == "E005"
    assert "MariaDB 10.6" in found.hint


@pytest.mark.sqlite
@pytest.mark.django_db
def test_sqlite_without_returning_is_e006():
    with mock.patch("sqlite3.sqlite_version_info", (3, 34, 1)):
        assert [problem.id for problem in of("default").problems(connection)] == ["E006"]


MANAGE = [sys.executable, "manage.py"]


@pytest.fixture
def run_manage(tmp_path):
    """Return a function that runs ``manage.py`` on an SQLite file of its own."""

    def run(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("FIREFLY_")
        }
        return subprocess.run(
            [*MANAGE, *arguments],
            env=environment | {"FIREFLY_DATABASE": url},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.sqlite
def test_sqlite_that_is_not_in_wal_mode_is_w004(run_manage, tmp_path):
    url = f"sqlite:///{tmp_path / 'journal.sqlite3'}?init_command=PRAGMA%20journal_mode%3DDELETE"
    run_manage("migrate", "firefly_jobs", "-v0", url=url)

    checked = run_manage("check", "--database", "default", url=url)

    assert (
        "(firefly_jobs.W004) SQLite connection 'default' is not in WAL mode, so readers and the "
        "consumer block each other.\n"
        '\tHINT: Add "init_command": "PRAGMA journal_mode=WAL;" to its OPTIONS.\n'
    ) in checked.stderr
    assert checked.returncode == 0


@pytest.mark.sqlite
def test_check_and_migrate_of_a_good_database_are_silent(run_manage, tmp_path):
    url = f"sqlite:///{tmp_path / 'good.sqlite3'}"

    migrated = run_manage("migrate", "-v0", url=url)
    checked = run_manage("check", "--database", "default", url=url)

    assert (migrated.returncode, migrated.stdout, migrated.stderr) == (0, "", "")
    assert "no issues" in checked.stdout


@pytest.mark.sqlite
def test_check_creates_no_sqlite_file(run_manage, tmp_path):
    file = tmp_path / "absent.sqlite3"

    checked = run_manage("check", "--database", "default", url=f"sqlite:///{file}")

    assert "no issues" in checked.stdout
    assert not file.exists()


@pytest.mark.sqlite
def test_check_survives_a_server_that_is_not_there(run_manage):
    # Only the checks of databases: Django 6.1's own check of generated columns connects too,
    # and lets the error pass.
    checked = run_manage(
        *("check", "--database", "default", "--tag", "database"),
        url="postgresql://nobody@127.0.0.1:1/nothing",
    )

    assert "(firefly_jobs.W005) Database 'default' could not be checked:" in checked.stderr
    assert "Traceback" not in checked.stderr
    assert checked.returncode == 0


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("name", "is_present"),
    [
        (":memory:", True),
        ("file:shared?mode=memory&cache=shared", True),
        (__file__, True),
        (f"file:{__file__}?mode=ro", True),
        ("/nowhere/tasks.sqlite3", False),
        ("file:/nowhere/tasks%201.sqlite3?mode=rwc", False),
    ],
)
def test_sqlite_file_is_looked_for_without_connecting(name, is_present):
    with mock.patch.dict(connection.settings_dict, {"NAME": name}):
        assert of("default").is_present(connection) is is_present
