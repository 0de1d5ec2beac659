# ruff: noqa: ARG002 - Django calls these methods, with its own arguments
"""Tasks in the admin: the list, the page of one task, the actions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.views.main import ChangeList
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils.html import format_html
from django.utils.text import capfirst
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from firefly_jobs import lifecycle, registry
from firefly_jobs.autodiscovery import import_tasks
from firefly_jobs.models import TaskModel, WorkflowModel
from firefly_jobs.states import TERMINAL, Status, WorkflowStatus

from .presentation import NOTHING, as_call, brief_moment, moment, short_repr, shown, span, span_of
from .rows import (
    COUNT_MAX,
    BoundedPaginator,
    FunctionFilter,
    QueueFilter,
    ReadOnly,
    TaskChangeList,
    WorkflowFilter,
    alias,
    names_of,
    task_id,
)

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[TaskModel]
else:
    _ModelAdmin = admin.ModelAdmin

logger = logging.getLogger("firefly_jobs")

ATTEMPTS_SHOWN = 20
EVENTS_SHOWN = 50
_EVENTS: Any = (_("Events"), {"fields": ("happened",)})
_RETRIED_FROM = (Status.FAILED, Status.CANCELLED)
_CANCELLED_FROM = (Status.CREATED, Status.BLOCKED)


class _NotEndedError(Exception):
    """The task to delete was made due again meanwhile."""


@admin.register(TaskModel)
class TaskAdmin(ReadOnly, _ModelAdmin):
    """Look at tasks, retry failed ones, cancel waiting ones."""

    list_display = (
        *("id", "function", "queue", "state", "priority"),
        *("due_briefly", "created_briefly", "took", "retries"),
    )
    list_display_links = ("id", "function")
    list_filter = ("status", QueueFilter, FunctionFilter, WorkflowFilter)
    ordering = ("-id",)
    sortable_by = ("id",)
    search_fields = ("id",)
    search_help_text = _("A task's id, or a function's name or the beginning of it.")
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    paginator = BoundedPaginator
    actions = ("retry_tasks", "cancel_tasks")
    fieldsets = (
        (None, {"fields": ("state", "func_name", "queue", "priority")}),
        (_("Call"), {"fields": ("call", "result", "last_error")}),
        (
            _("Times"),
            {"fields": ("created_at", "due", "started_at", "ended_at", "took")},
        ),
        (_("Attempts"), {"fields": ("retries", "retry_rule", "history")}),
        _EVENTS,
        (
            _("Claim"),
            {"classes": ("collapse",), "fields": ("fence", "consumer", "rescues", "lost_alone")},
        ),
    )
    readonly_fields = (
        *("state", "call", "result", "last_error", "created_at", "due", "started_at"),
        *("ended_at", "took", "retries", "retry_rule", "history", "part_of", "happened"),
    )

    class Media:
        css = {"all": ("firefly_jobs/admin.css",)}  # noqa: RUF012 - as Django reads it

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        """Return the bounded list."""
        return TaskChangeList

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the list, once this process knows the project's tasks."""
        _know_tasks()
        # Django's own, "Select task to change", promises what this page does not offer.
        title = {"title": capfirst(self.opts.verbose_name_plural)}
        return super().changelist_view(request, title | (extra_context or {}))

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find a task by id, or calls by the function's name or the beginning of it."""
        term = search_term.strip()
        number = task_id(term)
        if not term:
            return queryset, False
        if number is not None:
            return queryset.filter(pk=number), False
        start = term.casefold()
        found = [
            name
            for name in registry.names()
            if name.casefold().startswith(start)
            or name.rpartition(".")[2].casefold().startswith(start)
        ]
        names = {term, *(former for name in found for former in names_of(name))}
        return queryset.filter(func_name__in=sorted(names)), False

    # --- who may do what

    def has_change_permission(self, request: HttpRequest, obj: TaskModel | None = None) -> bool:
        """Nobody edits a task; the permission is what the actions ask for."""
        return obj is None and super().has_change_permission(request)

    def has_delete_permission(self, request: HttpRequest, obj: TaskModel | None = None) -> bool:
        """Allow to delete an ended task; deleting many is the job of a command."""
        return (
            obj is not None
            and obj.status in TERMINAL
            and admin.ModelAdmin.has_delete_permission(self, request, obj)
            and not _is_needed(obj)
        )

    # --- actions

    @admin.action(
        permissions=["change"], description=_("Retry selected tasks (failed or cancelled)")
    )
    def retry_tasks(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        """Make failed and cancelled tasks due now, with all their retries."""
        done, left = self._change(
            request, queryset, lifecycle.retry, _RETRIED_FROM, "Made due again."
        )
        if done:
            text = ngettext("%d task is due again.", "%d tasks are due again.", done)
            self.message_user(request, text % done, messages.SUCCESS)
        if left:
            text = ngettext(
                "%d task was left as it is: only failed and cancelled tasks can be retried.",
                "%d tasks were left as they are: only failed and cancelled tasks can be retried.",
                left,
            )
            self.message_user(request, text % left, messages.WARNING)
        return self._back(request)

    @admin.action(permissions=["change"], description=_("Cancel selected tasks (not yet started)"))
    def cancel_tasks(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        """Cancel tasks that have not started."""
        done, left = self._change(
            request, queryset, lifecycle.cancel, _CANCELLED_FROM, "Cancelled."
        )
        if done:
            text = ngettext("%d task was cancelled.", "%d tasks were cancelled.", done)
            self.message_user(request, text % done, messages.SUCCESS)
        if left:
            text = ngettext(
                "%d task was left as it is: it has started, or has ended.",
                "%d tasks were left as they are: they have started, or have ended.",
                left,
            )
            self.message_user(request, text % left, messages.WARNING)
        return self._back(request)

    def _change(
        self,
        request: HttpRequest,
        queryset: QuerySet[Any],
        verb: Callable[..., int],
        sources: Collection[Status],
        note: str,
    ) -> tuple[int, int]:
        """Apply ``verb`` in batches; return how many rows it changed and how many it left."""
        rows = list(
            queryset.order_by("-pk").values_list("pk", "func_name", "status", "step")[
                : COUNT_MAX + 1
            ]
        )
        if len(rows) > COUNT_MAX:
            rows = rows[:COUNT_MAX]
            text = _("Only the newest {count} of the selected tasks were looked at.")
            self.message_user(request, text.format(count=f"{COUNT_MAX:,}"), messages.WARNING)
        if verb is lifecycle.retry:
            rows = self._without_steps(request, rows)
        fit = [
            TaskModel(pk=pk, func_name=name)
            for pk, name, status, _step in rows
            if status in sources
        ]
        done = 0
        for start in range(0, len(fit), lifecycle.BATCH_SIZE):
            batch = fit[start : start + lifecycle.BATCH_SIZE]
            done += verb([task.pk for task in batch], using=alias())
            LogEntry.objects.log_actions(request.user.pk or 0, batch, CHANGE, note)
        return done, len(rows) - done

    def _without_steps(self, request: HttpRequest, rows: list[Any]) -> list[Any]:
        """Leave out steps of workflows, and say what they run again with."""
        others = [row for row in rows if row[-1] is None]
        if steps := len(rows) - len(others):
            text = ngettext(
                "%d step was left as it is: it runs again with its workflow.",
                "%d steps were left as they are: they run again with their workflows.",
                steps,
            )
            self.message_user(request, text % steps, messages.WARNING)
        return others

    def _back(self, request: HttpRequest) -> HttpResponse | None:
        """Return to the page of the task whose button was pressed, else to the list."""
        pk = task_id(request.POST.get("firefly_page", ""))
        if pk is None:
            return None
        return HttpResponseRedirect(_change_url(pk))

    # --- one task

    def get_object(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Return the task, and remember whether who looks may see its workflow."""
        task: Any = super().get_object(request, *args, **kwargs)
        if task is not None:
            allowed = ("view_workflowmodel", "change_workflowmodel")
            task.has_links = any(request.user.has_perm(f"firefly_jobs.{p}") for p in allowed)
        return task

    def get_fieldsets(self, request: HttpRequest, obj: TaskModel | None = None) -> Any:
        """Name the workflow on the page of one of its tasks, and show events if any are kept."""
        (title, first), *rest = super().get_fieldsets(request, obj)
        if obj is not None and obj.workflow_id is not None:
            first = first | {"fields": (*first["fields"], "part_of")}
        if obj is None or not obj.events.using(alias()).exists():
            rest = [part for part in rest if part is not _EVENTS]
        return [(title, first), *rest]

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Add the buttons that fit the task's status and the person's permissions."""
        task = kwargs.get("obj")
        if task is not None and self.has_change_permission(request):
            context["firefly_list_url"] = reverse("admin:firefly_jobs_taskmodel_changelist")
            context["firefly_actions"] = [
                (name, label)
                for name, label, statuses in (
                    ("retry_tasks", _("Retry"), _RETRIED_FROM),
                    ("cancel_tasks", _("Cancel"), _CANCELLED_FROM),
                )
                if task.status in statuses and not (name == "retry_tasks" and hasattr(task, "step"))
            ]
        return super().render_change_form(request, context, *args, **kwargs)

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        """Say what goes with a task: its attempts, counted where the task lives."""
        tasks = list(objs)
        attempts = sum(task.attempts.using(alias()).count() for task in tasks)
        may = all(self.has_delete_permission(request, task) for task in tasks)
        counts = {self.opts.verbose_name_plural: len(tasks), _("attempts"): attempts}
        return [str(task) for task in tasks], counts, set() if may else {self.opts.verbose_name}, []

    def delete_model(self, request: HttpRequest, obj: TaskModel) -> None:
        """Delete an ended task and its history."""
        if not lifecycle.delete([obj.pk], using=alias()):
            raise _NotEndedError

    def delete_view(self, request: HttpRequest, object_id: str, *args: Any, **kwargs: Any) -> Any:
        """Delete after asking; a task that was made due again meanwhile stays."""
        try:
            return super().delete_view(request, object_id, *args, **kwargs)
        except _NotEndedError:
            text = _("The task was not deleted: it was made due again meanwhile.")
            self.message_user(request, text, messages.ERROR)
            return HttpResponseRedirect(_change_url(object_id))

    # --- columns and fields

    @admin.display(description=_("function"))
    def function(self, task: TaskModel) -> str:
        """Show the function's name, with its module in the background."""
        module, dot, name = task.func_name.rpartition(".")
        return format_html('<span class="firefly-module">{}{}</span><wbr>{}', module, dot, name)

    @admin.display(description=_("status"))
    def state(self, task: TaskModel) -> str:
        """Show the status as a badge."""
        return format_html(
            '<span class="firefly-status firefly-{}">{}</span>',
            task.status,
            task.get_status_display(),
        )

    @admin.display(description=_("due"))
    def due_briefly(self, task: TaskModel) -> str:
        """Show when it is or was due, for a column."""
        return brief_moment(task.run_at)

    @admin.display(description=_("created"))
    def created_briefly(self, task: TaskModel) -> str:
        """Show when it was scheduled, for a column."""
        return brief_moment(task.created)

    @admin.display(description=_("due"))
    def due(self, task: TaskModel) -> str:
        """Show when it is or was due."""
        return moment(task.run_at)

    @admin.display(description=_("created"))
    def created_at(self, task: TaskModel) -> str:
        """Show when it was scheduled."""
        return moment(task.created)

    @admin.display(description=_("started"))
    def started_at(self, task: TaskModel) -> str:
        """Show when its last attempt started."""
        return moment(task.started)

    @admin.display(description=_("ended"))
    def ended_at(self, task: TaskModel) -> str:
        """Show when it ended."""
        return moment(task.ended)

    @admin.display(description=_("duration"))
    def took(self, task: TaskModel) -> str:
        """Show how long the last attempt took, or takes so far by the database's clock."""
        now = getattr(task, "database_now", None)
        if task.status == Status.RUNNING and now is not None and task.started is not None:
            return _("{span} so far").format(span=span(now - task.started))
        return span_of(task.duration)

    @admin.display(description=_("retries"))
    def retries(self, task: TaskModel) -> str:
        """Show how many retries were used, of how many."""
        if not task.max_retries and not task.retry_attempts:
            return NOTHING
        return f"{task.retry_attempts} / {task.max_retries}"

    @admin.display(description=_("retry strategy"))
    def retry_rule(self, task: TaskModel) -> str:
        """Show the strategy's JSON, or the fixed delay."""
        if task.retry:
            return format_html("<code>{}</code>", task.retry)
        return (
            _("after {seconds} s").format(seconds=task.retry_delay) if task.max_retries else NOTHING
        )

    @admin.display(description=_("workflow"))
    def part_of(self, task: Any) -> str:
        """Show which step of which workflow it is."""
        run = WorkflowModel.objects.using(alias()).filter(pk=task.workflow_id).first()
        if run is None:
            return NOTHING
        steps = run.steps.using(alias()).filter(pk=task.pk)
        step = steps.values_list("name", flat=True).first()
        what = _("step {name}").format(name=step) if step else _("when it has ended")
        if not task.has_links:
            return f"{run}, {what}"
        url = reverse("admin:firefly_jobs_workflowmodel_change", args=[run.pk])
        return format_html('<a href="{}">{}</a>, {}', url, run, what)

    @admin.display(description=_("arguments"))
    def call(self, task: TaskModel) -> str:
        """Show the call as it would be written, if its stored arguments can be trusted."""
        return shown(task.raw_params, lambda: as_call(task))

    @admin.display(description=_("result"))
    def result(self, task: TaskModel) -> str:
        """Show what it returned."""
        if task.raw_returned is None:
            return NOTHING
        return shown(task.raw_returned, lambda: short_repr.repr(task.returned))

    @admin.display(description=_("last error"))
    def last_error(self, task: TaskModel) -> str:
        """Show the last error's one line."""
        return (
            format_html('<pre class="firefly-code">{}</pre>', task.error) if task.error else NOTHING
        )

    @admin.display(description=_("history"))
    def history(self, task: TaskModel) -> str:
        """Show attempts that did not simply succeed, newest first, the first traceback open."""
        newest = list(task.attempts.using(alias()).order_by("-id")[: ATTEMPTS_SHOWN + 1])
        if not newest:
            return str(_("No attempt has failed."))
        rows = [
            {"attempt": attempt, "ended": moment(attempt.ended), "took": span_of(attempt.duration)}
            for attempt in newest[:ATTEMPTS_SHOWN]
        ]
        return render_to_string(
            "admin/firefly_jobs/taskmodel/attempts.html",
            {"rows": rows, "is_cut": len(newest) > ATTEMPTS_SHOWN, "shown": ATTEMPTS_SHOWN},
        )

    @admin.display(description=_("what happened"))
    def happened(self, task: TaskModel) -> str:
        """Show what is kept of its life, newest first."""
        newest = list(task.events.using(alias()).order_by("-id")[: EVENTS_SHOWN + 1])
        return render_to_string(
            "admin/firefly_jobs/taskmodel/events.html",
            {
                "rows": [(event, moment(event.at)) for event in newest[:EVENTS_SHOWN]],
                "is_cut": len(newest) > EVENTS_SHOWN,
                "shown": EVENTS_SHOWN,
            },
        )


def _know_tasks() -> None:
    try:
        import_tasks()
    except Exception:  # runs the project's code; the rows can be looked at without it
        logger.exception("Task modules could not be imported")


def _is_needed(task: TaskModel) -> bool:
    """Whether a task's workflow has not ended."""
    if task.workflow_id is None:
        return False
    runs = WorkflowModel.objects.using(alias()).filter(pk=task.workflow_id)
    return runs.filter(status=WorkflowStatus.RUNNING).exists()


def _change_url(pk: int | str) -> str:
    return reverse("admin:firefly_jobs_taskmodel_change", args=[pk])
