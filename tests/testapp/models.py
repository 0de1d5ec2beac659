"""What the tasks of the tests write."""

from typing import ClassVar

from django.db import models


class Effect(models.Model):
    """One execution that was committed.  Nothing is unique, so that a double is visible."""

    task_key = models.CharField(max_length=200, db_index=True)
    value = models.IntegerField(default=0)
    note = models.CharField(max_length=200, blank=True, default="")
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("id",)

    def __str__(self) -> str:
        return f"{self.task_key}={self.value}"


class Ticket(models.Model):
    """A foreign key, checked at COMMIT on PostgreSQL and SQLite, at once on MariaDB and MySQL."""

    effect = models.ForeignKey(Effect, on_delete=models.CASCADE)

    def __str__(self) -> str:
        return f"ticket for effect {self.effect_id}"


class Seat(models.Model):
    """A number that is unique at COMMIT.  The table exists only where that can be said."""

    number = models.IntegerField()

    class Meta:
        required_db_features = ("supports_deferrable_unique_constraints",)
        constraints: ClassVar = [
            models.UniqueConstraint(
                name="testapp_seat_number_at_commit",
                fields=["number"],
                deferrable=models.Deferrable.DEFERRED,
            ),
        ]

    def __str__(self) -> str:
        return str(self.number)
