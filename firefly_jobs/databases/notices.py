"""What sessions tell each other, where a database can do that; see ``wakeup.py``."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

# Announced in place of a queue's name, which is never empty, or of ids.
ANY_QUEUE = ""
ANY_TASK = ""
# Announced in place of an id, to ask whether anybody waits.
ROLL_CALL = "?"


class Channel(StrEnum):
    """What sessions tell each other about."""

    # Rows of a queue may be due; the text is its name.
    DUE = "firefly_jobs"
    # Rows have ended; the text is their ids, separated by commas.
    ENDED = "firefly_jobs_ended"
    # Somebody waits for the end of rows; the text is empty.
    WAITING = "firefly_jobs_waiting"


class Notice(NamedTuple):
    """One announcement."""

    channel: Channel
    text: str


class Subscription:
    """A session that hears what other sessions announce; see ``listening.py``."""

    def fileno(self) -> int:
        """Return a descriptor that gets readable when something arrives, or breaks."""
        raise NotImplementedError

    def receive(self) -> set[Notice]:
        """Return what was announced since the last call, without waiting.

        Raises:
            Error: If the session is gone.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Ask the server for an answer, so that a connection that died in silence is noticed.

        Raises:
            Error: If there is none.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Stop hearing; the connection may be used by others afterwards."""
