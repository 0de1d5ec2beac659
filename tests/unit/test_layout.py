"""The four invariants of the design, as scans over the source, and its budgets.

Each scan is a function from a module's tree to what it found, and is itself tested: it
must find every violation that is planted below.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import firefly_jobs

PACKAGE = Path(firefly_jobs.__file__).parent
MODULES = {
    path.relative_to(PACKAGE).as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "migrations" not in path.parts
}
LINES_MAX = 500

Scan = Callable[[ast.AST], list[str]]


def outside(*homes: str) -> list[str]:
    """Return the modules that are not ``homes``; a home ending in ``/`` is a folder."""
    return [
        name
        for name in MODULES
        if not any(name.startswith(home) if home.endswith("/") else name == home for home in homes)
    ]


def found_by(scan: Scan, modules: list[str]) -> list[str]:
    return [
        f"{name}:{finding}"
        for name in modules
        for finding in scan(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    ]


# --- reading a tree


def _at(node: ast.AST) -> str:
    return f"{getattr(node, 'lineno', 0)}: {ast.unparse(node)[:100]}"


def _docstrings(tree: ast.AST) -> set[int]:
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }


def texts(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield the strings that the code uses, f-strings with their holes as ``{}``."""
    docstrings = _docstrings(tree)
    parts = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node,
                "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "{}"
                    for part in node.values
                ),
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings | parts
        ):
            yield node, node.value


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    """Yield the calls of functions or methods with one of these names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in names:
                yield node


# --- 1. status has two writers

WRITERS = (
    "TaskModel", "update", "aupdate", "create", "acreate", "get_or_create", "aget_or_create",
    "update_or_create", "aupdate_or_create",
)  # fmt: skip
_SQL_WRITES_STATUS = re.compile(r"(?is)\b(UPDATE\b.*\bSET\b|INSERT\s+INTO\b).*\bstatus\b")


def status_writes(tree: ast.AST) -> list[str]:
    """Find what writes a row's status, by the ORM, an attribute or SQL."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            key = node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", "")
            if key == "status":
                found.append(node)
    for call in calls(tree, *WRITERS):
        words = {keyword.arg for keyword in call.keywords}
        keys = {
            getattr(key, "value", None)
            for keyword in call.keywords
            for inner in ast.walk(keyword.value)
            if isinstance(inner, ast.Dict)
            for key in inner.keys
        }
        if "status" in words | keys:
            found.append(call)
    for call in calls(tree, "setattr", "bulk_update", "abulk_update", "save", "asave"):
        constants = {getattr(node, "value", None) for node in ast.walk(call)}
        if "status" in constants:
            found.append(call)
    found += [node for node, text in texts(tree) if _SQL_WRITES_STATUS.search(text)]
    return [_at(node) for node in found]


def statement_calls(tree: ast.AST) -> list[str]:
    """Find calls of the statements in ``databases`` that change a status."""
    return [
        _at(call)
        for call in calls(tree, "claim", "complete", "complete_many", "complete_step")
        if isinstance(call.func, ast.Attribute)
        and re.search(r"(^databases\.of\(.*\)|\b_?database)$", ast.unparse(call.func.value))
    ]


@pytest.mark.parametrize(
    "code",
    [
        "row.status = 'created'",
        "row.status: str = 'created'",
        "rows.update(status='created')",
        "rows.filter(pk=1).update(error='', status=Status.FAILED)",
        "await rows.aupdate(status='x')",
        "TaskModel(status='running')",
        "models.TaskModel.objects.create(status='running')",
        "rows.update_or_create(pk=1, defaults={'status': 'running'})",
        "rows.update(**{'status': 'x'})",
        "values['status'] = 'x'",
        "setattr(row, 'status', 'x')",
        "rows.bulk_update(found, ['error', 'status'])",
        "row.save(update_fields=['status'])",
        "cursor.execute('UPDATE tasks SET error = 1, status = 2')",
        "sql = f'update {TABLE} set\\nstatus = 2'",
        "sql = f'INSERT INTO {TABLE} (id, status) VALUES (1, 2)'",
    ],
)
def test_scan_for_writers_of_status_finds_a_planted_one(code):
    assert len(status_writes(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "rows.filter(status='created')",
        "rows.filter(status='created').update(error='')",
        "Settlement(status=Status.FAILED)",
        "print(row.status)",
        "d = {'status': row.status}",
        "sql = 'SELECT id FROM tasks WHERE status = 1'",
        "'''UPDATE a SET status = 1'''",
    ],
)
def test_scan_for_writers_of_status_leaves_readers_alone(code):
    assert status_writes(ast.parse(code)) == []


