"""URLs of the test project."""

from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path("admin/", admin.site.urls),
    path("api/", include("firefly_jobs.urls")),
    path("", include("testproject.codeindex.urls")),
]
