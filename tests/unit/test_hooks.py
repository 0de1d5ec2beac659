"""What may be given as hooks, and where."""

from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from firefly_jobs import hooks, registry
from firefly_jobs.decorators import atask, task
from firefly_jobs.exceptions import AsyncFuncNotSupportedException
from firefly_jobs.hooks import TaskHooks, as_hooks, methods_of, shared_hooks
from firefly_jobs.jobs import Job


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_tasks", {})


class First(TaskHooks):
    def before_start(self, run):
        pass


class Second(TaskHooks):
    def after_return(self, run, status):
        pass


class Async(TaskHooks):
    async def on_success(self, run, returned):
        pass


class NeedsArguments(TaskHooks):
    def __init__(self, url):
        self.url = url


def add(a, b=2):
    return a + b


async def aadd(a, b=2):
    return a + b


class WithHooks(Job):
    hooks = [Second, First]  # noqa: RUF012 - as a user would write it

    def run(self):
        pass


def kinds(found):
    return [type(hook) for hook in found]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, []),
        ((), []),
        (First, [First]),
        (First(), [First]),
        ([First, Second()], [First, Second]),
        ((Second, First), [Second, First]),
        ([NeedsArguments("https://example.org")], [NeedsArguments]),
    ],
)
def test_hooks_are_a_class_an_object_or_a_list_of_these(given, expected):
    assert kinds(as_hooks(given)) == expected
    assert kinds(task(hooks=given)(add).options.hooks) == expected


@pytest.mark.parametrize("given", ["shop.hooks.Audit", 5, object, print, [First, dict], [None]])
def test_anything_else_is_refused_at_decoration(given):
    with pytest.raises(TypeError, match="hooks must be a subclass of TaskHooks"):
        task(hooks=given)


def test_a_class_that_needs_arguments_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"NeedsArguments, which cannot be made.*Give an object"):
        task(hooks=NeedsArguments)


def test_async_hooks_of_a_plain_function_are_refused_at_decoration():
    with pytest.raises(AsyncFuncNotSupportedException, match=r"hook Async\.on_success is async"):
        task(hooks=[First, Async])(add)

    assert kinds(atask(hooks=[First, Async])(aadd).options.hooks) == [First, Async]


def test_hooks_belong_to_the_task_and_not_to_a_call():
    made = task(hooks=First)(add)

    with pytest.raises(TypeError, match="hooks belongs to the function"):
        made.using(hooks=Second)
    with pytest.raises(TypeError, match="hooks belongs to the task itself"):
        Job(made, hooks=Second)
    with pytest.raises(TypeError, match="hooks belongs to the task itself"):
        made.job.with_options(hooks=Second)
    assert made.using(queue="slow").options.hooks == made.options.hooks


def test_the_hooks_of_a_job_type_are_a_class_attribute():
    assert kinds(WithHooks.task.options.hooks) == [Second, First]
    assert kinds(WithHooks().hooks) == [Second, First]


def test_only_methods_that_were_overridden_are_called():
    first, second = found = as_hooks([First, Second])

    assert methods_of(found, "before_start") == [(first, first.before_start)]
    assert methods_of(found, "after_return") == [(second, second.after_return)]
    assert methods_of(found, "on_failure") == []


def test_every_method_does_nothing_by_itself():
    plain = TaskHooks()
    arguments: dict[str, list[Any]] = {
        "before_start": [],
        "on_success": [1],
        "on_failure": [1],
        "on_retry": [1, 2],
        "on_prerequisite_failure": [1],
        "after_return": [""],
    }

    for event in hooks.EVENTS:
        assert getattr(plain, event)(None, *arguments[event]) is None


def test_hooks_of_every_task_are_read_from_the_settings():
    names = [f"{__name__}.First", f"{__name__}.Second"]

    with override_settings(FIREFLY_JOBS={"HOOKS": names}):
        assert kinds(shared_hooks()) == [First, Second]
    assert shared_hooks() == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.no_such_module.Hooks", "No module named"),
        (f"{__name__}.no_such_name", "no_such_name"),
        (f"{__name__}.add", "must be a subclass of TaskHooks"),
        (f"{__name__}.NeedsArguments", "cannot be made without arguments"),
        (f"{__name__}.Async", r"Async\.on_success is async"),
    ],
)
def test_hooks_of_every_task_that_are_none_are_named(name, message):
    with (
        override_settings(FIREFLY_JOBS={"HOOKS": [name]}),
        pytest.raises(ImproperlyConfigured, match=message) as raised,
    ):
        shared_hooks()

    assert f"FIREFLY_JOBS['HOOKS'] has {name!r}" in str(raised.value)
