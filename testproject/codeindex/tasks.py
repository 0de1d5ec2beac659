"""The work in the background: index one file, read one file's metadata."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from django.utils import timezone

from firefly_jobs import atask, task

from .models import Class, FileMetadata, Function, SourceFile
from .parsing import parse_file


# A file that cannot be parsed today cannot be parsed in a second either: the retry is here so
# that the demo shows one.
@task(queue="index", max_retries=1, retry_delay=1)
def index_file(path: str) -> dict[str, int]:
    """Parse one file, replace what the index holds for it, and return the counts.

    The call is one transaction, so a reader sees the old entry or the new one and a file that
    cannot be parsed keeps the entry it had.
    """
    parsed = parse_file(Path(path))
    source_file, created = SourceFile.objects.update_or_create(
        path=path,
        defaults={
            "module": parsed.module,
            "lines": parsed.lines,
            "class_count": len(parsed.classes),
            "function_count": len(parsed.functions),
            "parsed_at": timezone.now(),
        },
    )
    if not created:
        source_file.classes.all().delete()
        source_file.functions.all().delete()
    Class.objects.bulk_create(
        Class(
            source_file=source_file,
            name=found.name,
            qualified_name=found.qualified_name,
            line=found.line,
            end_line=found.end_line,
        )
        for found in parsed.classes
    )
    Function.objects.bulk_create(
        Function(
            source_file=source_file,
            name=found.name,
            qualified_name=found.qualified_name,
            line=found.line,
            end_line=found.end_line,
            is_async=found.is_async,
        )
        for found in parsed.functions
    )
    return {
        "lines": parsed.lines,
        "classes": len(parsed.classes),
        "functions": len(parsed.functions),
    }


@atask(queue="index")
async def read_metadata(path: str) -> int:
    """Store one file's size and time of change, and return the size in bytes."""
    # Asking a file system can take long, and the loop serves many tasks.
    status = await asyncio.to_thread(Path(path).stat)
    await FileMetadata.objects.aupdate_or_create(
        path=path,
        defaults={
            "size_bytes": status.st_size,
            "modified_at": datetime.fromtimestamp(status.st_mtime, tz=UTC),
        },
    )
    return status.st_size
