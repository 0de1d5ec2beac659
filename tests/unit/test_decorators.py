import asyncio
import functools
import pickle
import types
from datetime import UTC, datetime
from typing import Any

import pytest

from firefly_jobs import registry
from firefly_jobs.decorators import AsyncTask, Task, TaskWords, atask, task
from firefly_jobs.exceptions import (
    AsyncFuncNotSupportedException,
    SyncFuncNotSupportedException,
    TaskDefinitionError,
)
from firefly_jobs.options import OPTION_WORDS
from firefly_jobs.retries import Fixed

ETA = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_tasks", {})


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


async def aadd(a: int, b: int = 2) -> int:
    """Add two numbers, later."""
    return a + b


def with_context(context: Any, a: int) -> Any:
    return context, a


def with_any_arguments(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def without_parameters() -> None:
    pass


def with_eta(a: int, eta: datetime) -> None:
    pass


def with_eta_only_by_keyword(a: int, *, eta: datetime | None = None) -> None:
    pass


def generator():
    yield 1


async def async_generator():
    yield 1


class Shop:
    def charge(self) -> None:
        pass

    @staticmethod
    def refund() -> None:
        pass

    @classmethod
    def close(cls) -> None:
        pass


class CallableObject:
    def __call__(self) -> None:
        pass


# --- bare, and with options


def test_task_may_be_used_bare():
    made = task(add)

    assert isinstance(made, Task)
    assert made.name == f"{__name__}.add"
    assert made.options.queue is None
    assert not made.is_async


def test_task_may_be_called_with_and_without_options():
    assert isinstance(task()(add), Task)
    made = task(queue="mail", max_retries=3, retry_delay=5, priority=-7)(add)

    assert isinstance(made, Task)
    assert (made.options.queue, made.options.max_retries) == ("mail", 3)
    assert (made.options.retry_delay, made.options.priority) == (5, -7)


def test_atask_may_be_used_bare_and_with_options():
    assert isinstance(atask(aadd), AsyncTask)
    made = atask(queue="mail")(aadd)

    assert isinstance(made, AsyncTask)
    assert made.is_async
    assert made.options.queue == "mail"


def test_a_task_is_registered_under_its_name_and_aliases():
    made = task(name="sum", aliases=["plus"])(add)

    assert made.name == "sum"
    assert registry.find("sum") is registry.find("plus") is made


# --- still the function it was


def test_calling_a_task_calls_its_function():
    made = task(add)

    assert made(1) == 3
    assert made(1, b=5) == 6
    with pytest.raises(TypeError):
        made()  # type: ignore[call-arg]


def test_awaiting_an_async_task_calls_its_function():
    assert asyncio.run(atask(aadd)(1, b=5)) == 6


def test_a_task_looks_like_its_function():
    made = task(add)

    assert made.__doc__ == "Add two numbers."
    assert made.__name__ == "add"  # type: ignore[attr-defined]
    assert made.__qualname__ == "add"  # type: ignore[attr-defined]
    assert made.__module__ == __name__
    assert made.__wrapped__ is made.func is add  # type: ignore[attr-defined]
    assert repr(made) == f"<Task {__name__}.add>"


def test_an_attribute_of_the_function_does_not_replace_one_of_the_task():
    made_of = types.FunctionType(add.__code__, globals(), "add")
    made_of.__module__, made_of.__qualname__ = __name__, "add"
    made_of.name = made_of.options = made_of.func = "mine"  # type: ignore[attr-defined]

    made: Any = task(made_of)

    assert made.name == f"{__name__}.add"
    assert made.func is made_of
    assert made.options.queue is None


# --- what cannot be a task


def test_task_refuses_a_coroutine_function_and_names_atask():
    with pytest.raises(AsyncFuncNotSupportedException, match=r"aadd is an async .* use @atask"):
        task(aadd)
    with pytest.raises(AsyncFuncNotSupportedException):
        task(queue="mail")(aadd)


def test_atask_refuses_a_plain_function_and_names_task():
    with pytest.raises(SyncFuncNotSupportedException, match="add is a plain function; use @task"):
        atask(add)  # type: ignore[arg-type]
    with pytest.raises(SyncFuncNotSupportedException):
        atask(queue="mail")(add)  # type: ignore[arg-type]


def local_function() -> Any:
    def inner() -> None:
        pass

    return inner


def main_function() -> Any:
    made = types.FunctionType(add.__code__, globals(), "add")
    made.__module__, made.__qualname__ = "__main__", "add"
    return made


@pytest.mark.parametrize(
    ("func", "reason"),
    [
        (lambda: 1, "a lambda has no name that a consumer could find it by"),
        (local_function(), "it is defined inside another function"),
        (Shop.charge, "it is a method, and a row stores a call without its object"),
        (Shop().charge, "it is a method"),
        (Shop.refund, "it is a method"),
        (Shop.__dict__["refund"], "it is a method"),
        (Shop.close, "it is a method"),
        (main_function(), "a consumer cannot import the module __main__"),
        (generator, "it is a generator, and calling it runs nothing"),
        (async_generator, "it is a generator, and calling it runs nothing"),
        (Shop, "Only a function can be a task"),
        (CallableObject(), "Only a function can be a task"),
        (functools.partial(add, 1), "Only a function can be a task"),
        ("shop.tasks.charge", "Only a function can be a task"),
        (5, "Only a function can be a task"),
    ],
)
@pytest.mark.parametrize("decorate", [task, atask, task(queue="mail")])
def test_what_a_consumer_could_not_find_or_call_is_refused_with_the_reason(decorate, func, reason):
    with pytest.raises(TaskDefinitionError) as caught:
        decorate(func)

    assert reason in str(caught.value)
    assert registry.names() == []


@pytest.mark.parametrize("func", [with_eta, with_eta_only_by_keyword])
def test_a_parameter_called_eta_is_refused_with_the_reason(func):
    with pytest.raises(
        TaskDefinitionError, match=r"schedule\(\) keeps the word 'eta' for the time"
    ):
        task(func)
    assert registry.names() == []


def test_a_task_is_decorated_once():
    made: Any = task(add)

    for decorate in (task, atask, task(queue="mail")):
        with pytest.raises(TaskDefinitionError, match=r"add is already a task; decorate it once"):
            decorate(made)
    assert registry.find(made.name) is made


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"que": "mail"}, TypeError, "no task option 'que'. Did you mean 'queue'"),
        ({"priority": 101}, ValueError, "priority must be between -100 and 100, got 101"),
        ({"priority": "hihg"}, ValueError, "no priority 'hihg', .*Did you mean 'high'"),
        ({"queue": 5}, TypeError, "queue must be a string"),
        ({"retry": Fixed(1), "max_retries": 1}, ValueError, "Give either retry="),
        ({"eta": ETA}, TypeError, r"eta belongs to a call: use schedule\(..., eta=...\)"),
    ],
)
@pytest.mark.parametrize("decorate", [task, atask])
def test_a_wrong_option_is_reported_where_it_is_written(decorate, words, error, message):
    with pytest.raises(error, match=message):
        decorate(**words)


