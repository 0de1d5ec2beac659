# ruff: noqa: ARG002 - Django calls these methods, with its own arguments
"""Registered jobs in the admin: actions on the selected rows, saved jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import ObjectDoesNotExist, ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import NoReverseMatch, reverse
from django.utils.translation import gettext_lazy as _

from firefly_jobs.conf import get_settings
from firefly_jobs.exceptions import JobRefused
from firefly_jobs.job_registry import (
    NamedJob,
    RegisteredJob,
    check_start,
    find,
    get_job_from_name,
    registered_jobs,
)
from firefly_jobs.models import SavedJob

from .forms import SavedJobForm, arguments_form, entered
from .presentation import NOTHING
from .rows import alias

if TYPE_CHECKING:
    _SavedAdmin = admin.ModelAdmin[SavedJob]
else:
    _SavedAdmin = admin.ModelAdmin

PREFIX = "start_job_"
_CONFIRMED = "firefly_confirmed"
# What the page of a form names of the objects; the others are counted.
OBJECTS_SHOWN = 20


class RegisteredJobsMixin:
    """Offers the registered jobs of one type as actions on the rows of a ``ModelAdmin``.

    Attributes:
        job_data_type: The type; by default the model's name in lower case.
    """

    job_data_type: str | None = None

    if TYPE_CHECKING:
        model: Any
        admin_site: Any
        opts: Any

        get_action: Any

    def get_actions(self, request: HttpRequest, action_location: Any = None) -> dict[str, Any]:
        """Add the jobs that this user may start."""
        # Django 6.1 and later say where the actions are offered.
        words = {} if action_location is None else {"action_location": action_location}
        actions: dict[str, Any] = super().get_actions(request, **words)  # type: ignore[misc]
        kind = self.job_data_type or self.model._meta.model_name
        for job in registered_jobs(request.user, kind):
            action = self.get_action(_action(job), **words)
            if action is not None:
                actions[f"{PREFIX}{job.task_name}"] = action
        return actions


def _action(job: RegisteredJob) -> Any:
    def action(model_admin: Any, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        return _start(model_admin, request, queryset, job=job)

    action.__name__ = f"{PREFIX}{job.task_name}"
    # Django fills in the names of the model.
    text = (_("Start: %s") % job.name).replace("%", "%%")
    return admin.action(description=text)(action)


def _start(
    model_admin: Any, request: HttpRequest, queryset: QuerySet[Any], *, job: RegisteredJob
) -> HttpResponse | None:
    """Ask for the arguments, then start the job, and go to the page of its task."""
    # One more than may be, so that too many are refused without reading all.
    pks = list(queryset.order_by("pk").values_list("pk", flat=True)[: job.max_items + 1])
    is_confirmed = request.POST.get(_CONFIRMED) == job.task_name
    form = arguments_form(job)(request.POST if is_confirmed else None)
    try:
        # What no form can mend is told before there is one, or in place of it.
        check_start(job, pks, request.user.pk)
    except JobRefused as refusal:
        model_admin.message_user(request, refusal.message, messages.ERROR)
        return None
    if is_confirmed and form.is_valid():
        try:
            row = _named(job, pks, entered(form), request).start()
        except JobRefused as refusal:
            form.add_error(None, refusal.message)
        else:
            text = _("Started “%(name)s” as task %(pk)s.") % {"name": job.name, "pk": row.pk}
            model_admin.message_user(request, text, messages.SUCCESS)
            return _to_task(request, row.pk)
    count = queryset.count()
    context = {
        **model_admin.admin_site.each_context(request),
        "title": job.name,
        "opts": model_admin.opts,
        "job": job,
        "form": form,
        "objects": list(queryset.order_by("pk")[:OBJECTS_SHOWN]),
        "more": max(0, count - OBJECTS_SHOWN),
        "count": count,
        "selected": request.POST.getlist(ACTION_CHECKBOX_NAME),
        "select_across": request.POST.get("select_across", "0"),
        "action": f"{PREFIX}{job.task_name}",
        "confirmed": _CONFIRMED,
        "checkbox": ACTION_CHECKBOX_NAME,
        "media": model_admin.media + form.media,
    }
    return TemplateResponse(request, "admin/firefly_jobs/registered/start.html", context)


def _named(
    job: RegisteredJob, pks: list[Any], arguments: dict[str, Any], request: HttpRequest
) -> NamedJob:
    kind = job.task_data_type
    return get_job_from_name(job.task_name, kind, pks, arguments, user_pk=request.user.pk)


def _to_task(request: HttpRequest, pk: int) -> HttpResponse | None:
    if not request.user.has_perm("firefly_jobs.view_taskmodel"):
        return None
    try:
        return HttpResponseRedirect(reverse("admin:firefly_jobs_taskmodel_change", args=[pk]))
    except NoReverseMatch:
        return None


def apply_setting() -> None:
    """Give the admins of models that ``FIREFLY_JOBS["JOB_ADMIN_ACTIONS"]`` names the actions."""
    for label, kind in (get_settings().JOB_ADMIN_ACTIONS or {}).items():
        model = apps.get_model(label)
        if not admin.site.is_registered(model):
            continue
        present = type(admin.site.get_model_admin(model))
        if not issubclass(present, RegisteredJobsMixin):
            words = {"job_data_type": kind}
            offering = type(f"{present.__name__}WithJobs", (RegisteredJobsMixin, present), words)
            admin.site.unregister(model)
            admin.site.register(model, offering)


@admin.register(SavedJob)
class SavedJobAdmin(_SavedAdmin):
    """Starts that are kept by name."""

    form = SavedJobForm
    list_display = ("name", "job_name", "obj_type", "what_for", "relation")
    list_filter = ("task_name", "obj_type")
    search_fields = ("name",)
    actions = ("start_now",)

    def get_queryset(self, request: HttpRequest) -> QuerySet[SavedJob]:
        """Read from the database of the tasks."""
        return super().get_queryset(request).using(alias())

    @admin.display(description=_("job"), ordering="task_name")
    def job_name(self, saved: SavedJob) -> str:
        """Show the job's name; where it is known here no more, that of its task."""
        try:
            return find(saved.task_name).name
        except JobRefused:
            return str(saved.task_name)

    @admin.display(description=_("target"), ordering="target_type")
    def what_for(self, saved: SavedJob) -> str:
        """Show the target, or that it has gone."""
        try:
            target = saved.target
        except (ObjectDoesNotExist, LookupError, ValueError, ValidationError):
            gone = _("gone: %(type)s %(pk)s")
            return str(gone % {"type": saved.target_type, "pk": saved.target_pk})
        return NOTHING if target is None else f"{target} ({target._meta.verbose_name})"

    def save_model(self, request: HttpRequest, obj: SavedJob, form: Any, change: bool) -> None:
        """Write to the database of the tasks."""
        obj.save(using=alias(), force_insert=not change)

    @admin.action(permissions=["change"], description=_("Start selected saved jobs"))
    def start_now(self, request: HttpRequest, queryset: QuerySet[SavedJob]) -> None:
        """Start each on what its target has now."""
        for saved in queryset:
            try:
                row = saved.start(user=request.user.pk)
            except (JobRefused, ValueError) as refusal:
                self.message_user(request, f"{saved}: {refusal}", messages.ERROR)
            else:
                text = _("Started “%(name)s” as task %(pk)s.") % {"name": saved, "pk": row.pk}
                self.message_user(request, text, messages.SUCCESS)
