"""Files in the admin."""

from django.contrib import admin

from firefly_jobs.admin import RegisteredJobsMixin

from .models import DataFile, Project

admin.site.register(Project)


@admin.register(DataFile)
class DataFileAdmin(RegisteredJobsMixin, admin.ModelAdmin):  # type: ignore[type-arg]
    """Files, with the jobs that can be started on them as actions."""

    list_display = ("name", "project", "custom_flag")
