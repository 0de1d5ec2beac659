"""What a type checker tells a user about scheduling."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """\
from datetime import UTC, datetime, timedelta

from firefly_jobs import (
    Fixed, Job, Limit, Priority, TaskModel, TaskReference, atask, schedule_many, task
)
from firefly_jobs.decorators import AsyncTask, Task

ETA = datetime(2031, 5, 1, tzinfo=UTC)


@task
def add(a: int, b: int = 2) -> int:
    return a + b


@task(queue="mail", max_retries=3, retry_delay=timedelta(minutes=1), retry_on=(OSError,))
def mail(to: str, *, subject: str) -> None:
    return None


@atask
async def aadd(a: int, b: int = 2) -> int:
    return a + b


@atask(queue="web", retry=Fixed(3))
async def fetch(url: str) -> bytes:
    return b""


@task(
    priority="high",
    max_attempts=3,
    kwargs={"b": 5},
    expires=timedelta(minutes=5),
    unique_key=lambda a: f"add-{a}",
    on_conflict="replace",
    limits=[Limit(Limit.Type.TIME, 60), Limit(Limit.Type.MEMORY, "200MB")],
    tags=["a"],
    metadata={"customer": 5},
    label="Sum",
    check_types=True,
)
def full(a: int, b: int = 2) -> int:
    return a + b


reveal_type(full)  # R: Task[[a: int, b: int =], int]
task(on_conflict="retrun")  # E: No overload variant
task(priority=Priority.LOW)
reveal_type(add)  # R: Task[[a: int, b: int =], int]
reveal_type(mail)  # R: Task[[to: str, *, subject: str], None]
reveal_type(add(1, 3))  # R: int
reveal_type(add.schedule(1, 3))  # R: TaskModel
reveal_type(add.schedule(1, b=3))  # R: TaskModel
reveal_type(add.schedule(1, 3, eta=ETA))  # R: TaskModel
reveal_type(add.schedule(1, eta=None))  # R: TaskModel
reveal_type(add.schedule(1).id)  # R: int
reveal_type(mail.schedule("a@b.example", subject="hi"))  # R: TaskModel
reveal_type(add.using(queue="slow", eta=ETA))  # R: Task[[a: int, b: int =], int]
reveal_type(add.using(priority=5).schedule(1, 3))  # R: TaskModel
reveal_type(add.name)  # R: str

add.schedule("x")  # E: No overload variant
add.schedule()  # E: at least one argument
add.schedule(1, 2, 3)  # E: No overload variant
add.schedule(1, c=3)  # E: No overload variant
add.schedule(1, eta="tomorrow")  # E: No overload variant
add.using(queue="slow").schedule("x")  # E: No overload variant
mail.schedule("a@b.example")  # E: No overload variant
add("x")  # E: incompatible type "str"; expected "int"
task(priority="highest")  # E: No overload variant
task(que="mail")  # E: Unexpected keyword argument "que"
task(aadd).schedule(1).nothing  # E: has no attribute "nothing"


class Resize(Job):
    queue = "images"

    def run(self, path: str, width: int = 100) -> str:
        return path


reveal_type(add.job)  # R: Job
reveal_type(add.job.with_kwargs(a=1).with_priority("high").schedule())  # R: TaskModel
reveal_type(Job(add, (1,), {"b": 2}, queue="mail").options.queue)  # R: str | None
reveal_type(Resize("a.png", width=5, priority=10))  # R: program.Resize
reveal_type(Resize("a.png").with_unique_key(lambda path: path))  # R: program.Resize
reveal_type(schedule_many([add.job, Resize("a"), add]))  # R: list[TaskModel]
add.job.with_priority("highest")  # E: incompatible type


