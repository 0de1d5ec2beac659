# ruff: noqa: ARG002 - Django calls these methods, with its own arguments
"""Which rows the admin reads, from where, and how many of them at most.

A list is counted and paged over at most :data:`COUNT_MAX` primary keys, read from an
index in one pass.  A filter that has no index reads at most :data:`SEARCH_ROWS` rows.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.core.paginator import Page, Paginator
from django.db import connections
from django.db.models import Max, QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from firefly_jobs import databases, registry
from firefly_jobs.conf import get_settings
from firefly_jobs.databases.functions import DatabaseNow
from firefly_jobs.models import TaskModel
from firefly_jobs.states import Status

if TYPE_CHECKING:
    _Paginator = Paginator[Any]
else:
    _Paginator = Paginator

# Reading 10,000 keys from an index takes 4 to 17 ms on the three databases.
COUNT_MAX = 10_000
# Rows that a filter without an index may read.  A million rows take PostgreSQL 0.2 s,
# SQLite 0.3 s and MariaDB 3 s; a tenth of them 0.05 to 0.2 s.
SEARCH_ROWS = 100_000
QUEUES_SHOWN = 200
_ID_DIGITS_MAX = 19

# In an index by (status, id).
_INDEXED = frozenset({Status.BLOCKED, Status.CANCELLED, Status.FAILED})
_HEAVY = ("raw_params", "raw_returned", "error", "retry")


def alias() -> str:
    """Return the database of the tasks."""
    return get_settings().DATABASE


def names_of(name: str) -> list[str]:
    """Return a registered task's name and its former ones, or just what was given."""
    if name not in registry.names():
        return [name]
    return [name, *registry.find(name).options.aliases]


def task_id(term: str) -> int | None:
    """Return the id that a person searches for, ``17`` or ``#17``."""
    digits = term.strip().removeprefix("#")
    return int(digits) if digits.isdecimal() and len(digits) <= _ID_DIGITS_MAX else None


class BoundedPaginator(_Paginator):
    """Count and page over at most :data:`COUNT_MAX` rows, with one pass over an index.

    Which rows match is found once, as primary keys; a page reads its rows by them.
    """

    @cached_property
    def _keys(self) -> list[int]:
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]
        return list(rows.values_list("pk", flat=True)[: COUNT_MAX + 1])

    @property
    def is_cut(self) -> bool:
        """Whether there are more rows than are counted."""
        return len(self._keys) > COUNT_MAX

    @cached_property
    def count(self) -> int:
        """The number of rows, at most :data:`COUNT_MAX`."""
        return min(len(self._keys), COUNT_MAX)

    def rows(self) -> QuerySet[Any]:
        """Return all rows that are counted, by primary key."""
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]
        return rows.filter(pk__in=self._keys[: self.count])

    def page(self, number: int | str) -> Page[Any]:
        """Return one page; its rows are read by primary key."""
        number = self.validate_number(number)
        bottom = (number - 1) * self.per_page
        keys = self._keys[bottom : min(bottom + self.per_page, self.count)]
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]
        page: Page[Any] = self._get_page(rows.filter(pk__in=keys), number, self)  # type: ignore[attr-defined]
        return page


class BoundedChangeList(ChangeList):
    """A list that reads a bounded number of rows whatever is asked for."""

    # The newest id that is not searched; 0 if all are.
    searched_after = 0
    note = _("Searched among the newest {rows:,} rows only, those after id {after}.")

    def bounded(self, rows: QuerySet[Any]) -> QuerySet[Any]:
        """Return those of ``rows`` that are among the newest of the table."""
        newest = self.root_queryset.aggregate(newest=Max("pk"))["newest"] or 0
        self.searched_after = max(0, newest - SEARCH_ROWS)
        return rows.filter(pk__gt=self.searched_after)

    def get_results(self, request: HttpRequest) -> None:
        """Read the rows of a single page by their keys as well, not by searching again."""
        super().get_results(request)
        if self.show_all or not self.multi_page:
            self.result_list = self.paginator.rows()

    @property
    def search_note(self) -> str:
        """What the page says about rows that were not searched."""
        if not self.searched_after:
            return ""
        return str(self.note).format(rows=SEARCH_ROWS, after=self.searched_after)


class TaskChangeList(BoundedChangeList):
    """The list of tasks, without payloads."""

    note = _(
        "Searched among the newest {rows:,} tasks only, those after id {after}. To search all, "
        "filter by status: failed, cancelled, blocked or running."
    )

    def get_queryset(self, request: HttpRequest, *args: Any, **kwargs: Any) -> QuerySet[Any]:
        """Return the rows asked for, without payloads and as far as can be searched."""
        rows: QuerySet[Any] = super().get_queryset(request, *args, **kwargs)
        asked = dict(self.get_filters_params())
        status = asked.pop("status__exact", [None])[0]
        if status == Status.RUNNING:
            # SQLite prefers the order of the primary key to this index, and would read
            # the whole table; no consumer's id is below 0.
            held = TaskModel.objects.using(rows.db).filter(status=status, consumer__gte=0)
            rows = rows.filter(pk__in=held.values("pk"))
        elif not self._is_indexed(status, set(asked)):
            rows = self.bounded(rows)
        light: QuerySet[Any] = rows.defer(*_HEAVY).annotate(database_now=DatabaseNow())
        return light

    def _is_indexed(self, status: str | None, asked: set[str]) -> bool:
        if task_id(self.query) is not None or status in _INDEXED:
            return True
        if WorkflowFilter.parameter_name in asked:
            return True
        if self.query:
            return False
        return not asked or (status == Status.CREATED and asked == {QueueFilter.parameter_name})


class QueueFilter(admin.SimpleListFilter):
    """Queues with waiting tasks, by index look-ups, and those of registered tasks."""

    title = _("queue")
    parameter_name = "queue"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """Return the queues; those that only ended tasks of unknown functions had are left out."""
        using = alias()
        waiting = databases.of(using).queues(connections[using])
        default = get_settings().DEFAULT_QUEUE
        registered = {registry.find(name).options.queue or default for name in registry.names()}
        return [(name, name) for name in sorted({*waiting, *registered})[:QUEUES_SHOWN]]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the tasks of one queue."""
        return queryset.filter(queue=self.value()) if self.value() else queryset


class FunctionFilter(admin.SimpleListFilter):
    """Registered tasks; no row is read for that."""

    title = _("function")
    parameter_name = "function"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """Return the registered tasks, by their short names where those are unique."""
        names = registry.names()
        short = [name.rpartition(".")[2] for name in names]
        return [
            (name, label if short.count(label) == 1 else name)
            for name, label in zip(names, short, strict=True)
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the calls of one task, under its former names as well."""
        name = self.value()
        return queryset.filter(func_name__in=names_of(name)) if name else queryset


class WorkflowFilter(admin.SimpleListFilter):
    """The tasks of one workflow; offered where a page of a workflow leads here."""

    title = _("workflow")
    parameter_name = "workflow"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """Return the workflow that was asked for, if one was."""
        value = self.value()
        return [(value, f"#{value}")] if value else []

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the tasks of that workflow."""
        value = self.value()
        if not value:
            return queryset
        number = task_id(value)
        return queryset.none() if number is None else queryset.filter(workflow=number)


class ReadOnly:
    """Rows in the database of the tasks that nobody adds or edits by hand."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Read from ``FIREFLY_JOBS["DATABASE"]``, whatever the router says."""
        rows: Any = super().get_queryset(request)  # type: ignore[misc]
        found: QuerySet[Any] = rows.using(alias())
        return found

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody adds a row here."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody deletes one either."""
        return False
