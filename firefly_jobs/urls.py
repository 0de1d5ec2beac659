"""URLs of the HTTP interface: ``path("api/", include("firefly_jobs.urls"))``."""

from __future__ import annotations

from django.urls import path

from . import views

app_name = "firefly_jobs"
urlpatterns = [
    path("openapi.json", views.OpenApi.as_view(), name="openapi"),
    path("jobs/", views.Jobs.as_view(), name="jobs"),
    path("jobs/<str:task_name>/start/", views.Start.as_view(), name="start"),
    path("tasks/", views.Tasks.as_view(), name="tasks"),
    path("tasks/<str:task_id>/", views.OneTask.as_view(), name="task"),
]
