"""What the tasks of the examples write."""

from django.db import models


class Order(models.Model):
    """An order of the example shop."""

    number = models.CharField(max_length=20, unique=True)
    is_paid = models.BooleanField(default=False)
    invoice = models.CharField(max_length=40, blank=True, default="")

    def __str__(self) -> str:
        return self.number
