"""Say which files there are to index: the running interpreter's standard library.

Everything a visitor may ask for passes :func:`resolve_source_file`, so that a
form field can never make a task read a file from elsewhere.
"""

import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

# Installed packages live below the library on most systems, but are not part of it.
_INSTALLED_PACKAGES = frozenset({"site-packages", "dist-packages"})


class OutsideLibraryError(ValueError):
    """A path that names no source file of the standard library; the message is for people."""


def library_directory() -> Path:
    """Return the directory of the running interpreter's standard library, links resolved."""
    return Path(sysconfig.get_path("stdlib")).resolve()


def source_files(pattern: str = "*") -> Iterator[Path]:
    """Yield the ``.py`` files of the standard library, in a stable order.

    Args:
        pattern: What the path below the library must match; ``*`` matches slashes as well.
    """
    root = library_directory()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        is_part = not _INSTALLED_PACKAGES.intersection(relative.parts) and path.is_file()
        if is_part and fnmatchcase(relative.as_posix(), pattern):
            yield path


def resolve_source_file(text: str) -> Path:
    """Return the standard library's source file that ``text`` names.

    Args:
        text: An absolute path, or one relative to the library, such as ``asyncio/tasks.py``.

    Raises:
        OutsideLibraryError: If it lies elsewhere (also by ``..`` or a link), is an installed
            package's, is no Python file or does not exist.  That is the visitor's mistake.
    """
    root = library_directory()
    try:
        path = (root / text).resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # Too long a name, a circle of links, a NUL: no operating system has such a file.
        message = "That is not a usable path."
        raise OutsideLibraryError(message) from error
    if not path.is_relative_to(root) or _INSTALLED_PACKAGES.intersection(
        path.relative_to(root).parts
    ):
        message = f"Only files of the standard library can be indexed: those below {root}."
        raise OutsideLibraryError(message)
    if path.suffix != ".py":
        message = "Only Python source can be indexed: the name must end in .py."
        raise OutsideLibraryError(message)
    if not is_file:
        message = f"There is no file {path.relative_to(root)} in the standard library."
        raise OutsideLibraryError(message)
    return path
