"""The code index as its visitors and its tasks see it: pages, rows, a consumer beside them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from django.db import connection, transaction
from django.db.models.signals import post_save
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from firefly_jobs import TaskModel
from testproject.codeindex.library import (
    OutsideLibraryError,
    library_directory,
    resolve_source_file,
    source_files,
)
from testproject.codeindex.models import Class, FileMetadata, Function, IndexRequest, SourceFile
from testproject.codeindex.parsing import module_name, parse_file
from testproject.codeindex.tasks import index_file, read_metadata
from tests.conftest import StartConsumer
from tests.support.waiting import eventually

SOURCE = '''
class Shop:
    """A class."""

    class Till:
        async def open(self):
            def count():
                return 0
            return count()

    if True:
        def sell(self): return 1

try:
    import fast
except ImportError:
    def slow():
        pass
'''


@pytest.fixture
def write_source(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes source text to one file and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "shop.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def add_functions(*names: str, path: str = "/lib/shop.py") -> SourceFile:
    source_file = SourceFile.objects.create(
        path=path,
        module="shop",
        lines=1_234,
        class_count=0,
        function_count=len(names),
        parsed_at=timezone.now(),
    )
    Function.objects.bulk_create(
        Function(
            source_file=source_file,
            name=name,
            qualified_name=name,
            line=1,
            end_line=2,
            is_async=False,
        )
        for name in names
    )
    return source_file


# --- parsing


def test_definitions_carry_their_qualified_names_and_lines(
    write_source: Callable[[str], Path],
) -> None:
    parsed = parse_file(write_source(SOURCE))

    assert {(c.qualified_name, c.line, c.end_line) for c in parsed.classes} == {
        ("Shop", 2, 12),
        ("Shop.Till", 5, 9),
    }
    assert {(f.qualified_name, f.line, f.end_line, f.is_async) for f in parsed.functions} == {
        ("Shop.Till.open", 6, 9, True),
        ("Shop.Till.open.<locals>.count", 7, 8, False),
        ("Shop.sell", 12, 12, False),
        ("slow", 17, 18, False),
    }
    assert parsed.lines == 18


def test_warnings_about_parsed_source_reach_nobody(write_source: Callable[[str], Path]) -> None:
    # Every warning is an error in these tests.
    parsed = parse_file(write_source("def f():\n    return '\\d' is 1\n"))

    assert [f.name for f in parsed.functions] == ["f"]


def test_module_is_named_as_it_is_imported() -> None:
    root = library_directory()

    assert module_name(root / "asyncio" / "tasks.py") == "asyncio.tasks"
    assert module_name(root / "asyncio" / "__init__.py") == "asyncio"
    assert module_name(root / "ast.py") == "ast"


def test_library_has_no_installed_packages() -> None:
    parts = {part for path in source_files() for part in path.parts}

    assert "asyncio" in parts
    assert not {"site-packages", "dist-packages"} & parts


@pytest.mark.parametrize(
    "text", ["ast.py", "asyncio/../ast.py", str(library_directory() / "ast.py")]
)
def test_path_inside_the_library_is_resolved(text: str) -> None:
    assert resolve_source_file(text) == library_directory() / "ast.py"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("/etc/passwd", "standard library"),
        ("../../../../../../../../etc/passwd", "standard library"),
        (str(Path(__file__)), "standard library"),
        ("site-packages/pip/__init__.py", "standard library"),
        ("asyncio", "end in .py"),
        ("no_such_module.py", "no file"),
        ("a" * 400 + ".py", "not a usable path"),
        ("ast\0.py", "not a usable path"),
    ],
)
def test_other_path_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(OutsideLibraryError, match=reason):
        resolve_source_file(text)


# --- tasks


@pytest.mark.django_db
def test_indexing_again_replaces_what_was_there(write_source: Callable[[str], Path]) -> None:
    path = write_source(SOURCE)
    index_file(str(path))
    other = add_functions("untouched")

    write_source("class Stall:\n    def sell(self): pass\n")
    returned = index_file(str(path))

    assert returned == {"lines": 2, "classes": 1, "functions": 1}
    stored = SourceFile.objects.get(path=str(path))
    assert (stored.module, stored.lines, stored.class_count, stored.function_count) == (
        *("shop", 2),
        *(1, 1),
    )
    assert [c.qualified_name for c in Class.objects.all()] == ["Stall"]
    assert [f.qualified_name for f in stored.functions.all()] == ["Stall.sell"]
    assert other.functions.count() == 1


@pytest.mark.django_db
def test_definitions_of_a_file_are_inserted_with_one_query_per_kind(
    write_source: Callable[[str], Path],
) -> None:
    path = write_source(SOURCE)

    with CaptureQueriesContext(
        connection,
    ) as queries:
        index_file(str(path))

    statements = [query["sql"] for query in queries]
    for table in ("codeindex_class", "codeindex_function"):
        inserts = [sql for sql in statements if sql.startswith("INSERT") and table in sql]
        assert len(inserts) == 1, statements


@pytest.mark.django_db
def test_file_that_cannot_be_parsed_keeps_its_entry(write_source: Callable[[str], Path]) -> None:
    path = write_source(SOURCE)
    index_file(str(path))

    write_source("print 'Python 2'\n")
    with pytest.raises(SyntaxError):
        index_file(str(path))

    assert SourceFile.objects.get(path=str(path)).function_count == 4


@pytest.mark.django_db(transaction=True)
def test_consumer_indexes_a_file_and_reads_its_metadata(
    start_consumer: StartConsumer, write_source: Callable[[str], Path]
) -> None:
    path = write_source(SOURCE)
    indexed = index_file.schedule(str(path))
    read = TaskModel.objects.get(pk=_schedule_metadata(path))

    assert start_consumer("--queue", "index", "--burst").wait() == 0

    indexed.refresh_from_db()
    read.refresh_from_db()
    assert (indexed.status, indexed.returned) == (
        "completed",
        {"lines": 18, "classes": 2, "functions": 4},
    )
    assert (read.status, read.returned) == ("completed", path.stat().st_size)
    assert SourceFile.objects.get().path == str(path)
    metadata = FileMetadata.objects.get(path=str(path))
    assert metadata.size_bytes == path.stat().st_size
    assert metadata.modified_at.timestamp() == pytest.approx(path.stat().st_mtime, abs=0.001)


@pytest.mark.django_db(transaction=True)
def test_file_that_cannot_be_parsed_is_retried_once_and_fails(
    start_consumer: StartConsumer, write_source: Callable[[str], Path]
) -> None:
    task = index_file.schedule(str(write_source("print 'Python 2'\n")))
    consumer = start_consumer("--queue", "index")

    def has_failed() -> TaskModel:
        row = TaskModel.objects.get(pk=task.pk)
        assert row.status == "failed", (row.status, consumer.output)
        return row

    row = eventually(has_failed, timeout_seconds=20)

    assert row.retry_attempts == 1
    assert row.error.startswith("SyntaxError: ")
    assert not SourceFile.objects.exists()
    consumer.terminate()
    assert consumer.wait() == 0


# --- pages


@pytest.mark.django_db
def test_page_of_an_empty_index_says_what_to_do(client: Client) -> None:
    page = client.get("/").content.decode()

    assert "Nothing is indexed yet" in page


@pytest.mark.django_db
def test_page_shows_counts_and_newest_files(client: Client) -> None:
    add_functions("sell", "buy", path="/lib/old.py")
    newest = add_functions("count", path="/lib/new.py")
    FileMetadata.objects.create(path=newest.path, size_bytes=2_048, modified_at=timezone.now())

    response = client.get("/")

    assert response.context["totals"] == {
        "files": "2",
        "classes": "0",
        "functions": "3",
        "lines": "2,468",
    }
    assert [row["file"].path for row in response.context["newest_files"]] == [
        "/lib/new.py",
        "/lib/old.py",
    ]
    assert "2.0\N{NO-BREAK SPACE}KB" in response.content.decode()


@pytest.mark.django_db
def test_search_finds_functions_by_part_of_the_name_page_by_page(client: Client) -> None:
    add_functions("elsewhere", *(f"sell_{number:02}" for number in range(30)))

    first = client.get("/", {"q": "SELL"})
    second = client.get("/", {"q": "SELL", "page": "2"})

    assert [f.name for f in first.context["found"]] == [f"sell_{n:02}" for n in range(25)]
    assert [f.name for f in second.context["found"]] == [f"sell_{n:02}" for n in range(25, 30)]
    assert "?q=SELL&amp;page=2" in first.content.decode()
    assert "1 to 25 of 30" in first.content.decode()


@pytest.mark.django_db
def test_search_text_is_shown_as_text(client: Client) -> None:
    page = client.get("/", {"q": "<script>alert(1)</script>"}).content.decode()

    assert "&lt;script&gt;alert(1)" in page
    assert "<script>" not in page


@pytest.mark.django_db
@pytest.mark.parametrize(
    "query", ["q=a%00b", "q=" + "x" * 500, "q=x&page=-3", "scheduled=nonsense"]
)
def test_senseless_address_shows_the_page_all_the_same(client: Client, query: str) -> None:
    assert client.get(f"/?{query}").status_code == 200


@pytest.mark.django_db
def test_form_schedules_a_file_and_the_page_tells_which_task(client: Client) -> None:
    response = client.post("/schedule", {"path": "ast.py"}, follow=True)

    task = TaskModel.objects.get()
    assert task.func_name == index_file.name
    assert task.queue == "index"
    assert task.params == {"args": (str(library_directory() / "ast.py"),), "kwargs": {}}
    assert IndexRequest.objects.get().task_id == task.pk
    assert response.redirect_chain == [(f"/?scheduled={task.pk}", 302)]
    assert f'href="/task/{task.pk}"' in response.content.decode()


@pytest.mark.django_db
def test_form_refuses_a_path_outside_the_library(client: Client) -> None:
    response = client.post("/schedule", {"path": "/etc/passwd"})

    page = response.content.decode()
    assert response.status_code == 400
    assert "Only files of the standard library can be indexed" in page
    assert 'aria-invalid="true"' in page
    assert 'value="/etc/passwd"' in page
    assert not TaskModel.objects.exists()


@pytest.mark.django_db
def test_form_without_its_token_is_refused() -> None:
    response = Client(enforce_csrf_checks=True).post("/schedule", {"path": "ast.py"})

    assert response.status_code == 403
    assert not TaskModel.objects.exists()


@pytest.mark.django_db
def test_form_cannot_be_sent_by_get(client: Client) -> None:
    assert client.get("/schedule", {"path": "ast.py"}).status_code == 405


@pytest.mark.django_db(transaction=True)
def test_task_scheduled_by_a_view_that_fails_is_rolled_back(client: Client) -> None:
    scheduled: list[int] = []

    def fail(instance: IndexRequest, **_: object) -> None:
        assert TaskModel.objects.filter(pk=instance.task_id).exists()
        scheduled.append(instance.task_id)
        raise RuntimeError("after the task was scheduled")

    post_save.connect(fail, sender=IndexRequest)
    try:
        with pytest.raises(RuntimeError, match="after the task"):
            client.post("/schedule", {"path": "ast.py"})
    finally:
        post_save.disconnect(fail, sender=IndexRequest)

    assert len(scheduled) == 1
    assert not TaskModel.objects.exists()
    assert not IndexRequest.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_task_scheduled_by_a_view_goes_with_the_transaction_around_it(client: Client) -> None:
    with transaction.atomic():
        client.post("/schedule", {"path": "ast.py"})
        assert TaskModel.objects.count() == 1
        transaction.set_rollback(True)

    assert not TaskModel.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_visitor_sees_the_scheduled_task_run(client: Client, start_consumer: StartConsumer) -> None:
    client.post("/schedule", {"path": "colorsys.py"})
    task = TaskModel.objects.get()
    before = client.get(f"/task/{task.pk}").json()

    assert start_consumer("--queue", "index", "--burst").wait() == 0
    after = client.get(f"/task/{task.pk}").json()

    expected = {
        "id": task.pk,
        "func_name": "testproject.codeindex.tasks.index_file",
        "error": None,
        "retry_attempts": 0,
    }
    parsed = parse_file(library_directory() / "colorsys.py")
    counts = {"lines": parsed.lines, "classes": 0, "functions": len(parsed.functions)}
    assert before == expected | {"status": "created", "returned": None}
    assert after == expected | {"status": "completed", "returned": counts}
    assert client.get("/", {"q": "rgb_to_hls"}).context["found"].paginator.count == 1


@pytest.mark.django_db
@pytest.mark.parametrize("task_id", [0, 999_999, 10**30])
def test_unknown_task_is_not_found_in_json(client: Client, task_id: int) -> None:
    response = client.get(f"/task/{task_id}")

    assert response.status_code == 404
    assert response.json() == {"error": f"There is no task {task_id}."}


@pytest.mark.django_db
def test_result_that_does_not_verify_is_an_error_in_json(client: Client) -> None:
    client.post("/schedule", {"path": "colorsys.py"})
    TaskModel.objects.update(raw_returned=f"pickle:{'0' * 64}:gASVAgA=")

    answer = client.get(f"/task/{TaskModel.objects.get().pk}").json()

    assert answer["returned"] is None
    assert "carry no valid signature" in answer["error"]


def _schedule_metadata(path: Path) -> int:
    from asgiref.sync import async_to_sync

    return async_to_sync(read_metadata.aschedule)(str(path)).pk
