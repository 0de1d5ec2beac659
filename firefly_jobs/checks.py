"""System checks of ``FIREFLY_JOBS``, of the tasks, and of the databases they live in.

What the settings and the code can tell is checked with every command.  What only a
connection can tell (the server's version, the journal mode, whether our tables are
there) is checked where Django checks databases: ``check --database default`` and
``migrate``.  No check raises, and none creates a database file.

Ids are never used again for something else.  ``E001`` settings, ``E002`` and ``E007``
aliases, ``E003`` time zones, ``E004`` to ``E006`` databases, ``E008`` imports, ``E009``
hooks, ``E010`` registered jobs, ``E011`` who asks over HTTP; ``W001`` and ``W002``
unpickling, ``W003`` tables, ``W004`` WAL, ``W005`` no answer, ``W006`` schedules.

To add one: take the next id, write a message and a hint, add a row to
``docs/reference/checks.md`` and a case to ``tests/integration/test_checks.py``.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register  # noqa: A004 - Django's name
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.db import Error as DatabaseError
from django.db import connections
from django.utils.module_loading import import_string

from . import databases, registry
from .autodiscovery import import_tasks
from .conf import SETTING, get_settings, problems, suggestion
from .databases import Problem
from .hooks import load_shared
from .job_registry import not_tasks
from .models import ScheduleModel, TaskModel
from .planning import check_call

# As Django's own security.W009 has it.
_SECRET_LENGTH_MIN = 50
_SECRET_CHARACTERS_MIN = 5
_INSECURE_PREFIX = "django-insecure-"


@register
def check_settings(**_: Any) -> list[CheckMessage]:
    """Check what stands in ``FIREFLY_JOBS``, and the alias it names."""
    found = problems(getattr(django_settings, SETTING, {}))
    if found:
        return [
            Error(message, hint=_settings_hint(key), id="firefly_jobs.E001")
            for key, message in found
        ]
    alias = get_settings().DATABASE
    if alias not in django_settings.DATABASES:
        return [
            Error(
                f"{SETTING}['DATABASE'] is {alias!r}, which is not in DATABASES."
                f"{suggestion(alias, django_settings.DATABASES)}",
                hint=f"Use one of {_listed(django_settings.DATABASES)}, or add the alias.",
                id="firefly_jobs.E002",
            )
        ]
    return _unsupported(alias, f"{SETTING}['DATABASE']", obj=None)


@register
def check_time_zone(**_: Any) -> list[CheckMessage]:
    """Check that moments are stored in UTC, as the database's clock tells them."""
    if django_settings.USE_TZ:
        return []
    return [
        Error(
            "USE_TZ is False, but what is due is judged by the database's clock in UTC, so tasks "
            "would start hours early or late.",
            hint="Set USE_TZ = True.",
            id="firefly_jobs.E003",
        )
    ]


@register
def check_tasks(**_: Any) -> list[CheckMessage]:
    """Check that the task modules can be imported, and the databases that tasks name."""
    if problems(getattr(django_settings, SETTING, {})):
        return []
    try:
        import_tasks()
    except Exception as error:  # noqa: BLE001 - importing runs the project's code; a check reports
        return [
            Error(
                f"The task modules cannot be imported: {type(error).__name__}: {error}",
                hint=f"Mend the module, or correct its name in {SETTING}['IMPORTS']. Until then "
                f"no consumer starts.",
                id="firefly_jobs.E008",
            )
        ]
    found: list[CheckMessage] = []
    for name in registry.names():
        task = registry.find(name)
        alias = task.options.database
        if alias is None:
            continue
        if alias not in django_settings.DATABASES:
            found.append(
                Error(
                    f"The task {name!r} has database={alias!r}, which is not in DATABASES."
                    f"{suggestion(alias, django_settings.DATABASES)}",
                    hint=f"Use one of {_listed(django_settings.DATABASES)}, or add the alias.",
                    obj=task,
                    id="firefly_jobs.E007",
                )
            )
        else:
            found += _unsupported(alias, f"The task {name!r}", obj=task)
    return found


