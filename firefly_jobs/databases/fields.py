"""Columns that mean the same on every database."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from django.db import models

if TYPE_CHECKING:
    _TextField = models.CharField[str | None, Any]
    _JSONField = models.JSONField[Any, Any]
    _Lookup = models.Lookup[Any]
else:
    _TextField, _JSONField, _Lookup = models.CharField, models.JSONField, models.Lookup


class ExactCharField(_TextField):
    """Text that is equal only to itself.

    MySQL and MariaDB compare text without regard to case or accents unless told otherwise,
    and two keys or names that differ in case would be one there and two elsewhere.
    """

    def db_parameters(self, connection: Any) -> Any:
        """Return the column's type and collation."""
        found = super().db_parameters(connection)
        if connection.vendor == "mysql":
            # Present on both, in every version.  It ignores trailing spaces, as all of
            # the old collations do; so keys and names must not have any, see options.
            found["collation"] = "utf8mb4_bin"
        return found


class _QuietJSONField(_JSONField):
    def _check_supported(self, databases: Any) -> list[Any]:  # noqa: ARG002 - Django calls it
        # Django's own check connects, and on SQLite that makes an empty file.  Every version
        # that consumers can claim from has JSON; see is_present and problems in databases.base.
        return []


class PlainJSONField(_QuietJSONField):
    """Django's field, but that checking it connects to no database."""

    def deconstruct(self) -> Any:
        """Be Django's field in migrations, since the column is the same."""
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.JSONField", args, kwargs


class SparseJSONField(_QuietJSONField):
    """JSON that is mostly empty: stored as NULL then, and read as what ``default`` returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "null": True, "blank": True})

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        """Return the empty value for NULL; but not for a key that an object lacks."""
        if value is None and getattr(expression, "target", None) is self:
            return self.get_default()
        return super().from_db_value(value, expression, connection)

    def get_db_prep_save(self, value: Any, connection: Any) -> Any:
        """Store NULL for what is empty."""
        return super().get_db_prep_save(value or None, connection)


class TagsField(SparseJSONField):
    """A few words as a JSON list; ``tags__contains="a"`` and ``=["a", "b"]`` filter by them.

    One column, since a table of its own would cost every tagged INSERT, and every batch
    that is pruned, a second statement.  A list and no text with separators, since LIKE
    disregards case on SQLite and MariaDB, and a tag may contain whatever separates them.
    """


@TagsField.register_lookup
class ContainsTags(_Lookup):
    """Whether a row has all of some tags; Django has no such lookup for SQLite."""

    lookup_name = "contains"
    prepare_rhs = False

    def get_prep_lookup(self) -> list[str]:
        """Take one tag or several."""
        return [self.rhs] if isinstance(self.rhs, str) else list(self.rhs)

    def as_postgresql(self, compiler: Any, connection: Any) -> Any:
        """Render with the operator that an index of type GIN answers."""
        return self._with(compiler, connection, "%s @> %s::jsonb")

    def as_mysql(self, compiler: Any, connection: Any) -> Any:
        """Render with the function of MySQL and MariaDB."""
        return self._with(compiler, connection, "JSON_CONTAINS(%s, %s)")

    def _with(self, compiler: Any, connection: Any, template: str) -> Any:
        left, params = self.process_lhs(compiler, connection)
        return template % (left, "%s"), [*params, json.dumps(self.rhs)]

    def as_sqlite(self, compiler: Any, connection: Any) -> Any:
        """Render as one subquery per tag."""
        left, params = self.process_lhs(compiler, connection)
        one = f"EXISTS (SELECT 1 FROM JSON_EACH({left}) WHERE value = %s)"  # noqa: S608 - a column's name
        values = [value for tag in self.rhs for value in (*params, tag)]
        return f"({' AND '.join([one] * len(self.rhs)) or '1 = 1'})", values
