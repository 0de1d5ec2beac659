"""Index many files at once: schedule them, have them consumed, say what came of it.

The consumer is a process of its own, started as anyone would start it.  It
shares nothing with this one but the database, and that is where progress and
results are read.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from asgiref.sync import async_to_sync
from django.conf import settings
from django.db import transaction
from django.db.models import Count, QuerySet

from firefly_jobs import TaskModel

from .library import library_directory
from .tasks import index_file, read_metadata

QUEUE = "index"
SECONDS_BETWEEN_LOOKS = 0.25
# No file takes a tenth of this to parse, so by then nothing will come any more.
STALLED_AFTER_SECONDS = 60.0
STOPPING_SECONDS = 10.0
CONSUMER_LINES_SHOWN = 20

# The parser names the file and line once more at the end of its message.
_LOCATION = re.compile(r" \([^()]*, line \d+\)$")


class ConsumerStoppedError(Exception):
    """The consumer ended with an error, or nothing moved for too long; says what it printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How many tasks of a run stand where."""

    scheduled: int
    completed: int
    failed: int
    cancelled: int

    @property
    def ended(self) -> int:
        """Tasks that nothing more will happen to."""
        return self.completed + self.failed + self.cancelled

    @property
    def is_finished(self) -> bool:
        """Whether every task has ended."""
        return self.ended == self.scheduled


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """The files that failed for one reason, relative to the library."""

    reason: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """The tasks of one run: those in a range of ids, since one transaction inserted them."""

    first_id: int
    last_id: int
    scheduled: int

    def tasks(self) -> QuerySet[TaskModel]:
        """Return the run's rows."""
        return TaskModel.objects.filter(
            pk__range=(self.first_id, self.last_id),
            func_name__in=[index_file.name, read_metadata.name],
        )

    def progress(self) -> Progress:
        """Read how far the run is."""
        counts = Counter(
            dict(self.tasks().order_by().values_list("status").annotate(count=Count("pk")))
        )
        return Progress(
            scheduled=counts.total(),
            completed=counts[TaskModel.Status.COMPLETED],
            failed=counts[TaskModel.Status.FAILED],
            cancelled=counts[TaskModel.Status.CANCELLED],
        )

    def retried(self) -> int:
        """Read how many tasks were tried more than once."""
        return self.tasks().filter(retry_attempts__gt=0).count()

    def failures(self) -> list[Failures]:
        """Read the failed tasks, grouped by reason, the most frequent first."""
        root = library_directory()
        files_by_reason: dict[str, list[str]] = defaultdict(list)
        for task in self.tasks().filter(status=TaskModel.Status.FAILED).order_by("pk"):
            path = Path(task.params["args"][0])
            reason = _LOCATION.sub("", task.error)
            files_by_reason[reason].append(str(path.relative_to(root)))
        return [
            Failures(reason=reason, files=tuple(files))
            for reason, files in sorted(files_by_reason.items(), key=lambda item: -len(item[1]))
        ]


def schedule_files(paths: Sequence[Path], *, metadata: bool = True) -> Rebuild:
    """Schedule one ``index_file`` per path, and one ``read_metadata`` if ``metadata``.

    All of them, or none: the rows belong to the transaction around them.
    """
    with transaction.atomic():
        ids = async_to_sync(_schedule_all)(paths, metadata=metadata)
    return Rebuild(first_id=min(ids), last_id=max(ids), scheduled=len(ids))


def consume(run: Rebuild, *, on_progress: Callable[[Progress], None]) -> None:
    """Run consumers until every task of ``run`` has ended.

    A burst ends when nothing is due, which may be a moment before a retry becomes due: then
    the next one is started.

    Raises:
        ConsumerStoppedError: If a consumer fails, or nothing has moved for a minute.
    """
    while not run.progress().is_finished:
        with tempfile.TemporaryFile() as printed:
            code = _consume_once(run, on_progress, printed)
            if code != 0:
                message = f"The consumer ended with exit code {code}.\n{_last_lines(printed)}"
                raise ConsumerStoppedError(message)
    on_progress(run.progress())


async def _schedule_all(paths: Sequence[Path], *, metadata: bool) -> list[int]:
    ids = []
    for path in paths:
        ids.append((await index_file.aschedule(str(path))).id)
        if metadata:
            ids.append((await read_metadata.schedule(str(path))).id)
    return ids


def _consume_once(run: Rebuild, on_progress: Callable[[Progress], None], printed: IO[bytes]) -> int:
    """Run one burst and return its exit code."""
    command = [
        *(sys.executable, str(settings.BASE_DIR / "manage.py")),
        *("consume_tasks", "--queue", QUEUE, "--burst"),
    ]
    # It finds the database by the environment, which it inherits.  In a session of its own it does
    # not hear Ctrl-C: it is asked to stop once, by us, and finishes what it has started.
    consumer = subprocess.Popen(  # noqa: S603 - our own command
        command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        seen, seen_at = None, time.monotonic()
        while True:
            try:
                return consumer.wait(timeout=SECONDS_BETWEEN_LOOKS)
            except subprocess.TimeoutExpired:
                progress = run.progress()
            on_progress(progress)
            if progress != seen:
                seen, seen_at = progress, time.monotonic()
            elif time.monotonic() - seen_at > STALLED_AFTER_SECONDS:
                message = (
                    f"No task has ended for {STALLED_AFTER_SECONDS:.0f} s.\n{_last_lines(printed)}"
                )
                raise ConsumerStoppedError(message)
    finally:
        _stop(consumer)


def _stop(consumer: subprocess.Popen[bytes]) -> None:
    if consumer.poll() is not None:
        return
    consumer.terminate()
    try:
        consumer.wait(timeout=STOPPING_SECONDS)
    except subprocess.TimeoutExpired:
        consumer.kill()
        consumer.wait()


def _last_lines(printed: IO[bytes]) -> str:
    printed.seek(0)
    lines = printed.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-CONSUMER_LINES_SHOWN:])
