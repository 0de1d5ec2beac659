"""Indexes over some of the rows, on databases with and without partial indexes."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

from django.db import models


class StatusIndex(models.Index):
    """Index ``fields`` of the rows whose ``status`` is one of ``statuses``.

    Where the database has partial indexes, ended rows are not in it at all.  Elsewhere
    (MySQL, MariaDB) ``status`` becomes the first key, which keeps ended rows out of the
    range that is read, though not out of the index.
    """

    def __init__(self, *, statuses: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.statuses = statuses

    def deconstruct(self) -> tuple[str, list[Any], dict[str, Any]]:
        """Return what a migration needs to make this index again."""
        path, args, kwargs = super().deconstruct()
        return path, list(args), {**kwargs, "statuses": self.statuses}

    def create_sql(self, model: Any, schema_editor: Any, using: str = "", **kwargs: Any) -> Any:
        """Return the statement that creates the index on this database."""
        if schema_editor.connection.features.supports_partial_indexes:
            plain = models.Index(
                fields=self.fields,
                name=self.name,
                # With IN, SQLite would not use the index for one of the statuses.
                condition=reduce(or_, (models.Q(status=status) for status in self.statuses)),
            )
        else:
            fields = ["status", *(name for name in self.fields if name != "status")]
            plain = models.Index(fields=fields, name=self.name)
        return plain.create_sql(model, schema_editor, using, **kwargs)


class SetIndex(models.Index):
    """Index the rows that have a value in the first of ``fields``.

    Where the database has partial indexes, the others are not in it at all.
    """

    def create_sql(self, model: Any, schema_editor: Any, using: str = "", **kwargs: Any) -> Any:
        """Return the statement that creates the index on this database."""
        condition = None
        if schema_editor.connection.features.supports_partial_indexes:
            condition = models.Q(**{f"{self.fields[0]}__isnull": False})
        plain = models.Index(fields=self.fields, name=self.name, condition=condition)
        return plain.create_sql(model, schema_editor, using, **kwargs)


class UniqueWhereSet(models.UniqueConstraint):
    """One field is unique among the rows that have a value there.

    NULL never equals NULL, so the constraint is the same with and without a condition.
    Where the database has partial indexes, rows without a value are not in it at all, and
    cost nothing.
    """

    def _plain(self, schema_editor: Any) -> models.UniqueConstraint:
        condition = None
        if schema_editor.connection.features.supports_partial_indexes:
            condition = models.Q(**{f"{self.fields[0]}__isnull": False})
        return models.UniqueConstraint(fields=self.fields, name=self.name, condition=condition)

    def constraint_sql(self, model: Any, schema_editor: Any) -> Any:
        """Return the clause of CREATE TABLE, if that is how the database takes it."""
        return self._plain(schema_editor).constraint_sql(model, schema_editor)

    def create_sql(self, model: Any, schema_editor: Any) -> Any:
        """Return the statement that adds it to a table."""
        return self._plain(schema_editor).create_sql(model, schema_editor)

    def remove_sql(self, model: Any, schema_editor: Any) -> Any:
        """Return the statement that takes it away."""
        return self._plain(schema_editor).remove_sql(model, schema_editor)
