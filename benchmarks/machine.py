"""What was measured on: machine, versions, and the settings that decide what a commit costs."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import django
from django.db import connection

_DURABILITY = {
    "postgresql": ("SHOW fsync", "SHOW synchronous_commit"),
    "mysql": ("SHOW VARIABLES LIKE 'innodb_flush_log_at_trx_commit'",),
    "sqlite": ("PRAGMA journal_mode", "PRAGMA synchronous"),
}
_VERSION = {
    "postgresql": "SHOW server_version",
    "mysql": "SELECT VERSION()",
    "sqlite": "SELECT sqlite_version()",
}


def machine_facts() -> dict[str, str]:
    """Return what is true of every database of this run."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "django": django.get_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def database_facts() -> dict[str, str]:
    """Return versions and durability of the database of this process."""
    with connection.cursor() as cursor:
        version = _ask(cursor, _VERSION[connection.vendor])
        durability = {
            question.split()[-1].strip("'"): _ask(cursor, question)
            for question in _DURABILITY[connection.vendor]
        }
    return {"server": version, "driver": _driver(), **durability}


def describe(machine: dict[str, str], databases: dict[str, dict[str, str]]) -> str:
    """Return the lines that name the machine above a table."""
    what = "on {date} on {processor}, {cores} cores, {memory}, {system}".format_map(machine)
    lines = [f"Measured {what}; Python {machine['python']}, Django {machine['django']}.", ""]
    for kind, facts in databases.items():
        rest = ", ".join(
            f"`{name}={value}`" for name, value in facts.items() if name not in {"server", "driver"}
        )
        lines.append(f"- {kind}: {facts['server']}, {facts['driver']}; {rest}.")
    return "\n".join(lines)


def _ask(cursor: Any, question: str) -> str:
    cursor.execute(question)
    return str(cursor.fetchone()[-1])


def _driver() -> str:
    name = {"postgresql": "psycopg", "mysql": "mysqlclient"}.get(connection.vendor)
    return f"{name} {metadata.version(name)}" if name else "sqlite3"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return named[0] if named else platform.machine()