STATUS_WRITERS = (
    *("enqueue.py", "lifecycle.py", "admission.py", "lines.py", "dependencies.py"),
    "rebuilding.py",
    "databases/",
)


def test_status_is_written_only_by_enqueue_lifecycle_limits_and_their_statements():
    assert found_by(status_writes, outside(*STATUS_WRITERS)) == []


def test_scan_for_writers_of_status_finds_the_one_that_is_allowed():
    assert found_by(status_writes, ["lifecycle.py"]) != []


@pytest.mark.parametrize(
    "code",
    [
        "databases.of(using).claim(connection)",
        "self._database.complete_many(connection, [])",
        "database.complete(connection, one)",
    ],
)
def test_scan_for_callers_of_statements_finds_a_planted_one(code):
    assert len(statement_calls(ast.parse(code))) == 1
    assert statement_calls(ast.parse("lifecycle.claim(); self._claimer.claim(5)")) == []


def test_statements_that_change_a_status_are_called_by_lifecycle_only():
    assert found_by(statement_calls, outside("lifecycle.py", "databases/")) == []
    assert len(found_by(statement_calls, ["lifecycle.py"])) == 6


# --- 2. a running row changes only under its fence


CHANGERS = ("update", "aupdate", "delete", "adelete", "bulk_update", "save", "asave")