async def main() -> None:
    reveal_type(await add.job.aschedule())  # R: TaskModel
    reveal_type(aadd)  # R: AsyncTask[[a: int, b: int =], int]
    reveal_type(await aadd(1, 3))  # R: int
    reveal_type(await aadd.schedule(1, 3))  # R: TaskModel
    reveal_type(await aadd.schedule(1, eta=ETA))  # R: TaskModel
    reveal_type(await aadd.aschedule(1))  # R: TaskModel
    reveal_type(await add.aschedule(1, 3))  # R: TaskModel
    reveal_type(await add.aschedule(1, eta=ETA))  # R: TaskModel
    reveal_type(await aadd.using(queue="slow").schedule(1))  # R: TaskModel
    reveal_type(await fetch("https://a.example"))  # R: bytes
    await aadd.schedule("x")  # E: No overload variant
    await add.aschedule("x")  # E: No overload variant
    await fetch.schedule(5)  # E: No overload variant
    aadd.schedule(1)  # E: must be used
    row = await aadd.schedule(1)
    reveal_type(await row.await_result(timeout=5))  # R: Any
    reveal_type(await row.await_finished(timedelta(seconds=5)))  # R: TaskModel
    reveal_type(await TaskReference(5).aget())  # R: TaskModel
    reveal_type(await TaskReference(5).await_finished())  # R: TaskModel
    await row.await_result(timeout="soon")  # E: incompatible type "str"
    row.await_result()  # E: must be used


@atask  # E: incompatible type
def plain() -> None:
    return None


def takes(sync: Task[[int], int], coroutine: AsyncTask[[int], int], row: TaskModel) -> None:
    reveal_type(sync(5))  # R: int
    reveal_type(row.params["args"])  # R: Any
    reveal_type(row.cancel())  # R: bool
    reveal_type(row.wait())  # R: Any
    reveal_type(row.wait(timeout=0.5))  # R: Any
    reveal_type(row.wait_finished(timedelta(seconds=5)))  # R: TaskModel
    reveal_type(TaskReference(5, using="other").wait_finished())  # R: TaskModel
    reveal_type(TaskReference(5).get())  # R: TaskModel
    row.wait(timeout="soon")  # E: incompatible type "str"
    TaskReference("5")  # E: incompatible type "str"
"""


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> dict[int, list[str]]:
    """Return what mypy says about each line of the program."""
    directory = tmp_path_factory.mktemp("typing")
    program, config = directory / "program.py", directory / "mypy.ini"
    program.write_text(PROGRAM, encoding="utf-8")
    config.write_text(
        f"[mypy]\nstrict = true\nmypy_path = {ROOT}\ncache_dir = {directory / 'cache'}\n"
        "enable_error_code = unused-awaitable\nfollow_imports = silent\n",
        encoding="utf-8",
    )
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", config, program],
        capture_output=True,
        text=True,
        cwd=directory,
        check=False,
    )
    assert ended.returncode in {0, 1}, ended.stdout + ended.stderr
    found: dict[int, list[str]] = {}
    for line in ended.stdout.splitlines():
        if match := re.match(r".*program\.py:(\d+): (?:error|note): (.*)", line):
            found.setdefault(int(match[1]), []).append(match[2])
    return found


def _lines(mark: str) -> list[tuple[int, str]]:
    return [
        (number, line.partition(mark)[2].strip())
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if mark in line
    ]


def _id(value: object) -> str:
    return f"line {value}" if isinstance(value, int) else ""


def _line(number: int) -> str:
    return PROGRAM.splitlines()[number - 1].strip()


def _plain(text: str) -> str:
    """Return a type without the modules its names come from."""
    return re.sub(r"\b(builtins|firefly_jobs(\.\w+)*)\.(?=\w)", "", text)


@pytest.mark.parametrize(("number", "expected"), _lines("# R:"), ids=_id)
def test_the_type_of_an_expression_is_what_a_user_expects(messages, number, expected):
    (message,) = messages[number]

    assert _plain(message) == f'Revealed type is "{expected}"', _line(number)


@pytest.mark.parametrize(("number", "expected"), _lines("# E:"), ids=_id)
def test_a_wrong_use_is_an_error_of_the_type_checker(messages, number, expected):
    assert expected in "\n".join(messages.get(number, [])), _line(number)


def test_nothing_else_is_an_error(messages):
    expected = {number for number, _ in _lines("# R:") + _lines("# E:")}

    assert {n: text for n, text in messages.items() if n not in expected} == {}
