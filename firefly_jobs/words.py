"""What an attempt may change about its row while it runs: the words for people.

Nothing is read or written before somebody asks: the row is read at first use, and what
has changed by the end of the attempt is written by the statement that settles it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from .options import LABEL_LENGTH_MAX, check_text, plain_metadata


@dataclass(slots=True, eq=False)
class Words:
    """What the row said, and what it is to say."""

    label_before: str | None = None
    label: str | None = None
    metadata_before: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    is_read: bool = False


class HasWords:
    """The part of a ``TaskContext`` that can be changed."""

    __slots__ = ()

    if TYPE_CHECKING:
        _words: Words | None

        # What the other part says.
        @property
        def id(self) -> int: ...  # noqa: D102

        database: str

    @property
    def label(self) -> str:
        """The row's name for people; what is set is written when the attempt is settled.

        Read with one query at first use; in a coroutine ``await run.aload()`` before.

        Raises:
            TypeError, ValueError: If what is set is no text that the row can hold.
        """
        words = self._own_words()
        if words.label is None:
            self.load()
        return words.label or ""

    @label.setter
    def label(self, text: str) -> None:
        check_text("label", text, LABEL_LENGTH_MAX)
        self._own_words().label = text

    @property
    def metadata(self) -> dict[str, Any]:
        """The row's dictionary; change it or set another one, as :attr:`label`."""
        words = self._own_words()
        if words.metadata is None:
            self.load()
        return cast("dict[str, Any]", words.metadata)  # loaded by now

    @metadata.setter
    def metadata(self, values: dict[str, Any]) -> None:
        self._own_words().metadata = plain_metadata(values)

    def load(self) -> None:
        """Read :attr:`label` and :attr:`metadata` from the row; what was set stays."""
        from .models import TaskModel  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        words = self._own_words()
        if words.is_read:
            return
        rows = TaskModel.objects.using(self.database).filter(pk=self.id)
        words.label_before, words.metadata_before = rows.values_list("label", "metadata").get()
        words.is_read = True
        if words.label is None:
            words.label = words.label_before
        if words.metadata is None:
            words.metadata = deepcopy(words.metadata_before)

    async def aload(self) -> None:
        """Do the same as :meth:`load`, from a coroutine."""
        from asgiref.sync import sync_to_async  # noqa: PLC0415 - as above

        await sync_to_async(self.load, thread_sensitive=True)()

    def _own_words(self) -> Words:
        if self._words is None:
            self._words = Words()  # type: ignore[misc]  # a slot of the other part
        return self._words

    def changes(self) -> dict[str, Any]:
        """Return the columns that this attempt has changed.

        Raises:
            TypeError, ValueError: If ``metadata`` was given what JSON cannot hold.
        """
        words = self._words
        if words is None:
            return {}
        found: dict[str, Any] = {}
        if words.label is not None and words.label != words.label_before:
            found["label"] = words.label
        if words.metadata is not None:
            metadata: Any = plain_metadata(words.metadata)
            if metadata != words.metadata_before:
                found["metadata"] = metadata
        return found