def unfenced_updates(tree: ast.AST) -> list[str]:
    """Find ORM writes that could change a running row without holding its fence.

    A write is fine if it starts at ``held(...)``, is about another model, inserts, or
    names states of which ``running`` is none.  Local names are replaced by what was
    assigned to them, so that ``ended = [...]`` counts as if it stood in the filter.
    """
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        values = {
            target.id: node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        found += [
            _at(call)
            for call in calls(function, *CHANGERS)
            if isinstance(call.func, ast.Attribute) and not _is_harmless(call, values)
        ]
    return found


def _is_harmless(call: ast.Call, values: dict[str, ast.expr]) -> bool:
    assert isinstance(call.func, ast.Attribute)
    receiver = _resolved(call.func.value, values)
    if any(k.arg == "force_insert" for k in call.keywords) or receiver.startswith("held("):
        return True
    if call.func.attr == "update" and call.args:
        return True  # a dictionary's or a hash's; the ORM's takes keywords only
    if "TaskModel" not in receiver:
        return bool(
            re.match(
                r"(ConsumerModel|TaskAttempt|TaskEvent|ConcurrencySlot|RateBucket|ScheduleModel|Workflow\w+)\b|locked\(|_row\(declaration|super\(\)|(\w*values|kwargs|lifecycle|\{.*\})$",
                receiver,
            )
        )
    return "status" in receiver and not re.search("running", receiver, re.IGNORECASE)


def _resolved(node: ast.expr, values: dict[str, ast.expr], depth: int = 5) -> str:
    text = ast.unparse(node)
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & values.keys()
    for name in names if depth else ():
        inner = _resolved(values[name], values, depth - 1)
        text = re.sub(rf"(?<![\w.]){name}\b(?!\s*=[^=])", inner.replace("\\", r"\\"), text)
    return text


_UPDATE = re.compile(r"\bUPDATE\b.*\bSET\b", re.IGNORECASE)


def unfenced_statements(tree: ast.AST) -> list[str]:
    """Find SQL that updates rows neither under a fence nor by claiming them."""
    found = []
    scopes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inside = {id(inner) for scope in scopes for inner in ast.walk(scope)}
    rest = [n for n in ast.iter_child_nodes(tree) if id(n) not in inside]
    for scope in [*scopes, *rest]:
        if isinstance(scope, ast.ClassDef):
            continue
        statements = [(node, " ".join(text.split())) for node, text in texts(scope)]
        claims = any("status = 'created'" in text for _, text in statements)
        for node, text in statements:
            if not _UPDATE.search(text):
                continue
            is_held = re.search(r"WHERE .*status( \|\| '')? = 'running' AND (t\.)?fence = ", text)
            is_claim = claims and re.search(r"status = 'running', fence = (t\.)?fence \+ 1", text)
            takes_the_lock_only = text.endswith("SET id = id WHERE id = -1")
            is_of_a_gate = "SET waiting_for = waiting_for - " in text
            if not (is_held or is_claim or takes_the_lock_only or is_of_a_gate):
                found.append(_at(node))
    return found


@pytest.mark.parametrize(
    "code",
    [
        "def f(): TaskModel.objects.filter(pk=1).update(error='')",
        "def f(): TaskModel.objects.filter(pk=1, fence=2).update(error='')",
        "def f(): TaskModel.objects.filter(status=Status.RUNNING).update(error='')",
        "def f():\n rows = TaskModel.objects.all()\n rows.update(error='')",
        "def f():\n ids = [1]\n TaskModel.objects.filter(pk__in=ids).delete()",
        "def f():\n s = [Status.RUNNING]\n TaskModel.objects.filter(status__in=s).delete()",
        "def f(row): row.save()",
        "async def f(row): await row.asave(update_fields=['error'])",
        "def f(rows): rows.delete()",
        "def f(task): task.delete()",
        "def f(): TaskModel.objects.bulk_update(rows, ['error'])",
    ],
)
def test_scan_for_unfenced_writes_finds_a_planted_one(code):
    assert len(unfenced_updates(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "def f(): held(using, 1, 2).update(error='')",
        "def f(row): row.save(using='x', force_insert=True)",
        "def f(): TaskModel.objects.filter(status='created').update(error='')",
        "def f():\n late = ConsumerModel.objects.all()\n late.update(suspected_at=None)",
    ],
)
def test_scan_for_unfenced_writes_leaves_harmless_ones_alone(code):
    assert unfenced_updates(ast.parse(code)) == []


def test_a_running_row_changes_only_for_the_holder_of_its_fence():
    assert found_by(unfenced_updates, list(MODULES)) == []


@pytest.mark.parametrize(
    "code",
    [
        """def f(): sql = f"UPDATE {T} SET error = '' WHERE id = %s" """,
        """def f(): sql = f"UPDATE {T} SET error = '' WHERE id = %s AND status = 'running'" """,
        """def f(): sql = f"UPDATE {T} SET status = 'running', fence = fence + 1 WHERE id = 1" """,
        """SQL = f"UPDATE {T} SET error = ''" """,
        """class A:\n def f(self): sql = f"UPDATE {T} SET error = ''" """,
    ],
)
def test_scan_for_unfenced_statements_finds_a_planted_one(code):
    assert len(unfenced_statements(ast.parse(code))) == 1


def test_every_statement_that_updates_rows_claims_them_or_names_their_fence():
    homes = [name for name in MODULES if name.startswith("databases/")]

    assert found_by(unfenced_statements, homes) == []
    assert any("UPDATE" in MODULES[name].read_text(encoding="utf-8") for name in homes)


# --- 3. the database's clock judges leases

JUDGES = [
    "heartbeat.py", "lifecycle.py", "claiming.py", "consumer.py", "holdings.py", "settling.py",
    "enqueue.py", "models.py", "admission.py", "lines.py", "fencing.py", "limits.py",
]  # fmt: skip
_CLOCKS = re.compile(
    r"^(time\.time(_ns)?|(dt\.|datetime\.)*(datetime|date)\.(now|utcnow|today)|timezone\.now"
    r"|timezone\.localtime|localtime|Now)$"
)


def process_clocks(tree: ast.AST) -> list[str]:
    """Find readings of this process's wall clock, or of the database's in another zone."""
    found: list[ast.AST] = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and _CLOCKS.match(ast.unparse(node))
    ]
    found += [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module, *sorted(a.name for a in node.names if a.name in {"time", "now"}))
        in {("time", "time"), ("django.utils.timezone", "now")}
    ]
    return [_at(node) for node in found]


