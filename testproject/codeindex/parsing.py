"""Find the classes and functions in Python source text.

Nothing here knows the database: bytes go in, a frozen value comes out.  The
source is compiled to a syntax tree and never run.  What the parser of the
running interpreter refuses (Python 2, unknown encodings, broken syntax)
raises its ``SyntaxError``.
"""

import ast
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Definitions stand only in lists of statements, so expressions, which nest far deeper, are not
# looked into.
_HOLDS_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)

# catch_warnings changes the filters of the whole process: two threads inside it would restore
# each other's.  The parser holds the interpreter lock, so waiting here costs nothing.
_warnings_silenced = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A class or a function, and where it stands; lines count from 1."""

    name: str
    qualified_name: str
    line: int
    end_line: int
    is_class: bool
    is_async: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedFile:
    """What one source file holds."""

    module: str
    lines: int
    classes: tuple[Definition, ...]
    functions: tuple[Definition, ...]


def parse_file(path: Path) -> ParsedFile:
    """Read and parse the file at ``path``.

    Raises:
        OSError: If it cannot be read.
        SyntaxError: If this interpreter cannot parse it.
    """
    source = path.read_bytes()
    with _warnings_silenced, warnings.catch_warnings():
        # Invalid escapes and the like: about code that is not ours to mend.
        warnings.simplefilter("ignore")
        tree = ast.parse(source, filename=str(path))
    found = tuple(_definitions(tree))
    return ParsedFile(
        module=module_name(path),
        lines=len(source.splitlines()),
        classes=tuple(definition for definition in found if definition.is_class),
        functions=tuple(definition for definition in found if not definition.is_class),
    )


def module_name(path: Path) -> str:
    """Return the dotted name under which ``path`` is imported, judged by its packages."""
    parts = [] if path.name == "__init__.py" else [path.stem]
    directory = path.parent
    while (directory / "__init__.py").is_file():
        parts.append(directory.name)
        directory = directory.parent
    return ".".join(reversed(parts))


def _definitions(tree: ast.Module) -> Iterator[Definition]:
    """Yield what ``tree`` defines, with names as in ``__qualname__``.

    By a stack instead of recursion, so that no nesting is too deep for it.
    """
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:
        node, scope = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                definition = _definition(child, scope)
                yield definition
                inner = "." if definition.is_class else ".<locals>."
                waiting.append((child, definition.qualified_name + inner))
            elif isinstance(child, _HOLDS_STATEMENTS):
                waiting.append((child, scope))


def _definition(
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, scope: str
) -> Definition:
    return Definition(
        name=node.name,
        qualified_name=scope + node.name,
        line=node.lineno,
        end_line=node.end_lineno or node.lineno,
        is_class=isinstance(node, ast.ClassDef),
        is_async=isinstance(node, ast.AsyncFunctionDef),
    )
