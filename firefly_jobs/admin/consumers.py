# ruff: noqa: ARG002 - Django calls these methods, with its own arguments
"""Consumers in the admin: who is there, and when each was last heard of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.db.models import Count, OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from firefly_jobs.databases.functions import DatabaseNow
from firefly_jobs.models import ConsumerModel, TaskModel
from firefly_jobs.states import Status

from .presentation import moment, span
from .rows import ReadOnly

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[ConsumerModel]
else:
    _ModelAdmin = admin.ModelAdmin


@admin.register(ConsumerModel)
class ConsumerAdmin(ReadOnly, _ModelAdmin):
    """Look at the consumers: who is there, and when each was last heard of."""

    list_display = ("id", "name", "state", "queue_names", "heartbeat", "running", "started_at")
    list_display_links = ("id", "name")
    ordering = ("-id",)
    sortable_by = ("id",)
    fieldsets = (
        (None, {"fields": ("name", "state", "queue_names", "running")}),
        (_("Lease"), {"fields": ("heartbeat", "lease_seconds", "suspected", "started_at")}),
    )
    readonly_fields = ("state", "queue_names", "running", "heartbeat", "suspected", "started_at")

    class Media:
        css = {"all": ("firefly_jobs/admin.css",)}  # noqa: RUF012 - as Django reads it

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Add the database's clock, and how many tasks each consumer holds."""
        held = (
            TaskModel.objects.filter(status=Status.RUNNING, consumer=OuterRef("pk"))
            .order_by()
            .values("consumer")
            .annotate(held=Count("pk"))
            .values("held")
        )
        rows = super().get_queryset(request)
        found: QuerySet[Any] = rows.annotate(
            database_now=DatabaseNow(), held=Coalesce(Subquery(held), 0)
        )
        return found

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody edits a consumer."""
        return False

    @admin.display(description=_("state"))
    def state(self, consumer: Any) -> str:
        """Show whether it keeps its lease."""
        late = consumer.database_now - consumer.renewed_at
        if consumer.suspected_at is not None:
            css, text = "failed", _("suspected dead")
        elif late.total_seconds() > consumer.lease_seconds:
            css, text = "failed", _("late")
        else:
            css, text = "completed", _("alive")
        return format_html('<span class="firefly-status firefly-{}">{}</span>', css, text)

    @admin.display(description=_("queues"))
    def queue_names(self, consumer: ConsumerModel) -> str:
        """Show the queues it serves, in its order."""
        return ", ".join(consumer.queues.split(","))

    @admin.display(description=_("last heartbeat"))
    def heartbeat(self, consumer: Any) -> str:
        """Show how long ago it renewed its lease, by the database's clock."""
        age = span(consumer.database_now - consumer.renewed_at)
        return _("{age} ago").format(age=age)

    @admin.display(description=_("running tasks"))
    def running(self, consumer: Any) -> str:
        """Show how many tasks it holds."""
        return str(consumer.held)

    @admin.display(description=_("suspected dead since"))
    def suspected(self, consumer: ConsumerModel) -> str:
        """Show when another consumer missed its heartbeat first."""
        return moment(consumer.suspected_at)

    @admin.display(description=_("started"))
    def started_at(self, consumer: ConsumerModel) -> str:
        """Show when it started."""
        return moment(consumer.started)
