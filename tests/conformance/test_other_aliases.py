"""Tasks on other databases, and calls that leave connections to them in any state."""

import pytest
from asgiref.sync import sync_to_async
from django.db import transaction

from firefly_jobs import current_task
from tests.conformance.support import consuming, run_burst, schedule
from tests.conformance.test_groups import busy_machine, run_as_group
from tests.testapp.models import Effect

__all__ = ["busy_machine"]

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])


def leave_a_block_open():
    transaction.atomic(using="other").__enter__()


def turn_off_autocommit():
    transaction.set_autocommit(False, using="other")


def leave_an_effect_uncommitted():
    transaction.set_autocommit(False, using="other")
    Effect.objects.using("other").create(task_key="uncommitted", value=1)


@pytest.mark.parametrize("options", [{}, {"group_commit": True}], ids=["single", "group"])
@pytest.mark.parametrize(
    "leave", [leave_a_block_open, turn_off_autocommit, leave_an_effect_uncommitted]
)
def test_a_transaction_left_open_elsewhere_does_not_swallow_the_effects_of_the_next_call(
    leave, options
):
    def create():
        Effect.objects.using("other").create(task_key="other", value=2)

    rows = [schedule(leave), schedule(create)]

    run_burst(**options)

    for row in rows:
        row.refresh_from_db()
        assert row.status == "completed"
    assert list(Effect.objects.using("other").values_list("task_key", flat=True)) == ["other"]


@pytest.mark.parametrize("leave", [leave_a_block_open, turn_off_autocommit])
def test_nor_those_of_the_next_call_of_its_group(leave):
    def create():
        Effect.objects.using("other").create(task_key="other", value=2)

    rows, found = run_as_group(lambda: None, leave, create, lambda: None)

    assert {row.status for row in rows} == {"completed"}
    assert found
    assert list(Effect.objects.using("other").values_list("task_key", flat=True)) == ["other"]


async def leave_an_effect_uncommitted_async():
    await sync_to_async(leave_an_effect_uncommitted)()


def leave_it_and_fail():
    leave_an_effect_uncommitted()
    raise ValueError


@pytest.mark.parametrize(
    "leave",
    [leave_an_effect_uncommitted, leave_it_and_fail, leave_an_effect_uncommitted_async],
    ids=["returns", "raises", "coroutine"],
)
@pytest.mark.parametrize("atomic", [True, False])
def test_a_transaction_left_open_elsewhere_locks_nothing_while_no_call_follows(leave, atomic):
    row = schedule(leave, atomic=atomic)

    with consuming():
        row.wait_finished(20)
        # On SQLite the one that is left open is the only one that can write.
        Effect.objects.using("other").create(task_key="after", value=3)
        assert list(Effect.objects.using("other").values_list("value", flat=True)) == [3]


async def tell_database_async():
    return current_task().database


def tell_database():
    return current_task().database


@pytest.mark.parametrize("using", ["default", "other"])
@pytest.mark.parametrize("options", [{}, {"group_commit": True}], ids=["single", "group"])
def test_a_call_knows_the_database_of_its_row(using, options):
    bodies = (tell_database, tell_database, tell_database_async)
    rows = [schedule(body, database=using) for body in bodies]

    run_burst(using=using, **options)

    for row in rows:
        row.refresh_from_db()
    assert [row.returned for row in rows] == [using] * 3
