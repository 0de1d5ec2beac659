# ruff: noqa: ARG002 - Django calls these methods, with its own arguments
"""Workflows in the admin: the list, the page of one with its picture, the actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.views.main import ChangeList
from django.db.models import OuterRef, QuerySet, Subquery
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils.html import format_html
from django.utils.text import capfirst
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from firefly_jobs.databases.functions import DatabaseNow
from firefly_jobs.exceptions import TaskAlreadyScheduled
from firefly_jobs.models import TaskModel, WorkflowModel, WorkflowStep
from firefly_jobs.runs import ignored_failures_of
from firefly_jobs.states import WorkflowStatus

from .presentation import NOTHING, brief_moment, moment, span
from .rows import BoundedChangeList, BoundedPaginator, ReadOnly, alias, task_id
from .steps import PICTURED_MAX, STEPS_SHOWN, Steps, counts_of

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[WorkflowModel]
else:
    _ModelAdmin = admin.ModelAdmin

# Workflows on a page of the list, and the steps of one that are counted for it.
PER_PAGE = 50
COUNTED_MAX = 10_000
# Each is a transaction, and has as many steps as it has.
CHANGED_MAX = 1_000
IGNORED_SHOWN = 50
_RETRIED_FROM = (WorkflowStatus.FAILED, WorkflowStatus.CANCELLED)
_CANCELLED_FROM = (WorkflowStatus.RUNNING,)


class WorkflowChangeList(BoundedChangeList):
    """The list, which counts the steps of the workflows on one page, as far as they are few."""

    note = _("Searched among the newest {rows:,} workflows only, those after id {after}.")

    def get_queryset(self, request: HttpRequest, *args: Any, **kwargs: Any) -> QuerySet[Any]:
        """Return the rows asked for, as far as can be searched."""
        rows: QuerySet[Any] = super().get_queryset(request, *args, **kwargs)
        if self.query and task_id(self.query) is None:
            rows = self.bounded(rows)
        # A step beyond those that are counted, in the order of an index: in that of its key
        # PostgreSQL might read the whole table for it.
        steps = WorkflowStep.objects.using(rows.db).filter(workflow=OuterRef("pk"))
        beyond = steps.order_by("workflow", "name").values("pk")
        found: QuerySet[Any] = rows.annotate(
            database_now=DatabaseNow(), beyond=Subquery(beyond[COUNTED_MAX : COUNTED_MAX + 1])
        )
        return found

    def get_results(self, request: HttpRequest) -> None:
        """Count the steps of what is on the page."""
        super().get_results(request)
        self.result_list = list(self.result_list)
        few = [run for run in self.result_list if run.beyond is None]
        counts = counts_of(few, using=alias())
        for run in few:
            run.counts = counts[run.pk]


@admin.register(WorkflowModel)
class WorkflowAdmin(ReadOnly, _ModelAdmin):
    """Look at workflows, run again what failed, cancel what has not started."""

    list_display = (
        *("id", "shown_name", "state", "progress"),
        *("created_briefly", "ended_briefly", "took"),
    )
    list_display_links = ("id", "shown_name")
    list_filter = ("status",)
    ordering = ("-id",)
    sortable_by = ("id",)
    search_fields = ("name",)
    search_help_text = _("A workflow's id, or a part of its name.")
    list_per_page = PER_PAGE
    list_max_show_all = PER_PAGE
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    paginator = BoundedPaginator
    actions = ("retry_failed", "cancel_workflows")
    fieldsets = (
        (None, {"fields": ("state", "progress", "last_error", "ignored")}),
        (_("Picture"), {"classes": ("firefly-wide",), "fields": ("picture",)}),
        (_("Steps"), {"classes": ("firefly-wide",), "fields": ("steps",)}),
        (_("Times"), {"fields": ("created_at", "ended_at", "took")}),
        (_("Afterwards"), {"fields": ("on_success_call", "on_failure_call")}),
    )
    readonly_fields = (
        *("state", "progress", "last_error", "ignored", "picture", "steps"),
        *("created_at", "ended_at", "took", "on_success_call", "on_failure_call"),
    )

    class Media:
        css = {"all": ("firefly_jobs/admin.css",)}  # noqa: RUF012 - as Django reads it

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Add the database's clock."""
        found: QuerySet[Any] = super().get_queryset(request).annotate(database_now=DatabaseNow())
        return found

    def get_object(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Return the workflow, and read its steps once for all fields."""
        run: Any = super().get_object(request, *args, **kwargs)
        if run is not None:
            has_links = request.user.has_perm("firefly_jobs.view_taskmodel")
            has_links |= request.user.has_perm("firefly_jobs.change_taskmodel")
            run.shown_steps = Steps(run, using=alias(), has_links=has_links)
        return run

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """Leave out the calls that follow the end if there are none."""
        *parts, afterwards = super().get_fieldsets(request, obj)
        has_last = obj is not None and (obj.on_success or obj.on_failure)
        return [*parts, afterwards] if has_last else parts

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        """Return the bounded list."""
        return WorkflowChangeList

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the list, under a title that promises no editing."""
        title = {"title": capfirst(self.opts.verbose_name_plural)}
        return super().changelist_view(request, title | (extra_context or {}))

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find a workflow by id, or by a part of its name."""
        number = task_id(search_term)
        if number is not None:
            return queryset.filter(pk=number), False
        term = search_term.strip()
        return (queryset.filter(name__icontains=term) if term else queryset), False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody edits a workflow; the permission is what the actions ask for."""
        return obj is None and super().has_change_permission(request)

    # --- actions

    @admin.action(permissions=["change"], description=_("Retry what failed in selected workflows"))
    def retry_failed(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        """Run again what has failed or was cancelled in workflows that have ended."""
        done, left = self._change(
            request, queryset, WorkflowModel.retry_failed, "Made to run again."
        )
        if done:
            text = ngettext("%d workflow runs again.", "%d workflows run again.", done)
            self.message_user(request, text % done, messages.SUCCESS)
        if left:
            text = ngettext(
                "%d workflow was left as it is: only failed and cancelled ones run again.",
                "%d workflows were left as they are: only failed and cancelled ones run again.",
                left,
            )
            self.message_user(request, text % left, messages.WARNING)
        return self._back(request)

    @admin.action(
        permissions=["change"], description=_("Cancel selected workflows (what has not started)")
    )
    def cancel_workflows(
        self, request: HttpRequest, queryset: QuerySet[Any]
    ) -> HttpResponse | None:
        """Cancel what has not started of workflows that run."""
        done, left = self._change(request, queryset, WorkflowModel.cancel, "Cancelled.")
        if done:
            text = ngettext("%d workflow was cancelled.", "%d workflows were cancelled.", done)
            self.message_user(request, text % done, messages.SUCCESS)
        if left:
            text = ngettext(
                "%d workflow was left as it is: it has ended.",
                "%d workflows were left as they are: they have ended.",
                left,
            )
            self.message_user(request, text % left, messages.WARNING)
        return self._back(request)

    def _change(
        self,
        request: HttpRequest,
        queryset: QuerySet[Any],
        verb: Callable[[WorkflowModel], int],
        note: str,
    ) -> tuple[int, int]:
        """Apply ``verb`` one by one; return how many were changed, and how many were left."""
        runs = list(queryset.order_by("-pk")[: CHANGED_MAX + 1])
        if len(runs) > CHANGED_MAX:
            runs = runs[:CHANGED_MAX]
            text = _("Only the newest {count:,} of the selected workflows were looked at.")
            self.message_user(request, text.format(count=CHANGED_MAX), messages.WARNING)
        changed, taken = [], []
        for run in runs:
            try:
                if verb(run):
                    changed.append(run)
            except TaskAlreadyScheduled as error:
                taken.append((run, error))
        if changed:
            LogEntry.objects.log_actions(request.user.pk or 0, changed, CHANGE, note)
        for run, reason in taken:
            text = _("{workflow} was left as it is. {reason}")
            self.message_user(request, text.format(workflow=run, reason=reason), messages.ERROR)
        return len(changed), len(runs) - len(changed) - len(taken)

    def _back(self, request: HttpRequest) -> HttpResponse | None:
        """Return to the page whose button was pressed, else to the list."""
        pk = task_id(request.POST.get("firefly_page", ""))
        if pk is None:
            return None
        url = reverse("admin:firefly_jobs_workflowmodel_change", args=[pk])
        return HttpResponseRedirect(url)

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Add the buttons that fit the workflow's status and the person's permissions."""
        run = kwargs.get("obj")
        if run is not None:
            context["subtitle"] = str(run)
        if run is not None and self.has_change_permission(request):
            context["firefly_list_url"] = reverse("admin:firefly_jobs_workflowmodel_changelist")
            context["firefly_actions"] = [
                (name, label)
                for name, label, statuses in (
                    ("retry_failed", _("Retry what failed"), _RETRIED_FROM),
                    ("cancel_workflows", _("Cancel"), _CANCELLED_FROM),
                )
                if run.status in statuses
            ]
        return super().render_change_form(request, context, *args, **kwargs)

    # --- columns and fields

    @admin.display(description=_("name"))
    def shown_name(self, run: WorkflowModel) -> str:
        """Show its name."""
        return run.name

    @admin.display(description=_("status"))
    def state(self, run: WorkflowModel) -> str:
        """Show the status as a badge; one that stops says so."""
        stops = run.status == WorkflowStatus.RUNNING and (run.is_cancelled or run.error)
        return format_html(
            '<span class="firefly-status firefly-{}">{}</span>{}',
            *(run.status, run.get_status_display(), _(" (stops)") if stops else ""),
        )

    @admin.display(description=_("progress"))
    def progress(self, run: Any) -> str:
        """Show how many steps have ended, of how many."""
        steps: Steps | None = getattr(run, "shown_steps", None)
        if steps is not None:
            return _bar(steps.done, steps.total)
        counts = getattr(run, "counts", None)
        if counts is None:
            return _("of more than {count:,}").format(count=COUNTED_MAX)
        done = sum(counts[status] for status in ("completed", "failed", "cancelled"))
        return _bar(done, counts.total())

    @admin.display(description=_("created"))
    def created_briefly(self, run: WorkflowModel) -> str:
        """Show when it was scheduled, for a column."""
        return brief_moment(run.created)

    @admin.display(description=_("ended"))
    def ended_briefly(self, run: WorkflowModel) -> str:
        """Show when it ended, for a column."""
        return brief_moment(run.ended)

    @admin.display(description=_("created"))
    def created_at(self, run: WorkflowModel) -> str:
        """Show when it was scheduled."""
        return moment(run.created)

    @admin.display(description=_("ended"))
    def ended_at(self, run: WorkflowModel) -> str:
        """Show when the last step ended."""
        return moment(run.ended)

    @admin.display(description=_("duration"))
    def took(self, run: Any) -> str:
        """Show how long it took, or takes so far by the database's clock."""
        if run.ended is not None:
            return span(run.ended - run.created)
        return _("{span} so far").format(span=span(run.database_now - run.created))

    @admin.display(description=_("error"))
    def last_error(self, run: WorkflowModel) -> str:
        """Show which step stopped it, and why."""
        if not run.error:
            return NOTHING
        return format_html('<pre class="firefly-code">{}</pre>', run.error)

    @admin.display(description=_("ignored failures"))
    def ignored(self, run: Any) -> str:
        """Show the names of the steps that failed without stopping it."""
        if not run.shown_steps.counts["failed"]:
            return NOTHING
        names = ignored_failures_of(run, limit=IGNORED_SHOWN + 1)
        more = "…" if len(names) > IGNORED_SHOWN else ""
        return ", ".join([*names[:IGNORED_SHOWN], more][: len(names)]) or NOTHING

    @admin.display(description=_("picture"))
    def picture(self, run: Any) -> str:
        """Show the steps and who waits for whom, or a summary of many."""
        steps: Steps = run.shown_steps
        note = ""
        if steps.is_summary:
            text = _("A summary: more than {count} steps. A box stands for many of them.")
            note = format_html('<p class="help">{}</p>', text.format(count=PICTURED_MAX))
        return format_html('<div class="firefly-scroll">{}</div>{}', steps.picture(), note)

    @admin.display(description=_("steps"))
    def steps(self, run: Any) -> str:
        """Show the steps as a table."""
        steps: Steps = run.shown_steps
        tasks = reverse("admin:firefly_jobs_taskmodel_changelist")
        return render_to_string(
            "admin/firefly_jobs/workflowmodel/steps.html",
            {
                "rows": steps.table(),
                "is_cut": steps.total > STEPS_SHOWN,
                "shown": STEPS_SHOWN,
                "total": f"{steps.total:,}",
                "url": f"{tasks}?workflow={run.pk}",
            },
        )

    @admin.display(description=_("on success"))
    def on_success_call(self, run: Any) -> str:
        """Show the call that waits for it to complete."""
        return _last_call(run.on_success, run.shown_steps)

    @admin.display(description=_("on failure"))
    def on_failure_call(self, run: Any) -> str:
        """Show the call that waits for it to fail."""
        return _last_call(run.on_failure, run.shown_steps)


def _bar(done: int, total: int) -> str:
    return format_html(
        '<span class="firefly-progress"><progress max="{}" value="{}"></progress> {} / {}</span>',
        *(total or 1, done, f"{done:,}", f"{total:,}"),
    )


def _last_call(pk: int | None, steps: Steps) -> str:
    if pk is None:
        return NOTHING
    task = TaskModel.objects.using(alias()).only("func_name", "status").filter(pk=pk).first()
    if task is None:
        return NOTHING
    url, status = steps.url(pk), task.get_status_display()
    if not url:
        return f"{task}: {status}"
    return format_html('<a href="{}">{}</a>: {}', url, task, status)
