"""What the index keeps.

What ``index_file`` writes and what ``read_metadata`` writes are separate
tables that meet only in the path: the two tasks of one file run at the same
time, and neither waits for a row of the other.
"""

from django.db import models
from django.db.models import Count, Sum


class SourceFile(models.Model):
    """A parsed file.  The counts are kept, so that the front page adds up one small table."""

    path = models.CharField(max_length=500, unique=True)
    module = models.CharField(max_length=300)
    lines = models.PositiveIntegerField()
    class_count = models.PositiveIntegerField()
    function_count = models.PositiveIntegerField()
    parsed_at = models.DateTimeField(db_index=True)

    class Meta:
        ordering = ("path",)

    def __str__(self) -> str:
        return self.module


class FileMetadata(models.Model):
    """What the file system says about a file, parsed or not."""

    path = models.CharField(max_length=500, unique=True)
    size_bytes = models.PositiveBigIntegerField()
    modified_at = models.DateTimeField()

    class Meta:
        ordering = ("path",)
        verbose_name_plural = "file metadata"

    def __str__(self) -> str:
        return self.path


class Definition(models.Model):
    """Where a name is defined in a file; lines count from 1, the last one included."""

    name = models.CharField(max_length=200, db_index=True)
    qualified_name = models.CharField(max_length=500)
    line = models.PositiveIntegerField()
    end_line = models.PositiveIntegerField()

    class Meta:
        abstract = True
        ordering = ("name", "id")

    def __str__(self) -> str:
        return self.qualified_name


class Class(Definition):
    """A class definition."""

    source_file = models.ForeignKey(SourceFile, models.CASCADE, related_name="classes")

    class Meta(Definition.Meta):
        verbose_name_plural = "classes"


class Function(Definition):
    """A function or method definition."""

    source_file = models.ForeignKey(SourceFile, models.CASCADE, related_name="functions")
    is_async = models.BooleanField()

    class Meta(Definition.Meta):
        pass


class IndexRequest(models.Model):
    """A visitor's wish to have a file indexed, stored together with the task it scheduled."""

    path = models.CharField(max_length=500)
    # No foreign key: ended tasks are pruned, the wish may stay.
    task_id = models.PositiveBigIntegerField()
    requested_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return self.path


def index_totals() -> dict[str, int]:
    """Return what the index holds, by label: from the kept counts, not by counting rows."""
    return SourceFile.objects.aggregate(
        files=Count("pk"),
        classes=Sum("class_count", default=0),
        functions=Sum("function_count", default=0),
        lines=Sum("lines", default=0),
    )