@register
def check_hooks(**_: Any) -> list[CheckMessage]:
    """Check that what ``HOOKS`` names are hooks for every task."""
    if problems(getattr(django_settings, SETTING, {})):
        return []
    found: list[CheckMessage] = []
    for name in get_settings().HOOKS:
        try:
            load_shared(name)
        except Exception as error:  # noqa: BLE001 - importing runs the project's code; a check reports
            found.append(
                Error(
                    f"{error}",
                    hint="Name classes that derive from firefly_jobs.TaskHooks and need no "
                    "arguments. Until then no consumer starts.",
                    id="firefly_jobs.E009",
                )
            )
    return found


@register
def check_registered_jobs(**_: Any) -> list[CheckMessage]:
    """Check that what people may start are tasks."""
    if problems(getattr(django_settings, SETTING, {})):
        return []
    try:
        import_tasks()
    except Exception:  # noqa: BLE001 - told as E008
        return []
    return [
        Error(
            f"The registered job {job.task_name!r} is "
            f"{job.func.__module__}.{job.func.__qualname__}, which is no task, so nobody can "
            f"start it.",
            hint="Decorate the function with @task or @atask as well, above @register_job or "
            "below it.",
            obj=job.func,
            id="firefly_jobs.E010",
        )
        for job in not_tasks()
    ]


@register
def check_authenticator(**_: Any) -> list[CheckMessage]:
    """Check that what tells who asks over HTTP can be called."""
    if problems(getattr(django_settings, SETTING, {})):
        return []
    name = get_settings().API_AUTHENTICATOR
    if name is None:
        return []
    try:
        found = import_string(name)
    except Exception as error:  # noqa: BLE001 - importing runs the project's code; a check reports
        reason = f"cannot be imported: {type(error).__name__}: {error}"
    else:
        if inspect.iscoroutinefunction(found):
            reason = "is a coroutine function, which the views do not await"
        elif not callable(found):
            reason = "cannot be called"
        else:
            return []
    return [
        Error(
            f"{SETTING}['API_AUTHENTICATOR'] is {name!r}, which {reason}.",
            hint="Name a plain function that takes the request and returns a user, or None.",
            id="firefly_jobs.E011",
        )
    ]


@register(Tags.security)
def check_signing(**_: Any) -> list[CheckMessage]:
    """Check that stored pickles are signed."""
    if not _unpickles() or get_settings().SIGNING:
        return []
    return [
        Warning(
            f"{SETTING}['SIGNING'] is False while SERIALIZER is 'pickle', so whoever can write to "
            f"the task table can run any code in a consumer.",
            hint="Remove 'SIGNING': False, or set 'SERIALIZER': 'json'.",
            id="firefly_jobs.W001",
        )
    ]


@register(Tags.security, deploy=True)
def check_secret_key(**_: Any) -> list[CheckMessage]:
    """Check that the keys which sign stored pickles cannot be guessed."""
    if not _unpickles() or not get_settings().SIGNING:
        return []
    names = [
        name
        for name, read in (
            ("SECRET_KEY", lambda: [django_settings.SECRET_KEY]),
            ("SECRET_KEY_FALLBACKS", lambda: django_settings.SECRET_KEY_FALLBACKS),
        )
        if _has_weak_key(read)
    ]
    return [
        Warning(
            f"{name} is short or starts with {_INSECURE_PREFIX!r}. It signs the pickled arguments "
            f"of tasks: whoever knows it and can write to the task table can run any code in a "
            f"consumer.",
            hint="Make one of 50 random characters or more with "
            "django.core.management.utils.get_random_secret_key() and keep it out of the "
            "repository, or set FIREFLY_JOBS['SERIALIZER'] to 'json'.",
            id="firefly_jobs.W002",
        )
        for name in names
    ]