@pytest.mark.parametrize(
    "code",
    [
        "time.time()",
        "from time import time",
        "datetime.now(UTC)",
        "datetime.datetime.now()",
        "datetime.utcnow()",
        "date.today()",
        "timezone.now()",
        "from django.utils.timezone import now",
        "rows.filter(renewed_at__lt=Now())",
        "default = timezone.now",
    ],
)
def test_scan_for_process_clocks_finds_a_planted_one(code):
    assert len(process_clocks(ast.parse(code))) == 1


def test_what_is_due_stale_or_late_is_judged_by_the_clock_of_the_database():
    assert process_clocks(ast.parse("monotonic(); DatabaseNow(); SecondsFromNow(5)")) == []
    homes = [name for name in MODULES if name.startswith("databases/")]

    assert found_by(process_clocks, [name for name in JUDGES if name in MODULES]) == []
    # Its own subclass is where Now() may stand.
    assert [
        f for f in found_by(process_clocks, homes) if not f.startswith("databases/functions")
    ] == []


# --- 4. vendors differ only inside databases/

_VENDORS = re.compile(
    r"\b(postgres(ql)?|psycopg2?|mysql|mariadb|sqlite3?|oracle|MySQLdb|pymysql)\b", re.IGNORECASE
)


def vendor_knowledge(tree: ast.AST) -> list[str]:
    """Find questions after the vendor, its drivers, its name, or SQL that is no ORM's."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if getattr(node, "attr", None) in {"vendor", "mysql_is_mariadb"} or re.match(
            r"as_(mysql|sqlite|postgresql)$", getattr(node, "name", None) or ""
        ):
            found.append(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if any(_VENDORS.search(name) for name in names):
                found.append(node)
    found += calls(tree, "cursor", "raw", "RawSQL", "extra")
    found += [node for node, text in texts(tree) if _VENDORS.search(text)]
    return [_at(node) for node in found]


@pytest.mark.parametrize(
    "code",
    [
        "if connection.vendor == x: pass",
        "import sqlite3",
        "from psycopg import errors",
        "from .databases import postgresql",
        "name = 'sqlite'",
        "message = f'{x} runs on PostgreSQL only'",
        "def as_mysql(self): pass",
        "connection.cursor()",
        "TaskModel.objects.raw(sql)",
        "connection.mysql_is_mariadb",
    ],
)
def test_scan_for_vendor_knowledge_finds_a_planted_one(code):
    assert len(vendor_knowledge(ast.parse(code))) == 1


def test_vendors_are_known_only_inside_databases():
    assert vendor_knowledge(ast.parse('"""Works on PostgreSQL."""\ndatabase.can_skip_locked')) == []

    assert found_by(vendor_knowledge, outside("databases/", "checks.py")) == []


# --- budgets, and what an import costs


def test_no_module_is_longer_than_its_budget():
    lengths = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()
    }

    assert {name: length for name, length in lengths.items() if length > LINES_MAX} == {}


def test_every_module_but_empty_ones_says_what_it_is_for():
    silent = [
        name
        for name, path in MODULES.items()
        if (text := path.read_text(encoding="utf-8")) and not ast.get_docstring(ast.parse(text))
    ]

    assert silent == []


def run_python(code: str) -> str:
    """Run ``code`` in a process that knows no settings, and return what it printed."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_importing_the_package_imports_no_model_and_needs_no_settings():
    code = (
        "import sys, firefly_jobs; print([name for name in sys.modules"
        " if name.startswith(('firefly_jobs.', 'django'))])"
    )

    assert run_python(code) == "[]"


@pytest.mark.parametrize(
    "name", ["Fixed", "Retry", "Snooze", "Cancel", "current_task", "Exponential", "LeaseLost"]
)
def test_values_can_be_imported_before_any_model(name):
    code = (
        f"import sys; from firefly_jobs import {name}; print('firefly_jobs.models' in sys.modules)"
    )

    assert run_python(code) == "False"


@pytest.mark.parametrize("name", firefly_jobs.__all__)
def test_every_public_name_can_be_imported_from_the_package(name):
    found = getattr(firefly_jobs, name)
    assert found is not None
    # Else it would depend on what was imported before.
    assert not (PACKAGE / f"{name}.py").exists()


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'firefly_jobs' has no attribute 'nothing'"):
        firefly_jobs.nothing  # noqa: B018 - the access is the act