# --- takes_context


def test_a_task_that_takes_its_context_is_scheduled_without_it():
    made: Any = task(takes_context=True)(with_context)

    made.signature.bind((1,), {})
    with pytest.raises(TypeError):
        made.signature.bind(("context", 1), {})
    assert made("context", 1) == ("context", 1)


def test_a_context_may_be_taken_by_star_args():
    made: Any = task(takes_context=True)(with_any_arguments)

    made.signature.bind((), {})
    made.signature.bind((1, 2), {"three": 3})


def test_takes_context_needs_a_parameter_for_it():
    with pytest.raises(TaskDefinitionError, match=r"without_parameters has takes_context=True, so"):
        task(takes_context=True)(without_parameters)


# --- copies for one call


def test_using_returns_a_copy_and_leaves_the_original():
    made = task(queue="mail")(add)

    copy = made.using(queue="slow", priority=50, eta=ETA)

    assert (copy.options.queue, copy.options.priority, copy.options.eta) == ("slow", 50, ETA)
    assert (made.options.queue, made.options.priority, made.options.eta) == ("mail", 0, None)
    assert type(copy) is Task
    assert copy(1, 3) == 4
    assert copy.name == made.name
    assert registry.find(made.name) is made


def test_using_may_be_repeated_and_keeps_what_it_does_not_name():
    copy = task(queue="mail")(add).using(priority=5).using(eta=ETA)

    assert (copy.options.queue, copy.options.priority, copy.options.eta) == ("mail", 5, ETA)


@pytest.mark.parametrize("word", ["atomic", "takes_context", "name", "aliases"])
def test_using_refuses_what_belongs_to_the_function(word):
    with pytest.raises(TypeError, match=f"{word} belongs to the function"):
        task(add).using(**{word: False})


def test_using_refuses_a_wrong_option():
    with pytest.raises(TypeError, match=r"no task option 'prioritty'\. Did you mean 'priority'"):
        task(add).using(prioritty=1)
    with pytest.raises(ValueError, match="priority must be between"):
        task(add).using(priority=101)


# --- pickling


def test_a_task_is_pickled_by_its_name(monkeypatch):
    made = task(name="sum")(add)
    text = pickle.dumps(made)

    assert pickle.loads(text) is made

    # A process where another function has the name gets that one; nothing is imported.
    monkeypatch.setattr(registry, "_tasks", {})
    moved = task(name="sum")(with_any_arguments)
    assert pickle.loads(text) is moved
    assert b"sum" in text
    assert b"test_decorators" not in text


def test_type_checkers_see_every_option_of_the_decorators():
    assert set(TaskWords.__annotations__) == set(OPTION_WORDS) - {"eta"}
