"""Job types that are ready to use: an HTTP request, a mail, a database query.

Each is an ordinary job type: what can be wrong with its arguments is found when the job
is made, and what goes wrong later fails the attempt.  Their arguments stand in the row,
signed and not encrypted; so no message here quotes one.

A consumer knows them if ``"firefly_jobs.contrib.jobs"`` is in ``FIREFLY_JOBS["IMPORTS"]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

from django.conf import settings
from django.core.mail import EmailMessage
from django.db import connections

from firefly_jobs.conf import seconds, suggestion
from firefly_jobs.databases import queries
from firefly_jobs.jobs import Job

__all__ = ["DatabaseQueryJob", "EmailJob", "HTTPRequestJob", "SQLQueryJob"]

TIMEOUT_SECONDS_MAX = 3_600


class HTTPRequestJob(Job):
    """Send an HTTP request; needs the extra ``http``.

    A coroutine: hundreds wait for their servers in one consumer, without a thread or a
    database connection each.  Redirects are not followed; their answer is the result.

    Args:
        url: ``http`` or ``https``, without a password in it.
        method: ``GET``, ``POST`` and so on.
        headers: Names and values, one line of ASCII each; none that follows from the URL or
            the body, such as ``Host``.
        data: The body: text, bytes, or a dictionary to be sent as a form.
        json: The body, sent as JSON.
        timeout: Seconds or ``timedelta`` for all of it.
        allow_private: Allow addresses that are not of the public internet.  Do so only if
            nobody else chooses the URL.

    Attributes:
        max_response_bytes: How long an answer may be; for subclasses.
    """

    max_response_bytes: ClassVar[int] = 1024 * 1024

    async def run(
        self,
        url: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        data: str | bytes | Mapping[str, Any] | None = None,
        json: Any = None,
        *,
        timeout: float | timedelta = 30.0,  # noqa: ASYNC109 - the documented name; asyncio.timeout gets it
        allow_private: bool = False,
    ) -> dict[str, Any]:
        """Return ``{"status_code", "headers", "result"}``; an answer of 4xx or 5xx raises."""
        from . import http  # noqa: PLC0415 - the other types need no extra

        request = http.build(url, method=method, headers=headers, data=data, json=json)
        answer = await http.send(
            request,
            timeout_seconds=seconds(timeout),
            allow_private=allow_private,
            max_bytes=self.max_response_bytes,
        )
        return answer._asdict()

    def validate(  # noqa: PLR0917 - called by name
        self,
        url: Any,
        method: Any,
        headers: Any,
        data: Any,
        json: Any,
        timeout: Any,
        allow_private: Any,
    ) -> None:
        """Raise ``ValueError`` if it cannot be sent, or must not."""
        from . import http  # noqa: PLC0415 - as above

        is_time = isinstance(timeout, int | float | timedelta) and not isinstance(timeout, bool)
        if not is_time or not 0 < seconds(timeout) <= TIMEOUT_SECONDS_MAX:
            message = (
                f"timeout must be more than 0 seconds, or a timedelta, and at most "
                f"{TIMEOUT_SECONDS_MAX} s."
            )
            raise ValueError(message)
        request = http.build(url, method=method, headers=headers, data=data, json=json)
        if not allow_private:
            http.refuse_private(request.url.host)


class EmailJob(Job):
    """Send a mail with Django's mail settings.

    A mail is an effect outside the database: at-least-once.

    Args:
        to: An address, or several.
        subject: One line.
        body: Plain text.
        from_email: The sender; default ``DEFAULT_FROM_EMAIL``.
        attachments: ``(filename, content)`` or ``(filename, content, mimetype)`` each, as
            Django takes them; content is text or bytes.
    """

    def run(
        self,
        to: str | Sequence[str],
        subject: str,
        body: str,
        from_email: str | None = None,
        attachments: Sequence[tuple[str, str | bytes] | tuple[str, str | bytes, str]] = (),
    ) -> dict[str, Any]:
        """Return ``{"to", "subject", "sent": True}``."""
        mail = EmailMessage(
            subject,
            body,
            from_email,
            [to] if isinstance(to, str) else list(to),
        )
        for attachment in attachments:
            mail.attach(*attachment)
        if not mail.send():
            message = "The mail backend says that it has sent nothing."
            raise RuntimeError(message)
        return {"to": to, "subject": subject, "sent": True}

    def validate(self, to: Any, subject: Any, body: Any, from_email: Any, attachments: Any) -> None:
        """Raise ``ValueError`` if it cannot be a mail."""
        addresses = [to] if isinstance(to, str) else to
        is_list = isinstance(addresses, list | tuple) and len(addresses) > 0
        if not is_list or not all(_is_line(address) and "@" in address for address in addresses):
            message = "to must be an address, or a list of them."
            raise ValueError(message)
        if not _is_line(subject) or not isinstance(body, str):
            message = "subject must be one line of text, and body text."
            raise ValueError(message)
        if from_email is not None and not _is_line(from_email):
            message = "from_email must be an address, in one line."
            raise ValueError(message)
        is_list = isinstance(attachments, list | tuple)
        if not is_list or not all(map(_is_attachment, attachments)):
            message = (
                "attachments must be a list of (filename, content) or (filename, content, "
                "mimetype), the content text or bytes."
            )
            raise ValueError(message)


def _is_line(text: Any) -> bool:
    return isinstance(text, str) and "\n" not in text and "\r" not in text


def _is_attachment(item: Any) -> bool:
    # Lists too: JSON has no tuples.
    if not isinstance(item, list | tuple) or len(item) not in {2, 3}:
        return False
    return _is_line(item[0]) and isinstance(item[1], str | bytes) and all(map(_is_line, item[2:]))


class SQLQueryJob(Job):
    """Execute one SQL statement with parameters, and return its rows.

    On the task's own database it belongs to the task's transaction: what it changes is
    there exactly once.

    Args:
        query: The statement, with ``%s`` or ``%(name)s`` for each parameter.
        params: A list or a dictionary of them.
        using: Database alias.

    Attributes:
        max_rows: How many rows a query may give; for subclasses.  Looked at when most drivers
            have all of them in memory; what bounds that is a ``LIMIT`` in the query.
    """

    max_rows: ClassVar[int] = 1_000

    def run(
        self,
        query: str,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        using: str = "default",
    ) -> dict[str, Any]:
        """Return ``{"rows": [dict], "row_count", "columns"}``.

        Of a statement that gives no rows, ``row_count`` tells how many it changed.
        """
        return queries.fetch(connections[using], query, params, max_rows=self.max_rows)._asdict()

    def validate(self, query: Any, params: Any, using: Any) -> None:
        """Raise ``ValueError`` if it cannot be executed."""
        if not isinstance(query, str) or not query.strip():
            message = "query must be an SQL statement."
            raise ValueError(message)
        if params is not None and not isinstance(params, list | tuple | Mapping):
            message = "params must be a list or a dictionary of the statement's parameters."
            raise ValueError(message)
        if not isinstance(using, str):
            message = f"using must be the alias of a database, got a {type(using).__name__}."
            raise ValueError(message)  # noqa: TRY004 - as what else is wrong with arguments
        if using not in settings.DATABASES:
            message = (
                f"There is no database {using!r} in DATABASES."
                f"{suggestion(using, settings.DATABASES)}"
            )
            raise ValueError(message)


DatabaseQueryJob = SQLQueryJob
