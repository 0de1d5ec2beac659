"""Turn a database URL into Django's ``DATABASES`` entry.

One URL names the database for every process of a run, so a test can hand its
own database to a consumer it starts as a subprocess.  The second alias is
derived from the same URL, never configured by itself: it is a second database
of the same server, or a second file.

To add a database: add its scheme to ``ENGINES``.
"""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

ENGINES = {
    "sqlite": "django.db.backends.sqlite3",
    "postgresql": "django.db.backends.postgresql",
    "mysql": "django.db.backends.mysql",
}

SQLITE_OPTIONS: dict[str, Any] = {
    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
    "transaction_mode": "IMMEDIATE",
    "timeout": 20,
}


def database_from_url(url: str, *, suffix: str = "") -> dict[str, Any]:
    """Return the ``DATABASES`` entry of ``url``.

    Args:
        url: ``sqlite:///relative/or//absolute/path``, ``postgresql://user@host:port/name`` or
            ``mysql://user:password@host:port/name``.  A query string becomes ``OPTIONS``.
        suffix: Appended to the database's name, before a file's extension.

    Raises:
        ValueError: If the scheme is not one of ``ENGINES``.
    """
    parts = urlsplit(url)
    if parts.scheme not in ENGINES:
        message = f"{parts.scheme}:// is no database URL; use one of {', '.join(ENGINES)}."
        raise ValueError(message)
    name = unquote(parts.path.removeprefix("/"))
    options: dict[str, Any] = {
        key: int(value) if value.isdigit() else value for key, value in parse_qsl(parts.query)
    }
    if parts.scheme == "sqlite":
        return _sqlite(name, suffix=suffix, options=options)
    return {
        "ENGINE": ENGINES[parts.scheme],
        "NAME": name + suffix,
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or "",
        "PORT": str(parts.port or ""),
        "OPTIONS": options,
        "TEST": {"NAME": f"test_{name}{suffix}"},
    }


def url_from_database(settings: dict[str, Any], *, options: dict[str, Any] | None = None) -> str:
    """Return the URL of a ``DATABASES`` entry, the inverse of :func:`database_from_url`.

    Args:
        settings: The entry, or the ``settings_dict`` of a connection: in a test that is
            the test database.
        options: The connection options to put into the query string.
    """
    (scheme,) = (scheme for scheme, engine in ENGINES.items() if engine == settings["ENGINE"])
    query = f"?{urlencode(options)}" if options else ""
    if scheme == "sqlite":
        return f"sqlite:///{quote(str(settings['NAME']))}{query}"
    user = quote(settings["USER"], safe="")
    if settings["PASSWORD"]:
        user += ":" + quote(settings["PASSWORD"], safe="")
    name = quote(settings["NAME"], safe="")
    return f"{scheme}://{user}@{settings['HOST']}:{settings['PORT']}/{name}{query}"


def _sqlite(name: str, *, suffix: str, options: dict[str, Any]) -> dict[str, Any]:
    if name == ":memory:":
        return {"ENGINE": ENGINES["sqlite"], "NAME": name}
    path = Path(name)
    path = path.with_name(path.stem + suffix + path.suffix)
    return {
        "ENGINE": ENGINES["sqlite"],
        "NAME": path,
        "OPTIONS": SQLITE_OPTIONS | options,
        # A file, since other processes open it as well.
        "TEST": {"NAME": str(path.with_name(f"test_{path.name}"))},
    }
