import types
from typing import Any

import pytest

from firefly_jobs import registry
from firefly_jobs.decorators import AsyncTask, Task, atask, task
from firefly_jobs.exceptions import TaskDefinitionError, TaskNotFoundError


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_tasks", {})


def _body(a: int) -> int:
    return a + 1


async def _async_body(a: int) -> int:
    return a + 1


def function(name: str, *, module: str = "shop.tasks", of: Any = _body) -> Any:
    """Return a function as if ``module`` had defined it."""
    made = types.FunctionType(of.__code__, {"__name__": module}, name)
    made.__qualname__ = name
    made.__module__ = module
    return made


def test_a_task_is_found_by_module_and_name():
    charge = task(function("charge"))

    assert charge.name == "shop.tasks.charge"
    assert registry.find("shop.tasks.charge") is charge


def test_a_task_is_found_by_the_name_it_was_given_and_by_no_other():
    charge = task(name="billing")(function("charge"))

    assert registry.find("billing") is charge
    with pytest.raises(TaskNotFoundError):
        registry.find("shop.tasks.charge")


def test_a_task_is_found_by_its_former_names():
    charge = task(aliases=["shop.charge", "old.charge"])(function("charge"))

    assert registry.find("shop.charge") is charge
    assert registry.find("old.charge") is charge
    assert registry.names() == ["shop.tasks.charge"]


def test_an_unknown_name_is_answered_with_all_three_remedies():
    task(function("charge"))

    with pytest.raises(TaskNotFoundError) as caught:
        registry.find("shop.tasks.chargee")

    assert str(caught.value) == (
        "No task named 'shop.tasks.chargee' is registered in this process. Did you mean "
        "'shop.tasks.charge'? If it was moved, keep the old name working with "
        "@task(aliases=['shop.tasks.chargee']); if it is new, make sure 'shop.tasks' is imported "
        "when the consumer starts."
    )


def test_an_unknown_name_without_a_module_does_not_ask_for_an_import_of_nothing():
    with pytest.raises(TaskNotFoundError) as caught:
        registry.find("billing")

    assert "''" not in str(caught.value)


def test_a_name_is_a_key_and_never_imported():
    with pytest.raises(TaskNotFoundError):
        registry.find("os.system")


def test_two_functions_cannot_have_one_name():
    task(name="billing")(function("charge"))

    with pytest.raises(TaskDefinitionError) as caught:
        task(name="billing")(function("refund"))

    assert str(caught.value) == (
        "shop.tasks.refund cannot be the task 'billing': shop.tasks.charge already is. "
        "Give one of them another name with @task(name=...)."
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"aliases": ["old"]}, {"aliases": ["old"]}),
        ({"aliases": ["old"]}, {"name": "old"}),
        ({"name": "old"}, {"aliases": ["other", "old"]}),
    ],
)
def test_an_alias_is_taken_like_a_name(first, second):
    charge = task(**first)(function("charge"))

    with pytest.raises(TaskDefinitionError, match=r"'old': shop\.tasks\.charge already is"):
        task(**second)(function("refund"))

    assert registry.find("old") is charge
    assert registry.names() == [charge.name]


def test_a_module_that_is_reloaded_replaces_its_tasks():
    task(function("charge"))
    again = task(function("charge"))

    assert registry.find("shop.tasks.charge") is again


def test_the_same_name_in_another_module_is_another_task():
    one = task(function("charge", module="shop.tasks"))
    other = task(function("charge", module="bank.tasks"))

    assert registry.find("shop.tasks.charge") is one
    assert registry.find("bank.tasks.charge") is other
    assert registry.names() == ["bank.tasks.charge", "shop.tasks.charge"]


def test_the_registry_knows_which_tasks_are_async():
    assert not registry.has_async()

    plain = task(function("charge"))
    assert isinstance(plain, Task)
    assert not registry.has_async()

    coroutine = atask(function("ping", of=_async_body))
    assert isinstance(coroutine, AsyncTask)
    assert registry.has_async()
    assert registry.is_async("shop.tasks.ping")
    assert not registry.is_async("shop.tasks.charge")
    assert not registry.is_async("nobody")


def test_an_async_task_is_async_under_its_former_name():
    atask(aliases=["old.ping"])(function("ping", of=_async_body))

    assert registry.is_async("old.ping")
