"""What jobs are started on."""

from django.db import models


class Project(models.Model):
    """Something that has files."""

    name = models.CharField(max_length=100)

    def __str__(self) -> str:
        return self.name


class DataFile(models.Model):
    """A file, which a job may flag."""

    name = models.CharField(max_length=100)
    project = models.ForeignKey(
        Project, on_delete=models.CASCADE, related_name="datafiles", null=True, blank=True
    )
    custom_flag = models.BooleanField(default=False)

    def __str__(self) -> str:
        return self.name
