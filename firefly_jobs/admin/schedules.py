# ruff: noqa: ARG002 - Django calls these methods, with its own arguments
"""Schedules in the admin: what recurs, when next, and how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponseRedirect
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from firefly_jobs.autodiscovery import import_tasks
from firefly_jobs.exceptions import JobRefused, ScheduleError
from firefly_jobs.models import ScheduleModel
from firefly_jobs.planning import check_call
from firefly_jobs.recurrence import interval_in_words

from .forms import ScheduleForm
from .presentation import NOTHING, brief_moment, moment, short_repr
from .rows import alias

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[ScheduleModel]
else:
    _ModelAdmin = admin.ModelAdmin

UPCOMING = 10
TASKS_SHOWN = 10
_OF_THE_CODE = ("name", "func_name", "saved_job")
# What is wrong with a row: its own columns, its call, or what reads cron expressions.
_BROKEN = (ValidationError, ValueError, ImproperlyConfigured)


class _NotSavedError(Exception):
    """A change does not fit any more; the message says why."""


def _told(error: Exception) -> str:
    return "; ".join(getattr(error, "messages", None) or [str(error)])


def _without_readonly(options: Any) -> dict[str, Any]:
    fields = tuple(name for name in options["fields"] if name not in ScheduleAdmin.readonly_fields)
    return {**options, "fields": fields}


@admin.register(ScheduleModel)
class ScheduleAdmin(_ModelAdmin):
    """Look at schedules, run one now, pause and change them."""

    form = ScheduleForm
    list_display = (
        *("name", "when", "state", "next_briefly", "last_briefly", "outcome"),
        "counts",
    )
    list_filter = ("operation", "is_paused", "is_retired", "last_status")
    search_fields = ("name", "func_name")
    actions = ("run_selected_now", "pause_selected", "resume_selected")
    readonly_fields = (
        *("state", "declared_by", "next_occurrences", "outcome", "result", "last_at"),
        *("run_count", "manual_count", "success_count", "failure_count", "retry_count"),
        *("active_count", "latest_tasks"),
    )
    fieldsets = (
        (None, {"fields": ("name", "state", "declared_by")}),
        (_("Call"), {"fields": ("func_name", "saved_job", "arguments")}),
        (
            _("When"),
            {
                "fields": (
                    *("cron", "timezone", "every", "starts_at", "ends_at", "max_runs"),
                    *("misfire", "overlap", "jitter", "is_paused", "next_occurrences"),
                )
            },
        ),
        (
            _("How it goes"),
            {
                "fields": (
                    *("last_at", "outcome", "result", "run_count", "manual_count"),
                    *("success_count", "failure_count", "retry_count", "active_count"),
                    "latest_tasks",
                )
            },
        ),
    )

    class Media:
        css = {"all": ("firefly_jobs/admin.css",)}  # noqa: RUF012 - as Django reads it

    def get_queryset(self, request: HttpRequest) -> QuerySet[ScheduleModel]:
        """Read from the database of the tasks."""
        return super().get_queryset(request).using(alias())

    def get_form(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Return the form, once this process knows the project's tasks."""
        import_tasks()
        return super().get_form(request, *args, **kwargs)

    def get_fieldsets(self, request: HttpRequest, obj: ScheduleModel | None = None) -> Any:
        """Leave out of the form of a new one what only consumers and time can tell."""
        found = super().get_fieldsets(request, obj)
        if obj is not None:
            return found
        shown = [(title, _without_readonly(options)) for title, options in found]
        return [(title, options) for title, options in shown if options["fields"]]

    def get_readonly_fields(self, request: HttpRequest, obj: ScheduleModel | None = None) -> Any:
        """Leave to the code what belongs to it."""
        found = super().get_readonly_fields(request, obj)
        if obj is not None and (obj.owner or obj.raw_call):
            return (*found, *_OF_THE_CODE)
        return found

    def has_delete_permission(self, request: HttpRequest, obj: ScheduleModel | None = None) -> bool:
        """Leave what the code declares, which would come back; what is retired may go."""
        may = super().has_delete_permission(request, obj)
        return may and (obj is None or not obj.owner or obj.is_retired)

    def get_actions(self, request: HttpRequest, action_location: Any = None) -> dict[str, Any]:
        """Delete one at a time, since some may not be."""
        # Django 6.1 and later say where the actions are offered.
        words = {} if action_location is None else {"action_location": action_location}
        found: dict[str, Any] = super().get_actions(request, **words)
        found.pop("delete_selected", None)
        return found

    def changeform_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        """Show the page once more if somebody else has changed the row since it was checked."""
        try:
            return super().changeform_view(request, *args, **kwargs)
        except _NotSavedError as error:
            # The transaction is undone.
            text = _("Nothing was saved, as somebody else has changed it meanwhile: %(problem)s")
            self.message_user(request, text % {"problem": error}, messages.ERROR)
            return HttpResponseRedirect(request.get_full_path())

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """Write what was changed, and nothing that consumers count."""
        if not change:
            obj.save(using=alias(), force_insert=True)
        elif form.changed_data:
            changes = {name: form.cleaned_data[name] for name in form.changed_data}
            try:
                row = ScheduleModel.objects.using(alias()).get(pk=obj.pk)
                row.change(**changes)
            except (ScheduleModel.DoesNotExist, *_BROKEN) as error:
                raise _NotSavedError(_told(error)) from None

    # --- actions

    @admin.action(permissions=["change"], description=_("Run selected schedules now"))
    def run_selected_now(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Start each once more."""
        import_tasks()
        for row in queryset:
            try:
                started = row.run_now(user=request.user)
            except (ScheduleError, JobRefused, *_BROKEN, TypeError) as error:
                self.message_user(request, f"{row}: {_told(error)}", messages.ERROR)
            else:
                text = _("Started “%(name)s”: %(what)s.") % {"name": row, "what": started}
                self.message_user(request, text, messages.SUCCESS)

    @admin.action(permissions=["change"], description=_("Pause selected schedules"))
    def pause_selected(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Let none of them fire."""
        self._each(
            request,
            queryset.filter(is_paused=False),
            "pause",
            lambda n: ngettext("Paused %(count)s schedule.", "Paused %(count)s schedules.", n),
        )

    @admin.action(permissions=["change"], description=_("Resume selected schedules"))
    def resume_selected(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Let them fire again."""
        import_tasks()
        self._each(
            request,
            queryset.filter(is_paused=True),
            "resume",
            lambda n: ngettext("Resumed %(count)s schedule.", "Resumed %(count)s schedules.", n),
        )

    def _each(
        self, request: HttpRequest, queryset: QuerySet[Any], verb: str, text: Callable[[int], str]
    ) -> None:
        """Do something with each; what is wrong with one is told, and the others go on."""
        rows, count = list(queryset), 0
        for row in rows:
            try:
                getattr(row, verb)()
            except _BROKEN as error:
                self.message_user(request, f"{row}: {_told(error)}", messages.ERROR)
            else:
                count += 1
        if count:
            self.message_user(request, text(count) % {"count": count}, messages.SUCCESS)
        elif not rows:
            self.message_user(request, _("There was nothing to do."), messages.INFO)

    # --- columns and fields

    @admin.display(description=_("when"))
    def when(self, row: ScheduleModel) -> str:
        """Show the expression, or the interval."""
        if row.cron:
            return format_html('<code class="firefly-cron">{}</code> {}', row.cron, row.timezone)
        return str(_("by hand")) if row.every is None else interval_in_words(row.every)

    @admin.display(description=_("state"))
    def state(self, row: ScheduleModel) -> str:
        """Show whether it runs, waits, or fires no more."""
        word, label = row.operation, str(row.get_operation_display())
        if row.is_retired:
            word, label = "cancelled", str(_("retired"))
        elif row.is_paused:
            word, label = "blocked", str(_("paused"))
        return format_html('<span class="firefly-status firefly-{}">{}</span>', word, label)

    @admin.display(description=_("next run"), ordering="next_run")
    def next_briefly(self, row: ScheduleModel) -> str:
        """Show when it is due, for a column."""
        return brief_moment(row.next_run) if row.next_run else NOTHING

    @admin.display(description=_("runs / ok / failed"), ordering="run_count")
    def counts(self, row: ScheduleModel) -> str:
        """Show how often it has run, and how that ended, in one column."""
        return f"{row.run_count:,} / {row.success_count:,} / {row.failure_count:,}"

    @admin.display(description=_("last run"), ordering="last_run")
    def last_briefly(self, row: ScheduleModel) -> str:
        """Show when it was started last, for a column."""
        return brief_moment(row.last_run) if row.last_run else NOTHING

    @admin.display(description=_("last run"))
    def last_at(self, row: ScheduleModel) -> str:
        """Show when it was started last."""
        return moment(row.last_run) if row.last_run else NOTHING

    @admin.display(description=_("last status"))
    def outcome(self, row: ScheduleModel) -> str:
        """Show how the latest that has ended did."""
        if not row.last_status:
            return NOTHING
        return format_html(
            '<span class="firefly-status firefly-{}">{}</span>',
            row.last_status,
            row.get_last_status_display(),
        )

    @admin.display(description=_("last result"))
    def result(self, row: ScheduleModel) -> str:
        """Show what it returned, or its error."""
        if row.raw_last_result is None:
            return row.last_error or NOTHING
        try:
            return short_repr.repr(row.last_result)
        except Exception as error:  # noqa: BLE001 - another key, a class that has gone
            return f"{type(error).__name__}: {error}"

    @admin.display(description=_("declared by"))
    def declared_by(self, row: ScheduleModel) -> str:
        """Show whose code declares it."""
        return row.owner or str(_("nobody: it was made by hand, or at run time"))

    @admin.display(description=_("next occurrences"))
    def next_occurrences(self, row: ScheduleModel) -> str:
        """Show the next ten, in the schedule's own time zone."""
        if row.is_retired or row.is_paused:
            return str(_("none: it is retired") if row.is_retired else _("none while it is paused"))
        try:
            zone = row.zone
            found = row.upcoming(UPCOMING)
            check_call(row)
        except _BROKEN as error:
            problem = _told(error)
            return format_html('<p class="firefly-refused">{} {}</p>', _("Cannot run:"), problem)
        if not found:
            return NOTHING
        lines = ((f"{one.astimezone(zone):%a %Y-%m-%d %H:%M:%S %Z}",) for one in found)
        return format_html_join("", "<div>{}</div>", lines)

    @admin.display(description=_("latest tasks"))
    def latest_tasks(self, row: ScheduleModel) -> str:
        """Show the latest tasks that it has started."""
        if not row.pk:
            return NOTHING
        lines = (
            (reverse("admin:firefly_jobs_taskmodel_change", args=[task.pk]), task, task.status)
            for task in row.tasks[:TASKS_SHOWN]
        )
        return format_html_join("", '<div><a href="{}">{}</a> {}</div>', lines) or NOTHING
