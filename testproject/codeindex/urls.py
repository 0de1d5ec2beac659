"""URLs of the code index."""

from django.urls import path

from . import views

app_name = "codeindex"
urlpatterns = [
    path("", views.index, name="index"),
    path("schedule", views.schedule, name="schedule"),
    path("task/<int:task_id>", views.task_status, name="task"),
]
