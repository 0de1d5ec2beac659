"""Read the documentation: pages, fenced blocks, tables, sections, links.

How examples are tested:

- A block fenced as ``python`` is run.  The blocks of a page run in order, in one namespace.
- A block whose first line is a comment with a path, ``# shop/tasks.py``, is run in that
  module instead, so later blocks can import from it.
- An expression followed by ``# -> text`` must have that ``repr``.
- ``python no-run`` is for what cannot run in a test; it must compile.
- In a ``console`` block every ``python manage.py COMMAND`` line of this app's commands must be
  accepted by that command's parser, and ``consume_tasks --burst`` is run.
"""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")]
)

# Followed in projects of their own: see ``test_tutorial``.
TUTORIALS = [DOCS / "tutorial.md", *sorted((DOCS / "tutorial").glob("*.md"))]

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_MODULE = re.compile(r"# ([a-z_]+(?:/[a-z_]+)+)\.py\b")
_EXPECTED = re.compile(r"#\s*->\s*(.+?)\s*$")
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block; ``line`` is that of its first line of text in ``page``."""

    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def module(self) -> str | None:
        """Dotted name of the module that this block is the source of, if it says so."""
        found = _MODULE.match(self.text)
        return found[1].replace("/", ".") if found else None

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of every ``python manage.py`` line, after ``manage.py``."""
        text = self.text.replace("\\\n", " ")
        return [
            _words(line.removeprefix("$ ").removeprefix("python manage.py "))
            for line in map(str.strip, text.splitlines())
            if line.removeprefix("$ ").startswith("python manage.py ")
        ]


def _words(command: str) -> list[str]:
    # A line may end inside of quotes, as in 'manage.py shell -c "'.
    return command.split() if command.count('"') % 2 else shlex.split(command, comments=True)


def name_of(page: Path) -> str:
    """Return a page's path below the project, for the names of tests."""
    return str(page.relative_to(ROOT))


def read(path: str) -> str:
    """Return the text of a page below ``docs``."""
    return (DOCS / path).read_text()


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        language, *marks = match["info"].split() or [""]
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start("text")) + 1,
                language=language,
                marks=tuple(marks),
                text=match["text"],
            )
        )
    return found


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Return the targets of a page's links."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors that the headings of a page make, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in headings}


def section(text: str, heading: str) -> str:
    """Return what stands below a heading, up to the next one of its level or above."""
    match = re.search(
        rf"^(#+) `?{re.escape(heading)}`?\s*$(.*?)(?=^\1 |^#{{1,2}} |\Z)",
        text,
        re.MULTILINE | re.DOTALL,
    )
    if match is None:
        raise AssertionError(f"There is no section {heading!r}.")
    return match[2]


def headings(text: str, level: int) -> list[str]:
    """Return the headings of one level, without backticks."""
    return [
        h.replace("`", "").strip() for h in re.findall(rf"^#{{{level}}} (.+)$", text, re.MULTILINE)
    ]


def table(text: str) -> dict[str, list[str]]:
    """Return the rows of every table in ``text`` by the code in their first cell.

    A first cell without code is no row of this kind; a cell with two has two names.
    """
    rows = {}
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for name in _CODE.findall(cells[0]):
            rows[name] = cells[1:]
    return rows


def checked(source: str) -> ast.Module:
    """Parse ``source`` and turn its ``# -> text`` comments into assertions."""
    tree = ast.parse(source)
    lines = source.splitlines()
    for index, node in enumerate(tree.body):
        if not isinstance(node, ast.Expr):
            continue
        match = _EXPECTED.search(lines[(node.end_lineno or 1) - 1][node.end_col_offset :])
        if match:
            call = ast.Call(
                func=ast.Name(id="_expect", ctx=ast.Load()),
                args=[node.value, ast.Constant(value=match[1])],
                keywords=[],
            )
            tree.body[index] = ast.copy_location(ast.Expr(value=call), node)
    return ast.fix_missing_locations(tree)