@register(Tags.database)
def check_databases(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Ask the databases that hold tasks, as far as Django checks databases now."""
    if databases is None or problems(getattr(django_settings, SETTING, {})):
        return []
    found: list[CheckMessage] = []
    for alias, users in _users_by_alias().items():
        if alias in databases and alias in django_settings.DATABASES:
            found += _ask(alias, users)
    return found


def _ask(alias: str, users: Sequence[str]) -> list[CheckMessage]:
    if not databases.is_supported(alias):
        return []
    connection = connections[alias]
    try:
        database = databases.of(alias)
        if not database.is_present(connection):
            return []
        found = database.problems(connection)
        tables = connection.introspection.table_names()
    except (DatabaseError, ImproperlyConfigured) as error:
        return [
            Warning(
                f"Database {alias!r} could not be checked: {str(error).strip()}",
                hint="Check again once it answers.",
                id="firefly_jobs.W005",
            )
        ]
    if ScheduleModel._meta.db_table in tables:
        found = [*found, *_broken_schedules(alias)]
    if TaskModel._meta.db_table not in tables:
        found = [
            *found,
            Problem(
                "W003",
                f"Database {alias!r} has no table {TaskModel._meta.db_table}, but is used by "
                f"{_listed(users, quote=str)}.",
                f"Run manage.py migrate --database {alias}; a database router must allow the app "
                f"firefly_jobs there.",
            ),
        ]
    return [_message(problem) for problem in found]


def _broken_schedules(alias: str) -> list[Problem]:
    """Tell the schedules in the database that the code does not fit any more."""
    found = []
    rows = ScheduleModel.objects.using(alias).filter(is_retired=False).defer("raw_last_result")
    try:
        import_tasks()
    except Exception:  # noqa: BLE001 - told as E008
        return []
    try:
        for row in rows:
            try:
                row.clean()
                check_call(row)
            except ValidationError as error:
                found.append(
                    Problem(
                        "W006",
                        f"Schedule {row.name!r} cannot run: {' '.join(error.messages)}",
                        "Change the schedule, in the admin for example, or the code, or delete it.",
                    )
                )
    except DatabaseError:
        # A migration is still to come, perhaps in this very command.
        return []
    return found


def _message(problem: Problem) -> CheckMessage:
    kind = Error if problem.id.startswith("E") else Warning
    return kind(problem.message, hint=problem.hint, id=f"firefly_jobs.{problem.id}")


def _users_by_alias() -> dict[str, list[str]]:
    users: dict[str, list[str]] = defaultdict(list)
    users[get_settings().DATABASE].append(f"{SETTING}['DATABASE']")
    for name in registry.names():
        if alias := registry.find(name).options.database:
            users[alias].append(f"the task {name!r}")
    return users


def _unsupported(alias: str, user: str, *, obj: Any) -> list[CheckMessage]:
    if databases.is_supported(alias):
        return []
    return [
        Error(
            f"{user} uses database {alias!r}, whose ENGINE is "
            f"{django_settings.DATABASES[alias]['ENGINE']!r}; firefly_jobs runs on PostgreSQL, "
            f"MariaDB, MySQL and SQLite.",
            hint="Point it at an alias of one of these.",
            obj=obj,
            id="firefly_jobs.E004",
        )
    ]


def _settings_hint(key: str) -> str:
    if not key:
        return f"Write {SETTING} = {{...}} in the settings."
    return f"Correct or remove the key {key!r}; docs/reference/settings.md lists them all."


def _unpickles() -> bool:
    if problems(getattr(django_settings, SETTING, {})):
        return False
    return get_settings().SERIALIZER == "pickle" or any(
        registry.find(name).options.serializer == "pickle" for name in registry.names()
    )


def _has_weak_key(read: Callable[[], Iterable[Any]]) -> bool:
    try:
        keys = list(read())
    except ImproperlyConfigured:
        return True
    return any(
        len(key) < _SECRET_LENGTH_MIN
        or len(set(key)) < _SECRET_CHARACTERS_MIN
        or (isinstance(key, str) and key.startswith(_INSECURE_PREFIX))
        for key in keys
    )


def _listed(names: Iterable[str], *, quote: Callable[[str], str] = repr, most: int = 5) -> str:
    quoted = [quote(name) for name in names]
    more = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + more
