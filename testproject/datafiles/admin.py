"""Files in the admin."""

from django.contrib import admin

from .models import DataFile, Project

admin.site.register(Project)
admin.site.register(DataFile, list_display=("name", "project", "custom_flag"))
